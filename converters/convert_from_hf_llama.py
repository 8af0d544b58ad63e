"""Cut a Hugging Face Llama checkpoint into a shard folder."""

import sys

from farspan.converters.command import main_from

if __name__ == "__main__":
    sys.exit(main_from("llama"))
