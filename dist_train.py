"""Train one rank: `python dist_train.py … --rank R --dist-url tcp://host:port`; `--help` lists all flags."""

import sys

from farspan.runtime.cli import main

if __name__ == "__main__":
    sys.exit(main())
