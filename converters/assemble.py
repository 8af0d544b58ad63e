"""Bring the folders of several sites together: one save of one run, with all layers, that loads and resumes."""

import sys

from farspan.converters.command import main_assemble

if __name__ == "__main__":
    sys.exit(main_assemble())
