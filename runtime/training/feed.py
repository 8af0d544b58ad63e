"""From the mixture on rank 0 to the stages that need tokens or labels, one update ahead."""

from __future__ import annotations

import logging
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...comm.lanes.lane import Lane, Ticket
from ...comm.link import Receiver, Sender
from ...comm.topology import Coord, Topology
from ...modules.loss import IGNORED, count_valid
from ...pipeline.executor import Batch
from ..data.mixture import SHOWN, DataError, Drawn, TaskMixture
from ..flags.config import Config
from .show_data import ShowData

BARREN = 100  # draws in a row without a token to predict, after which the run ends

log = logging.getLogger("farspan")


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
    """This rank's ends of the data's edges. Senders (on rank 0) by destination rank; at most one receiver a kind.

    Tokens go to first stages and labels to last ones; positions go to all, with --document-mask alone.
    """

    tokens_to: dict[int, Sender]
    labels_to: dict[int, Sender]
    positions_to: dict[int, Sender] = field(default_factory=dict)
    tokens_from: Receiver | None = None
    labels_from: Receiver | None = None
    positions_from: Receiver | None = None


def deal(
    grid: Topology, ends: Ends, tokens: Tensor, labels: Tensor, valid: int, positions: Tensor | None = None
) -> Batch:
    """On rank 0: send each replica its share of tokens, labels and positions, each [replicas, rows, T]; this rank's is
    the result."""
    own = Batch(None, None, valid)
    for rank, end in ends.positions_to.items():
        assert positions is not None
        end.send(pack(positions[grid.coord(rank).replica], valid), "data")
    for replica in range(grid.replicas):
        first, last = grid.rank(Coord(replica, 0)), grid.rank(Coord(replica, grid.stages - 1))
        if first != 0:
            ends.tokens_to[first].send(pack(tokens[replica], valid), "data")
        if last != 0:
            ends.labels_to[last].send(pack(labels[replica], valid), "data")
        if first == 0:
            own = Batch(
                tokens[replica],
                labels[replica] if last == 0 else None,
                valid,
                positions[replica] if positions is not None else None,
            )
    return own


class Arriving:
    """`count` batches that come over this rank's edges. All receives are queued at once, so that what is expected
    later comes later."""

    def __init__(self, ends: Ends, count: int, rows: int, length: int) -> None:
        self._length = length
        self._tokens = self._take(ends.tokens_from, count, rows)
        self._labels = self._take(ends.labels_from, count, rows)
        self._positions = self._take(ends.positions_from, count, rows)

    def next(self, own: Batch | None) -> Batch:
        """The next batch; on rank 0, with what it kept of it."""
        batch = own or Batch(None, None, 0)
        tokens, labels, valid, positions = batch.tokens, batch.labels, batch.valid, batch.positions
        if self._tokens is not None:
            tokens, valid = unpack(self._tokens.popleft().get(), self._length)
        if self._labels is not None:
            labels, valid = unpack(self._labels.popleft().get(), self._length)
        if self._positions is not None:
            positions, valid = unpack(self._positions.popleft().get(), self._length)
        return Batch(tokens, labels, valid, positions)

    def _take(self, end: Receiver | None, count: int, rows: int) -> deque[Ticket] | None:
        if end is None:
            return None
        end.expect(count, message_shape(rows, self._length), torch.int32, "data")
        return deque(end.recv() for _ in range(count))


class Feed:
    """The batches of one update after another. While one is computed, the next is drawn and sent."""

    def __init__(
        self,
        config: Config,
        topology: Topology,
        ends: Ends,
        updates: int,
        mixture: TaskMixture | None,
        lane: Lane,
        show: ShowData | None = None,
    ) -> None:
        self._show = show
        self._config, self._topology, self._ends = config, topology, ends
        self._mixture, self._lane = mixture, lane
        self._left, self._barren = updates, 0
        self.shares: dict[str, Any] = {}
        """On rank 0: what each task has given, up to and with the update that `next_update` gave last."""
        self._ahead: Ticket | None = None
        self._arriving: Arriving | None = None
        self._prefetch()

    def next_update(self) -> tuple[list[Batch], dict[str, Any] | None]:
        """The update's batches, one an accumulation step, and (on rank 0) the cursor behind them."""
        local: list[Batch] = []
        cursor = None
        assert self._arriving is not None
        if self._ahead is not None:
            drawn = self._ahead.get()
            if isinstance(drawn, DataError):
                raise drawn
            local, cursor, self.shares, row = drawn
            if self._show is not None:
                self._show(self._config.updates - self._left, *row)
        steps = range(self._config.gradient_accumulate_step)
        batches = [self._arriving.next(local[step] if local else None) for step in steps]
        self._prefetch()
        return batches, cursor

    def close(self) -> None:
        """Take what is under way, so that no end is left waiting. What data nobody needs is like does not matter."""
        self._left = 0
        if self._arriving is not None:
            try:
                self.next_update()
            except DataError as error:
                log.debug("the update after the last could not be drawn: %s", error)

    def _prefetch(self) -> None:
        self._arriving = self._ahead = None
        if self._left <= 0:
            return
        self._left -= 1
        c = self._config
        self._arriving = Arriving(self._ends, c.gradient_accumulate_step, c.batch_size, c.seq_length)
        if self._mixture is not None:
            self._ahead = self._lane.submit(self._draw, label="draw")

    def _draw(self) -> tuple[list[Batch], dict[str, Any], dict[str, Any], tuple[Tensor, Tensor]] | DataError:
        """On rank 0: the whole update's rows, each replica's share on its way, this rank's own share as the result;
        cursor and shares behind them; tokens and labels of the first row with a target.

        Or why there are none. That is told where they are needed; what the others wait for is blank meanwhile, so that
        what is dealt after it (an evaluation, say) still comes where it is expected.
        """
        assert self._mixture is not None
        c, grid = self._config, self._topology
        shape = (c.gradient_accumulate_step, grid.replicas, c.batch_size, c.seq_length)
        problem = None
        try:
            drawn, labels = self._draw_targets(math.prod(shape[:3]))
        except DataError as error:
            blank = np.zeros((math.prod(shape[:3]), c.seq_length), dtype=np.int64)
            problem, drawn = error, Drawn(blank, blank, blank if c.document_mask else None)
            labels = torch.full(blank.shape, IGNORED)
        valid = max(1, count_valid(labels))
        positions = torch.from_numpy(drawn.positions).view(shape) if drawn.positions is not None else [None] * shape[0]
        steps = zip(torch.from_numpy(drawn.tokens).view(shape), labels.view(shape), positions, strict=True)
        local = [deal(grid, self._ends, tokens, own, valid, where) for tokens, own, where in steps]
        first = int((labels != IGNORED).any(1).int().argmax())
        row = torch.from_numpy(drawn.tokens[first]), labels[first]
        return problem or (local, self._mixture.state(), self._mixture.shares(), row)

    def _draw_targets(self, rows: int) -> tuple[Drawn, Tensor]:
        """The next `rows` sequences that hold a token to predict, and their labels [rows, T]; others are passed over.

        Raises `DataError`, also where none comes.
        """
        assert self._mixture is not None
        for _ in range(BARREN):
            drawn = self._mixture.draw(rows)
            labels = shift_labels(torch.from_numpy(drawn.tokens), torch.from_numpy(drawn.targets))
            if count_valid(labels):
                return drawn, labels
            self._barren += 1
            if self._barren <= SHOWN:
                log.warning(
                    "passing over %d sequences without a token to predict, up to sequence %d: such are not rare with a "
                    "small batch where loss_on is completion%s",
                    rows, self._mixture.drawn, "; further ones are not told" if self._barren == SHOWN else "",
                )  # fmt: skip
        raise DataError(
            f"{BARREN * rows} sequences in a row hold no token to predict, up to sequence {self._mixture.drawn}: "
            "check loss_on and the completions of --task-config, or take a longer --seq-length"
        )
