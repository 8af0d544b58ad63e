"""Write a Llama shard folder or training checkpoint as a plain Hugging Face checkpoint."""

import sys

from farspan.converters.command import main_to

if __name__ == "__main__":
    sys.exit(main_to("llama"))
