"""The mixture of tasks: rows, weights, and a cursor that names the very next token of each."""

from __future__ import annotations

import hashlib
import itertools
import logging
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from .continuity import ADVICE, changes
from .recipe import Block, Raw
from .task_spec import DataError, TaskSpec, parse_tasks, short_names
from .workers import Pending, Pool

__all__ = ["Cursor", "DataError", "Drawn", "Source", "Task", "TaskMixture", "parse_tasks"]

BLOCK_BYTES = 1 << 18
SHOWN = 3  # bad lines of a task that are named; all are counted
CHOICES = 4096  # drawn at a time

log = logging.getLogger("farspan")


class Source(Protocol):
    """Rows by number from 0. A source has `read` (rows to be tokenised) or `block` (tokens already)."""

    rows: int
    size: int
    stamp: str
    """Names what is read and the state that it is in, as part of a file's name; empty where that is not known."""

    def where(self, number: int) -> str: ...


class Readable(Source, Protocol):
    def read(self, numbers: np.ndarray) -> Sequence[Raw]: ...


class Tokenized(Source, Protocol):
    def block(self, numbers: np.ndarray) -> Block: ...


def unusable(where: str, fault: str) -> DataError:
    """What ends a run at one bad line."""
    return DataError(f"{where}: {fault} (--bad-lines skip goes on without)")


@dataclass
class Cursor:
    """The next token of a task: `skip` tokens into document `position` of this epoch's order. And what it gave.

    `order` seeds the task's orders. It is kept here, and is not the task's place in the list, so that tasks may be put
    before it or taken away when a run goes on.
    """

    order: int = 0
    epoch: int = 0
    position: int = 0
    skip: int = 0
    sequences: int = 0
    tokens: int = 0
    bad: int = 0


class Drawn(NamedTuple):
    """`tokens` int64 [rows, T], and `targets` bool [rows, T]: whether the loss counts this token as one to predict.

    `positions` int64 [rows, T], if asked for: see `positions_of`.
    """

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray | None = None


def positions_of(starts: np.ndarray) -> np.ndarray:
    """Where documents begin, bool [..., T] → each token's position in its document, int64 [..., T].

    A row's first token has position 0, also where its document began in the row before.
    """
    here = np.arange(starts.shape[-1])
    return here - np.maximum.accumulate(np.where(starts, here, 0), axis=-1)


class _Block(NamedTuple):
    """A block and where it stands: documents `start` … of `epoch`'s order."""

    epoch: int
    start: int
    block: Block
    ends: list[int]  # the block's: plain numbers, since many a row looks one up
    numbers: np.ndarray


class Task:
    """One source, read in a new seeded order each epoch, or in its own if it is not `shuffled`.

    Documents are tokenised in blocks whose borders depend on the source alone, so neither stopping nor the number of
    worker processes changes a token.
    """

    def __init__(
        self,
        spec: TaskSpec,
        source: Readable | Tokenized,
        number: int,
        seed: int,
        pool: Pool,
        *,
        skip_bad: bool = False,
        share: float = 1.0,
        shuffled: bool = True,
        made: str = "",
        made_before: str = "",
    ) -> None:
        """`made`: digest of what makes the task's tokens; `made_before`: before `--eos auto` ended templates."""
        self.spec, self.source, self.cursor = spec, source, Cursor(order=number)
        self._number, self._seed, self._pool, self._skip_bad = number, seed, pool, skip_bad
        self._shuffled, self.made, self._made_before = shuffled, made, made_before
        mean = max(1, source.size // source.rows)
        self._step = max(1, min(256, BLOCK_BYTES // mean))
        self._ahead = max(1, round(pool.ahead * share)) if pool.ahead else 0
        self._coming: deque[tuple[int, int, np.ndarray, Pending | Block]] = deque()
        self._current: _Block | None = None
        self._orders: dict[int, np.ndarray] = {}
        self._barren = 0

    @property
    def exhausted(self) -> bool:
        return 0 < self.spec.repeats <= self.cursor.epoch

    @property
    def epochs(self) -> float:
        return self.cursor.epoch + self.cursor.position / self.source.rows

    def read(self, tokens: np.ndarray, targets: np.ndarray, packed: bool, starts: np.ndarray | None = None) -> int:
        """Fill the beginning of one row [T]; returns how far. `starts` bool [T] is set where a document begins.

        A packed row is full, documents following one another, unless the task is exhausted. A padded one ends with its
        document, and a longer document goes on in the next row. Raises `DataError` at a bad row, unless those are
        skipped.
        """
        cursor, filled = self.cursor, 0
        while filled < len(tokens) and (current := self._at_cursor()) is not None:
            block, ends, first = current.block, current.ends, cursor.position - current.start
            at = (ends[first - 1] if first else 0) + cursor.skip
            # Documents without a token are passed over.
            here = bisect_right(ends, at)
            stop = ends[-1] if packed or here == len(ends) else ends[here]
            count = min(len(tokens) - filled, stop - at)
            tokens[filled : filled + count] = block.tokens[at : at + count]
            targets[filled : filled + count] = True if block.targets is None else block.targets[at : at + count]
            if starts is not None:
                starts[filled] = True  # the row begins, or a block does
                starts[[filled + end - at for end in ends[here : bisect_left(ends, at + count)]]] = True
            filled, at = filled + count, at + count
            after = bisect_right(ends, at)
            if block.faults:
                self._pass_over(current, first, after)
            cursor.position = current.start + after
            cursor.skip = at - (ends[after - 1] if after else 0) if after < len(ends) else 0
            if cursor.position == self.source.rows:
                cursor.epoch, cursor.position = cursor.epoch + 1, 0
            if filled and not packed:
                break
        cursor.tokens += filled
        cursor.sequences += filled > 0
        return filled

    def prefetch(self) -> None:
        """Ask for the blocks that come next."""
        if self._coming:
            epoch, start = self._coming[-1][0], self._coming[-1][1] + self._step
        elif self._current is not None:
            epoch, start = self._current.epoch, self._current.start + self._step
        else:
            epoch, start = self.cursor.epoch, self.cursor.position - self.cursor.position % self._step
        while len(self._coming) < self._ahead:
            if start >= self.source.rows:
                epoch, start = epoch + 1, 0
            if 0 < self.spec.repeats <= epoch:
                return
            self._coming.append((epoch, start, *self._ask(epoch, start)))
            start += self._step

    def lengths(self) -> Iterator[np.ndarray]:
        """Tokens of each document, in the source's order, by blocks; the cursor stays where it is."""
        coming: deque[Pending | Block] = deque()
        for start in range(0, self.source.rows, self._step):
            coming.append(self._make(np.arange(start, min(start + self._step, self.source.rows)))[1])
            while len(coming) > self._ahead or (coming and start + self._step >= self.source.rows):
                made = coming.popleft()
                yield np.diff((made if isinstance(made, Block) else made.get()).ends, prepend=0)

    def state(self) -> dict[str, Any]:
        return {**vars(self.cursor), "lines": self.source.rows, "size": self.source.size, "made": self.made}

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises `DataError` if the source is not the one that the cursor points into."""
        path = self.spec.path
        if state["lines"] != self.source.rows:
            raise DataError(
                f"{path} has {self.source.rows} lines, and had {state['lines']} when the checkpoint was saved; "
                "put the old file back, or name the new one by another path to start it from its beginning"
            )
        if state["size"] != self.source.size:
            raise DataError(
                f"{path} has {self.source.size} bytes, and had {state['size']} when the checkpoint was saved; "
                "put the old file back, or name the new one by another path to start it from its beginning"
            )
        made = state.get("made", self.made)
        if made == self._made_before != self.made:
            raise DataError(
                f"{path}: its documents had no end token when the checkpoint was saved, and --eos auto puts one now: "
                "go on with --eos no"
            )
        if made != self.made:
            raise DataError(
                f"{path}: its text, template, messages, loss_on, end token (--eos) or chat template is not what it was "
                f"when the checkpoint was saved: {ADVICE}"
            )
        self.start(Cursor(**{key: state[key] for key in vars(self.cursor)}))

    def start(self, cursor: Cursor) -> None:
        """Read on from `cursor`."""
        self.cursor = cursor
        self._coming.clear()
        self._orders.clear()
        self._current, self._barren = None, 0

    def _at_cursor(self) -> _Block | None:
        """The block that the cursor points into; None where the task is exhausted."""
        cursor = self.cursor
        if self.exhausted:
            return None
        start = cursor.position - cursor.position % self._step
        if self._current is None or (self._current.epoch, self._current.start) != (cursor.epoch, start):
            self.prefetch()
            epoch, at, numbers, made = self._coming.popleft() if self._coming else (
                cursor.epoch, start, *self._ask(cursor.epoch, start),
            )  # fmt: skip
            assert (epoch, at) == (cursor.epoch, start)
            block = made if isinstance(made, Block) else made.get()
            self._current = _Block(epoch, at, block, block.ends.tolist(), numbers)
            if block.faults and not self._skip_bad:
                row = min(block.faults)
                raise unusable(self.source.where(int(numbers[row])), block.faults[row])
            self._barren = 0 if len(block.tokens) else self._barren + len(numbers)
            if self._barren >= 2 * self.source.rows:  # fewer may lie between one epoch's only good line and the next's
                raise DataError(f"{self.spec.path}: no line of it gives any token")
            self.prefetch()
        return self._current

    def _ask(self, epoch: int, start: int) -> tuple[np.ndarray, Pending | Block]:
        return self._make(self._order(epoch)[start : start + self._step].astype(np.int64))

    def _make(self, numbers: np.ndarray) -> tuple[np.ndarray, Pending | Block]:
        if hasattr(self.source, "block"):
            return numbers, self.source.block(numbers)
        return numbers, self._pool.submit(self._number, self.source.read(numbers))

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            order = np.arange(self.source.rows, dtype=np.uint32 if self.source.rows < 1 << 32 else np.int64)
            if self._shuffled:
                np.random.default_rng([self._seed, self.cursor.order, epoch]).shuffle(order)
            self._orders[epoch] = order
        return self._orders[epoch]

    def _pass_over(self, current: _Block, first: int, after: int) -> None:
        """Count (and, the first few of the first epoch, name) the bad documents first … after − 1."""
        for row in [row for row in current.block.faults if first <= row < after]:
            self.cursor.bad += 1
            if self.cursor.bad <= SHOWN and current.epoch == 0:
                where = self.source.where(int(current.numbers[row]))
                more = "; further ones are only counted" if self.cursor.bad == SHOWN else ""
                log.warning("skipping %s: %s%s", where, current.block.faults[row], more)


class TaskMixture:
    """Draws sequences of `length` tokens, each from one task, chosen by weight.

    The choice for sequence n depends on `seed`, n and on which tasks are exhausted, so a cursor is a handful of
    integers. `pad` fills rows that a document (or the last of a task) does not fill. `positions`: tell where documents
    lie.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        pool: Pool,
        length: int,
        seed: int,
        *,
        packed: bool = True,
        pad: int = 0,
        positions: bool = False,
        made: Mapping[str, Any] | None = None,
        count: Callable[[Task], int],
    ) -> None:
        """`made`: what makes all tasks' tokens and their order, flag → value; kept in the state, and compared. `count`:
        the tokens, or the padded rows, of a task's epoch."""
        self._made, self.resized = dict(made or {}), False
        self.tasks, self._pool = list(tasks), pool
        self._names = short_names([task.spec.path for task in self.tasks])
        self._length, self._seed, self._packed, self._pad = length, seed, packed, pad
        self._positions = positions
        self._weights = np.array([task.spec.weight for task in self.tasks])
        self._bounds: tuple[list[bool], list[float]] = ([], [])
        self._choices: tuple[int, list[float]] = (-1, [])
        self._count, self._counted = count, list[int]()
        self.drawn = 0

    def draw(self, rows: int) -> Drawn:
        """The next `rows` sequences. Where all tasks have been read as often as they may be, the rest of the rows stays
        blank: padding without a target. Raises `DataError` where that is all of them, or at a line that cannot be used.
        """
        tokens = np.full((rows, self._length), self._pad, dtype=np.int64)
        targets = np.zeros((rows, self._length), dtype=bool)
        starts = np.zeros((rows, self._length), dtype=bool) if self._positions else None
        for number, (row, mask) in enumerate(zip(tokens, targets, strict=True)):
            own = starts[number] if starts is not None else None
            while (task := self._choose()) is not None and not task.read(row, mask, self._packed, own):
                pass  # what was left of that task gave no token: now it is exhausted, and another is chosen
            if task is None and not number:
                raise DataError(
                    f"all tasks have been read as often as their repeats allow, after {self.drawn} sequences: "
                    "lower --total-steps, or raise repeats in --task-config"
                )
            if task is None:
                break
            self.drawn += 1
        return Drawn(tokens, targets, positions_of(starts) if starts is not None else None)

    def sequences(self) -> int:
        """How many sequences hold every task once; a task's last one is filled up from its next epoch."""

        return sum(-(-size // self._length) if self._packed else size for size in self._sizes())

    def most(self) -> int | None:
        """How many sequences there can be in all until every task has been read as often as it may be; None where one
        has no limit."""
        if not all(task.spec.repeats for task in self.tasks):
            return None
        left = 0
        for task, size in zip(self.tasks, self._sizes(), strict=True):
            whole, cursor = task.spec.repeats * size, task.cursor
            left += (
                -(-max(0, whole - cursor.tokens) // self._length) if self._packed else max(0, whole - cursor.sequences)
            )
        return self.drawn + left

    def _sizes(self) -> list[int]:
        """Of each task: the tokens, or the padded rows, of one epoch."""
        if not self._counted:
            self._counted = [self._count(task) for task in self.tasks]
        return self._counted

    def _choose(self) -> Task | None:
        """The task of the next sequence; None where all are exhausted."""
        block, place = divmod(self.drawn, CHOICES)
        if self._choices[0] != block:
            self._choices = block, np.random.default_rng([self._seed, block]).random(CHOICES).tolist()
        exhausted = [task.exhausted for task in self.tasks]
        if all(exhausted):
            return None
        if self._bounds[0] != exhausted:
            left = np.where(exhausted, 0.0, self._weights)
            self._bounds = exhausted, np.cumsum(left / left.sum()).tolist()
        choice = bisect_right(self._bounds[1], self._choices[1][place])
        # The last bound may be a hair below 1.
        return self.tasks[choice if choice < len(exhausted) else max(i for i, out in enumerate(exhausted) if not out)]

    def state(self) -> dict[str, Any]:
        """The cursor, as JSON: under 4 KiB for 20 tasks, however long their paths."""
        tasks = {_short(key): task.state() for key, task in self.keyed()}
        return {"drawn": self.drawn, "made": self._made, "tasks": tasks}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on at a cursor. A task that the cursor does not know starts at its beginning. `resized`: an epoch may now
        hold another number of sequences. Raises `DataError` where the cursor points into other tokens."""
        if "made" not in state:
            log.warning(
                "the checkpoint is of an older version: whether seed, tokenizer and what frames a document are still "
                "the same is not known"
            )
        changed = changes(state.get("made", {}), self._made)
        for line in changed:
            log.warning("%s when the checkpoint was saved: the same tokens in the same order, cut otherwise", line)
        self.drawn = state["drawn"]
        # Before cursors had an order, it was the task's place.
        known = {key: {"order": place, **task} for place, (key, task) in enumerate(state["tasks"].items())}
        unused = itertools.count(1 + max(task["order"] for task in known.values()))
        for key, task in self.keyed():
            if (cursor := known.pop(_short(key), None)) is not None:
                task.load_state(cursor)
            else:
                log.warning("the checkpoint does not know the task %s: it starts at its beginning", key)
                task.start(Cursor(order=next(unused)))
        self.resized = bool(changed or known or len(self.tasks) > len(state["tasks"]))
        if known:
            log.warning("%d task(s) of the checkpoint are not named any more: their place is forgotten", len(known))

    def prefetch(self) -> None:
        for task in self.tasks:
            task.prefetch()

    def shares(self) -> dict[str, dict[str, float]]:
        """Task, by its short name → what it gave since the run's first step: sequences, tokens, epochs, and lines
        skipped if any were."""
        return {
            name: {
                "sequences": task.cursor.sequences,
                "tokens": task.cursor.tokens,
                "epochs": round(task.epochs, 6),
                **({"bad_lines": task.cursor.bad} if task.cursor.bad else {}),
            }
            for name, task in zip(self._names, self.tasks, strict=True)
        }

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()

    def keyed(self) -> Iterator[tuple[str, Task]]:
        """Each task under its path, and under path#2 … where a path comes again."""
        seen: dict[str, itertools.count[int]] = {}
        for task in self.tasks:
            number = next(seen.setdefault(task.spec.path, itertools.count(1)))
            yield (task.spec.path if number == 1 else f"{task.spec.path}#{number}"), task


def _short(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:12]
