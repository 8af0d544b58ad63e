"""`dist_train.py`, under the name that OpenChatKit's scripts call."""

import sys

from farspan.runtime.cli import main

if __name__ == "__main__":
    sys.exit(main())
