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

from ...comm.lanes.lane import Lane
from ...comm.topology import Topology
from ...modules.loss import count_valid
from ...pipeline.executor import Batch, Executor
from ..data.mixture import DataError, Drawn, positions_of
from ..data.open_tasks import held_out_specs, open_each
from ..data.tokenizer import Vocabulary
from ..flags.config import Config
from .feed import Arriving, Ends, deal, shift_labels
from .trainer import Diverged, Vote


@dataclass(frozen=True)
class HeldOut:
    """Rank 0's evaluation set: [batches, replicas, rows, T] tokens, labels and (with --document-mask) positions, int32.
    `digest` names its tokens and targets, however they are cut into rows and batches."""

    tokens: Tensor
    labels: Tensor
    digest: int
    positions: Tensor | None = None

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
        drawn, digest = _read(config, vocabulary, math.prod(shape[:2]))
        tokens = torch.from_numpy(drawn.tokens)
        labels = shift_labels(tokens, torch.from_numpy(drawn.targets))
        if not count_valid(labels):
            raise DataError(f"{config.evaluation_data} holds no token that follows another and is to be predicted")
    except DataError as error:
        raise type(error)(f"--evaluation-data: {error}") from error
    positions = torch.from_numpy(drawn.positions).view(-1, *shape) if drawn.positions is not None else None
    return HeldOut(tokens.view(-1, *shape), labels.view(-1, *shape), digest, positions)


def _read(config: Config, vocabulary: Vocabulary, in_batch: int) -> tuple[Drawn, int]:
    """All rows (as int32) in whole batches of `in_batch`, and the digest."""
    most, length = config.evaluation_num_batch * in_batch, config.seq_length
    tasks, pool = open_each(held_out_specs(config.evaluation_data), config, vocabulary, shuffled=False)
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    digest = 0

    def blank() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return np.full(length, vocabulary.pad, dtype=np.int32), np.zeros(length, bool), np.zeros(length, bool)

    try:
        for task in tasks:
            while not task.exhausted and not (most and len(rows) == most):
                tokens, targets, starts = row = blank()
                if filled := task.read(tokens, targets, config.rows == "packed", starts):
                    digest = zlib.crc32(np.where(targets, tokens, ~tokens)[:filled].data, digest)
                    rows.append(row)
    finally:
        pool.close()
    rows += [blank()] * (-len(rows) % in_batch)
    tokens, targets, starts = map(np.stack, zip(*rows, strict=True))
    positions = positions_of(starts).astype(np.int32) if config.document_mask else None
    return Drawn(tokens, targets, positions), digest


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
        held_out = self._held_out
        tokens, labels = held_out.tokens[number].long(), held_out.labels[number].long()
        positions = held_out.positions[number].long() if held_out.positions is not None else None
        return deal(self._topology, self._ends, tokens, labels, self._valid, positions)
