"""A vocabulary whose tokens are characters, so that a test can read what was drawn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from farspan.runtime.data.mixture import TaskMixture
from farspan.runtime.data.open_tasks import open_tasks
from farspan.runtime.data.recipe import Encoded, Frame, Recipe
from farspan.runtime.data.task_spec import TaskSpec
from farspan.runtime.flags.config import Config


def encode(texts: list[str], offsets: bool) -> Encoded:
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    flat = np.array([ord(c) for text in texts for c in text], dtype=np.uint32)
    starts = np.array([i for text in texts for i in range(len(text))], dtype=np.int64)
    return Encoded(flat, lengths, starts, starts + 1) if offsets else Encoded(flat, lengths)


class Chars:
    """What `open_tasks` needs of a vocabulary."""

    digest, pad = "chars", ord("_")

    def __init__(self, frame: Frame | None = None) -> None:
        self.frame = frame or Frame()
        self.added: list[str] = []

    def recipe(self, spec: TaskSpec) -> Recipe:
        return Recipe(spec, encode, self.frame)


def mixture(
    folder: Path,
    tasks: str | list[dict[str, Any]],
    length: int,
    frame: Frame | None = None,
    **flags: Any,  # noqa: ANN401 - whatever a flag takes
) -> TaskMixture:
    """A mixture of --task-name (a text) or --task-config (a list), with its cache in `folder`/cache."""
    if not isinstance(tasks, str):
        config = folder / "tasks.json"
        config.write_text(json.dumps(tasks))
        flags["task_config"] = str(config)
    else:
        flags["task_name"] = tasks
    made = Config(**{"seq_length": length, "data_cache": str(folder / "cache"), "wire_timeout": 60.0, **flags})
    return open_tasks(made, Chars(frame))  # type: ignore[arg-type]


def text_of(tokens: np.ndarray) -> str:
    return "".join(map(chr, tokens.reshape(-1)))


def write(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path
