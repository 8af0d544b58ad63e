"""A small model of sentencepiece, trained in a moment as Meta trained Llama's."""

from __future__ import annotations

import argparse
import inspect
import pathlib
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

ODD = (
    "", " ", "  ", "a", " a", "  a", "a ", "a  ", "\n", "\n\n a", " \n  b\t c", "x  y   z    w", "\u2581", " \u2581a",
    "\u65e5\u672c\u8a9e", " \u65e5\u672c  \u8a9e", "\U0001f600", "\U0001f469\u200d\U0001f4bb  \U0001f600 ok", "e\u0301",
    "\ufb01", "\u00a0a\u2003b", "\0", "<0x0A>", "----- -- - ===", "1234567890", "\u0627\u0644", "\ufeffa",
)  # fmt: skip


def texts() -> list[str]:
    """Paragraphs that every Python has beside it: code, prose, and many spaces."""
    modules = (argparse, inspect, pathlib, random, shutil, subprocess)
    return [part for module in modules for part in inspect.getsource(module).split("\n\n") if part]


def random_texts(pieces: list[str], count: int = 1000) -> list[str]:
    """Rows of pieces, of spaces, of few characters, and of characters of all of Unicode."""
    rng = random.Random(0)
    kinds = (pieces, [" ", "  ", "a", "\n", " the"], list("an ="), [chr(c) for c in range(0x110000) if c >> 11 != 27])
    return ["".join(rng.choices(rng.choice(kinds), k=rng.randint(1, 40))) for _ in range(count)]


def make_spm(folder: Path, **changes: Any) -> SentencePieceProcessor:  # noqa: ANN401 - the trainer's options
    """`folder`/tokenizer.model of 1000 pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "vocab_size": 1000, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "split_digits": True, "allow_whitespace_only_pieces": True,
        "character_coverage": 0.9995, "minloglevel": 2, "num_threads": 1,
    }  # fmt: skip
    with (folder / "tokenizer.model").open("wb") as file:
        lines = [line for text in texts() for line in text.splitlines()]
        SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=file, **{**options, **changes})
    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
