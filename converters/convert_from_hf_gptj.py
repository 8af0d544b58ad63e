"""Cut a Hugging Face GPT-J checkpoint into a shard folder."""

import sys

from farspan.converters.command import main_from

if __name__ == "__main__":
    sys.exit(main_from("gptj"))
