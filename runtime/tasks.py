"""The mixture of tasks: jsonl files, weights, and a cursor that names the very next token of each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

Encode = Callable[[str], Sequence[int]]


class DataError(ValueError):
    """Training data that cannot be used; the message names the file and the line."""


def parse_tasks(text: str) -> list[tuple[Path, float]]:
    """`a.jsonl:0.2,b.jsonl` → paths and weights (1.0 where none is given). A path may hold colons."""
    tasks = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        head, _, tail = part.rpartition(":")
        try:
            path, weight = (head, float(tail)) if head else (part, 1.0)
        except ValueError:
            path, weight = part, 1.0
        if not 0 < weight < float("inf"):
            raise DataError(f"--task-name {part}: the weight must be a positive number")
        tasks.append((Path(path), weight))
    if not tasks:
        raise DataError("--task-name names no file")
    return tasks


@dataclass
class Cursor:
    """The next token of a task: `skip` tokens into document `position` of this epoch's order."""

    epoch: int = 0
    position: int = 0
    skip: int = 0


class Task:
    """One jsonl file with a `text` on each line, read in a new seeded order each epoch."""

    def __init__(self, path: Path, number: int, seed: int) -> None:
        self.path, self.cursor = path, Cursor()
        self._number, self._seed = number, seed
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise DataError(f"--task-name: cannot read {path}: {error.strerror}") from error
        self.offsets, self.line_numbers = _index(self._file)
        if not len(self.offsets):
            raise DataError(f"--task-name: {path} is empty")
        self._order = self._permutation()
        self._document: Sequence[int] | None = None

    def read(self, count: int, encode: Encode) -> list[int]:
        """The next `count` tokens; documents follow one another, each after a line break."""
        tokens: list[int] = []
        cursor = self.cursor
        barren = 0
        while len(tokens) < count:
            if self._document is None:
                self._document = encode("\n" + self._text(int(self._order[cursor.position])))
            part = self._document[cursor.skip : cursor.skip + count - len(tokens)]
            tokens += part
            cursor.skip += len(part)
            barren = 0 if part else barren + 1
            if barren > len(self.offsets):
                raise DataError(f"{self.path}: no line of it gives any token")
            if cursor.skip >= len(self._document):
                self._next_document()
        return tokens

    def count(self, encode: Encode) -> int:
        """Tokens of one epoch."""
        return sum(len(encode("\n" + self._text(line))) for line in range(len(self.offsets)))

    def state(self) -> dict[str, int]:
        return {**vars(self.cursor), "lines": len(self.offsets)}

    def load_state(self, state: dict[str, int]) -> None:
        """Raises `DataError` if the file is not the one that the cursor points into."""
        if state["lines"] != len(self.offsets):
            raise DataError(
                f"{self.path} has {len(self.offsets)} lines, and had {state['lines']} when the checkpoint was saved; "
                "put the old file back, or name the new one by another path to start it from its beginning"
            )
        self.cursor = Cursor(state["epoch"], state["position"], state["skip"])
        self._order, self._document = self._permutation(), None

    def _next_document(self) -> None:
        cursor = self.cursor
        self._document = None
        cursor.position, cursor.skip = cursor.position + 1, 0
        if cursor.position == len(self.offsets):
            cursor.epoch, cursor.position = cursor.epoch + 1, 0
            self._order = self._permutation()

    def _permutation(self) -> np.ndarray:
        return np.random.default_rng([self._seed, self._number, self.cursor.epoch]).permutation(len(self.offsets))

    def _text(self, line: int) -> str:
        self._file.seek(int(self.offsets[line]))
        raw = self._file.readline()
        return text_of(raw, f"{self.path}:{self.line_numbers[line]}")


def text_of(raw: bytes, where: str) -> str:
    """The text of one line. Raises `DataError`, which says `where`."""
    try:
        row = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise DataError(f'{where}: expected an object with a string under "text"')
    return row["text"]


def _index(file: BinaryIO) -> tuple[np.ndarray, np.ndarray]:
    """Offsets (bytes) and numbers (from 1) of all lines that are not blank."""
    offsets: list[int] = []
    numbers: list[int] = []
    offset = 0
    for number, line in enumerate(file, 1):
        if line.strip():
            offsets.append(offset)
            numbers.append(number)
        offset += len(line)
    return np.array(offsets, dtype=np.int64), np.array(numbers, dtype=np.int64)


class TaskMixture:
    """Draws sequences of `length` tokens, each from one task, chosen by weight.

    The choice for sequence n depends on `seed` and n alone, so a cursor is a handful of integers.
    """

    def __init__(self, tasks: Sequence[tuple[Path, float]], encode: Encode, length: int, seed: int) -> None:
        self._encode, self._length, self._seed = encode, length, seed
        self.tasks = [Task(path, number, seed) for number, (path, _) in enumerate(tasks)]
        weights = np.array([weight for _, weight in tasks])
        self._bounds = np.cumsum(weights / weights.sum())
        self.drawn = 0

    def draw(self, rows: int) -> np.ndarray:
        """The next `rows` sequences: [rows, length] int64. Raises `DataError` at a line that cannot be used."""
        out = np.empty((rows, self._length), dtype=np.int64)
        for row in out:
            u = np.random.default_rng([self._seed, self.drawn]).random()
            choice = min(int(np.searchsorted(self._bounds, u, side="right")), len(self.tasks) - 1)
            row[:] = self.tasks[choice].read(self._length, self._encode)
            self.drawn += 1
        return out

    def sequences(self) -> int:
        """How many sequences hold every task once; a task's last one is filled up from its next epoch."""
        return sum(-(-task.count(self._encode) // self._length) for task in self.tasks)

    def state(self) -> dict[str, Any]:
        """The cursor, as JSON."""
        return {"drawn": self.drawn, "tasks": {key: task.state() for key, task in self._keyed()}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on at a cursor. A task that the cursor does not know starts at its beginning. Raises `DataError`."""
        self.drawn = state["drawn"]
        for key, task in self._keyed():
            if key in state["tasks"]:
                task.load_state(state["tasks"][key])

    def _keyed(self) -> Iterator[tuple[str, Task]]:
        """Each task under its path, and under path#2 … where a path comes again."""
        seen: dict[str, int] = {}
        for task in self.tasks:
            path = str(task.path)
            seen[path] = seen.get(path, 0) + 1
            yield (path if seen[path] == 1 else f"{path}#{seen[path]}"), task
