"""What a person types on the coordinator's and the submitter's side. Each file is one family of verbs."""
