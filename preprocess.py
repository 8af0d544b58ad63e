"""Tokenise a task before any run: `python preprocess.py --task-name a.jsonl --tokenizer-name DIR --output DIR`."""

import sys

from farspan.runtime.data.preprocess import main

if __name__ == "__main__":
    sys.exit(main())
