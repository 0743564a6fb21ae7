"""Files and directories made to harm whoever identifies them.

    python tests/hostile/make_corpus.py FOLDER

Whatever runs a payload creates FOLDER/executed; nothing else does. No file takes more than a few megabytes on disk, the
sparse ones of ten gigabytes included.
"""

from __future__ import annotations

import sys
from pathlib import Path

import corpus_files
import corpus_folders
import corpus_pickles

CANARY = "executed"


def make(folder: Path) -> list[Path]:
    """The paths that were made, to be identified one by one."""
    canary, corpus = folder / CANARY, folder / "corpus"
    corpus.mkdir(parents=True)
    corpus_pickles.write(corpus, canary)
    corpus_files.write(corpus)
    corpus_folders.write(corpus, canary)
    return sorted(corpus.iterdir())


if __name__ == "__main__":
    for path in make(Path(sys.argv[1]).resolve()):
        sys.stdout.write(f"{path}\n")
