"""Evaluation on held-out text: every target once, and the same number on every grid.

Rank 0 reads the file, packs its documents in order, and deals each batch to the replicas over the training data's
edges. A target weighs the same wherever it stands: the sum over all targets is divided once.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..comm.lane import Lane
from ..comm.topology import Topology
from ..modules.loss import IGNORED, count_valid
from ..pipeline.executor import Batch, Executor
from .config import Config
from .feed import Arriving, Ends, deal, shift_labels
from .tasks import DataError
from .trainer import Diverged, Vote


@dataclass(frozen=True)
class HeldOut:
    """Rank 0's evaluation set: [batches, replicas, rows, T] tokens and labels, int32. `digest` names its text,
    however it is cut into batches."""

    tokens: Tensor
    labels: Tensor
    digest: int

    @property
    def size(self) -> tuple[int, int]:
        """Batches, and targets in all: what every rank must know."""
        return len(self.tokens), count_valid(self.labels)


def documents(path: Path) -> Iterator[str]:
    """The texts of a jsonl file in its order. Raises `DataError`."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield text_of(line, f"{path}:{number}")
    except OSError as error:
        raise DataError(f"--evaluation-data: cannot read {path}: {error.strerror}") from error


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


def open_held_out(config: Config, topology: Topology, encode: Callable[[str], Sequence[int]]) -> HeldOut | None:
    """Read --evaluation-data: each document once, framed and packed as training data is. The last row and the
    last batch are filled up with positions that count for nothing. Raises `DataError`."""
    if not config.evaluation_data:
        return None
    path, length = Path(config.evaluation_data), config.seq_length
    shape = (topology.replicas, config.batch_size, length)
    most = config.evaluation_num_batch * math.prod(shape)
    tokens: list[int] = []
    for text in documents(path):
        tokens += encode(text)
        if most and len(tokens) >= most:
            del tokens[most:]
            break
    batches = -(-len(tokens) // math.prod(shape))
    filled = torch.zeros(batches * math.prod(shape), dtype=torch.int32)
    filled[: len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
    labels = shift_labels(filled.view(-1, length))
    labels.view(-1)[max(len(tokens) - 1, 0) :] = IGNORED
    held_out = HeldOut(
        filled.view(batches, *shape), labels.view(batches, *shape), zlib.crc32(filled[: len(tokens)].numpy().data)
    )
    if held_out.size[1] == 0:
        raise DataError(f"--evaluation-data: {path} holds no token that follows another")
    return held_out


class Evaluation:
    """Measures the loss of the weights as they are. `size` is that of rank 0's set, which told it to all."""

    def __init__(
        self,
        config: Config,
        topology: Topology,
        ends: Ends,
        lane: Lane,
        executor: Executor,
        vote: Vote,
        size: tuple[int, int],
        held_out: HeldOut | None,
    ) -> None:
        self._config, self._topology, self._ends, self._lane = config, topology, ends, lane
        self._executor, self._vote, self._held_out = executor, vote, held_out
        self._batches, self._valid = size

    def loss(self, update: int) -> float:
        """Σ cross-entropy ÷ targets, the same bits on every rank; all ranks call it after the same update.

        Raises `Diverged` where it is not a finite number.
        """
        c = self._config
        arriving = Arriving(self._ends, self._batches, c.batch_size, c.seq_length)
        # On rank 0, one batch ahead; in the data's lane, since rows of the next update may still be on their way.
        ahead = self._lane.submit(partial(self._deal, 0), label="deal")
        loss_sum = 0.0
        for number in range(self._batches):
            own = ahead.get()
            if number + 1 < self._batches:
                ahead = self._lane.submit(partial(self._deal, number + 1), label="deal")
            loss_sum += float(self._executor.step(arriving.next(own)))
        loss = self._vote.cast(update, 0.0, loss_sum, False).loss_sum / self._valid
        if not math.isfinite(loss):
            raise Diverged(
                f"evaluation after update {update}: the loss is {loss}. Try a lower --lr or a longer --warmup-steps, "
                "and go on from the latest checkpoint"
            )
        return loss

    def _deal(self, number: int) -> Batch | None:
        if self._held_out is None:
            return None
        tokens, labels = (x[number].long() for x in (self._held_out.tokens, self._held_out.labels))
        return deal(self._topology, self._ends, tokens, labels, self._valid)
