"""One file per revision, named by number; never edited once released."""
