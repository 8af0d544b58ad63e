"""Evaluation on held-out text: every target once, and the same number on every grid.

Rank 0 reads its tasks, one after another and each in order, and deals each batch to the replicas over the edges of the
training data. A target weighs the same wherever it stands: the sum over all targets is divided once.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..comm.lane import Lane
from ..comm.topology import Topology
from ..modules.loss import count_valid
from ..pipeline.executor import Batch, Executor
from .config import Config
from .feed import Arriving, Ends, deal, shift_labels
from .open_tasks import held_out_specs, open_each
from .tasks import DataError
from .tokenizer import Vocabulary
from .trainer import Diverged, Vote


@dataclass(frozen=True)
class HeldOut:
    """Rank 0's evaluation set: [batches, replicas, rows, T] tokens and labels, int32. `digest` names its tokens and
    targets, however they are cut into rows and batches."""

    tokens: Tensor
    labels: Tensor
    digest: int

    @property
    def size(self) -> tuple[int, int]:
        """Batches, and targets in all: what every rank must know."""
        return len(self.tokens), count_valid(self.labels)


def open_held_out(config: Config, topology: Topology, vocabulary: Vocabulary) -> HeldOut | None:
    """Read --evaluation-data: each document once, framed and laid into rows as training data is. The last row of a
    task and the last batch are filled up with positions that count for nothing. Raises `DataError`."""
    if not config.evaluation_data:
        return None
    shape = (topology.replicas, config.batch_size, config.seq_length)
    try:
        tokens, targets, digest = _read(config, vocabulary, math.prod(shape[:2]))
        labels = shift_labels(tokens, targets)
        if not count_valid(labels):
            raise DataError(f"{config.evaluation_data} holds no token that follows another and is to be predicted")
    except DataError as error:
        raise DataError(f"--evaluation-data: {error}") from error
    return HeldOut(tokens.view(-1, *shape), labels.view(-1, *shape), digest)


def _read(config: Config, vocabulary: Vocabulary, in_batch: int) -> tuple[Tensor, Tensor, int]:
    """Tokens int32 and targets bool, [rows, T], in whole batches of `in_batch` rows; and the digest."""
    most, length = config.evaluation_num_batch * in_batch, config.seq_length
    tasks, pool = open_each(held_out_specs(config.evaluation_data), config, vocabulary, shuffled=False)
    rows: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    digest = 0
    try:
        for task in tasks:
            while not task.exhausted and not (most and len(rows) == most):
                row, mask = np.full(length, vocabulary.pad, dtype=np.int32), np.zeros(length, dtype=bool)
                if filled := task.read(row, mask, config.rows == "packed"):
                    digest = zlib.crc32(np.where(mask, row, ~row)[:filled].data, digest)
                    rows.append(row)
                    masks.append(mask)
    finally:
        pool.close()
    more = -len(rows) % in_batch
    rows += [np.full(length, vocabulary.pad, dtype=np.int32)] * more
    masks += [np.zeros(length, dtype=bool)] * more
    return torch.from_numpy(np.stack(rows)), torch.from_numpy(np.stack(masks)), digest


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
