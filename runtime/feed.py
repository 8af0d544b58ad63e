"""From the mixture on rank 0 to the stages that need tokens or labels, one update ahead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..comm.lane import Lane, Ticket
from ..comm.link import Receiver, Sender
from ..comm.topology import Coord, Topology
from ..modules.loss import IGNORED, count_valid
from ..pipeline.executor import Batch
from .config import Config
from .tasks import DataError, TaskMixture


def shift_labels(tokens: Tensor, targets: Tensor | None = None) -> Tensor:
    """[…, T] tokens → […, T] labels: the token that follows, and nothing to predict after the last.

    `targets` […, T] bool: which tokens are to be predicted at all [every one].
    """
    wanted = tokens if targets is None else tokens.masked_fill(~targets, IGNORED)
    return torch.cat([wanted[..., 1:], torch.full_like(tokens[..., :1], IGNORED)], dim=-1)


def message_shape(rows: int, length: int) -> tuple[int]:
    """Of what travels to a stage: the number of valid targets of the whole update, then the rows."""
    return (1 + rows * length,)


def pack(rows: Tensor, valid: int) -> Tensor:
    return torch.cat([torch.tensor([valid]), rows.reshape(-1)]).to(torch.int32)


def unpack(message: Tensor, length: int) -> tuple[Tensor, int]:
    return message[1:].view(-1, length).to(torch.int64), int(message[0])


@dataclass(frozen=True)
class Ends:
    """This rank's ends of the data's edges. Senders (on rank 0) by destination rank; at most one receiver a kind."""

    tokens_to: dict[int, Sender]
    labels_to: dict[int, Sender]
    tokens_from: Receiver | None = None
    labels_from: Receiver | None = None


class Feed:
    """The batches of one update after another. While one is computed, the next is drawn and sent."""

    def __init__(
        self, config: Config, topology: Topology, ends: Ends, updates: int, mixture: TaskMixture | None, lane: Lane
    ) -> None:
        self._config, self._topology, self._ends = config, topology, ends
        self._mixture, self._lane = mixture, lane
        self._left = updates
        self.shares: dict[str, Any] = {}
        """On rank 0: what each task has given, up to and with the update that `next_update` gave last."""
        self._ahead: Ticket | None = None
        self._prefetch()

    def next_update(self) -> tuple[list[Batch], dict[str, Any] | None]:
        """The update's batches, one an accumulation step, and (on rank 0) the cursor behind them."""
        local: list[Batch] = []
        cursor = None
        if self._ahead is not None:
            local, cursor, self.shares = self._ahead.get()
        length = self._config.seq_length
        batches = []
        for step in range(self._config.gradient_accumulate_step):
            here = local[step] if local else Batch(None, None, 0)
            tokens, labels, valid = here.tokens, here.labels, here.valid
            if self._ends.tokens_from is not None:
                tokens, valid = unpack(self._ends.tokens_from.recv().get(), length)
            if self._ends.labels_from is not None:
                labels, valid = unpack(self._ends.labels_from.recv().get(), length)
            batches.append(Batch(tokens, labels, valid))
        self._prefetch()
        return batches, cursor

    def close(self) -> None:
        """Take what is under way, so that no end is left waiting."""
        self._left = 0
        if self._pending:
            self.next_update()

    def _prefetch(self) -> None:
        self._pending = self._left > 0
        self._ahead = None
        if not self._pending:
            return
        self._left -= 1
        shape = message_shape(self._config.batch_size, self._config.seq_length)
        for end in (self._ends.tokens_from, self._ends.labels_from):
            if end is not None:
                end.expect(self._config.gradient_accumulate_step, shape, torch.int32, "data")
        if self._mixture is not None:
            self._ahead = self._lane.submit(self._draw, label="draw")

    def _draw(self) -> tuple[list[Batch], dict[str, Any], dict[str, Any]]:
        """On rank 0: the whole update's rows, each replica's share on its way, this rank's own share as the result."""
        assert self._mixture is not None
        c, grid = self._config, self._topology
        drawn = self._mixture.draw(c.gradient_accumulate_step * grid.replicas * c.batch_size)
        rows = torch.from_numpy(drawn.tokens)
        targets = shift_labels(rows, torch.from_numpy(drawn.targets))
        valid = count_valid(targets)
        if not valid:
            raise DataError(
                f"{len(rows)} sequences hold no token to predict, at sequence {self._mixture.drawn}: "
                "check loss_on and the completions of --task-config, or take a longer --seq-length"
            )
        shape = (c.gradient_accumulate_step, grid.replicas, c.batch_size, c.seq_length)
        local = []
        for step, step_labels in zip(rows.view(shape), targets.view(shape), strict=True):
            for replica, (tokens, labels) in enumerate(zip(step, step_labels, strict=True)):
                first, last = grid.rank(Coord(replica, 0)), grid.rank(Coord(replica, grid.stages - 1))
                if first != 0:
                    self._ends.tokens_to[first].send(pack(tokens, valid), "data")
                if last != 0:
                    self._ends.labels_to[last].send(pack(labels, valid), "data")
                if first == 0:
                    local.append(Batch(tokens, labels if last == 0 else None, valid))
        return local, self._mixture.state(), self._mixture.shares()
