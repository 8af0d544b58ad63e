"""The command `farspan` (`python -m farspan`): what the scripts do, under one name. Help costs no import of torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import get_close_matches

from farspan import __version__
from farspan.modules.families.registry import FAMILIES

COMMANDS = ("train", "check", "preprocess", "convert")
HELP = f"""\
usage: farspan COMMAND …

Fine-tune large language models on GPUs that stand far apart.

The road, in this order:

  farspan convert from-hf FAMILY --model-name NAME --save-dir DIR
      cut a Hugging Face model into a file for each layer
  farspan preprocess --task-name a.jsonl --tokenizer-name DIR --output DIR
      tokenise a task once for many runs; a run can also read the text itself
  farspan check FLAGS
      measure network, memory and layers, and say what a step will take; nothing is trained
  farspan train FLAGS
      train one rank: start one process a GPU, each with its own --rank
  farspan convert to-hf FAMILY --ckpt-path DIR --save-path DIR
      write a checkpoint as a plain Hugging Face folder

FAMILY: {", ".join(FAMILIES)}
farspan COMMAND --help lists a command's flags. The scripts dist_train.py, preprocess.py and converters/convert_*.py
do the same. docs/first-run.md explains each step.
"""
CONVERT = f"""\
usage: farspan convert from-hf FAMILY --model-name NAME --save-dir DIR
       farspan convert to-hf FAMILY --ckpt-path DIR --save-path DIR [--fp16 | --bf16]

from-hf cuts a Hugging Face model into a folder with a file for each layer. to-hf writes such a folder, or a training
checkpoint, as a plain Hugging Face folder.

FAMILY: {", ".join(FAMILIES)}
farspan convert from-hf FAMILY --help lists the flags.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 where the words are no command, else the command's own."""
    words = list(sys.argv[1:] if argv is None else argv)
    match words:
        case ["train" | "check" as command, *flags]:
            from farspan.runtime.cli import main as train

            return train(["--check", *flags] if command == "check" else flags)
        case ["preprocess", *flags]:
            from farspan.runtime.data.preprocess import main as preprocess

            return preprocess(flags)
        case ["convert", "from-hf" | "to-hf" as direction, family, *flags] if family in FAMILIES:
            from farspan.converters.command import main_from, main_to

            convert = main_from if direction == "from-hf" else main_to
            return convert(family, flags, prog=f"farspan convert {direction} {family}")
        case ["convert", *rest]:
            return _explain(CONVERT, rest, ("from-hf", "to-hf", *FAMILIES))
        case ["--version"]:
            print(f"farspan {__version__}")
            return 0
    return _explain(HELP, words, COMMANDS)


def _explain(help: str, words: list[str], known: Sequence[str]) -> int:
    """`help`, where it was asked for or a word is missing; else a line on the first word that is not `known`."""
    wrong = next((word for word in words if word not in known), None)
    if wrong is None:
        sys.stderr.write(help)
        return 2
    if wrong in ("-h", "--help", "help"):
        print(help, end="")
        return 0
    near = get_close_matches(wrong, known, 1)
    hint = f"is it {near[0]}?" if near else f"there are {', '.join(known)}"
    sys.stderr.write(f"farspan: {wrong} is none of its words: {hint}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
