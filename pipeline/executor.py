"""Walks one row of a lowered plan. One loop for every stage; training and evaluation differ in the plan alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..comm.lanes.lane import Recorder, Ticket
from ..comm.lanes.staging import to_device
from ..comm.lanes.stopwatch import stopwatch
from ..comm.link import Receiver, Sender
from .schedule import Op, Row, trains
from .stage import Stage


@dataclass(frozen=True)
class Batch:
    """One replica's share of an accumulation step. `tokens` is needed by a first stage, `labels` by a last one.

    Both are [rows, T] int64; labels are shifted already, −100 where there is no target. `valid` counts the targets of
    the whole global batch: all replicas and all accumulation steps of the update. `positions` [rows, T] int64, of each
    token in its document, are needed by every stage, or (where documents of a row see one another) by none.
    """

    tokens: Tensor | None
    labels: Tensor | None
    valid: int
    positions: Tensor | None = None


@dataclass(frozen=True)
class Edges:
    """A stage's neighbours; None where there is none."""

    from_previous: Receiver | None = None
    to_previous: Sender | None = None
    from_next: Receiver | None = None
    to_next: Sender | None = None


class Executor:
    """Runs steps of `row` on `stage`, with micro-batches of `micro_rows` × `length` tokens.

    A row without a backward evaluates: no gradients, no dropout, and no activation outlives its message.
    """

    def __init__(
        self, stage: Stage, row: Row, edges: Edges, micro_rows: int, length: int, record: Recorder | None = None
    ) -> None:
        self._stage, self._row, self._edges = stage, row, edges
        self.watch = stopwatch(record, stage.device)
        self._trains = trains(row)
        self._micro_rows = micro_rows
        self._shape = (micro_rows, length, stage.spec.width)
        self._micro_batches = sum(action.op is Op.FORWARD for action in row)
        self._sending: list[Ticket] = []

    def step(self, batch: Batch, seed: int = 0, scale: float = 1.0) -> Tensor:
        """One accumulation step; gradients are added to what is there. Returns Σ cross-entropy [] in float64 (0 unless
        this is a last stage). `seed` names the step and the replica, for dropout. `scale` multiplies all gradients.

        The loop only ever waits for a message that it is about to use: sends leave by their own lanes, and receives
        were posted at the start. On a CUDA device it is the stream that waits, and nothing here makes the host wait.
        """
        self._stage.train(self._trains)
        with torch.set_grad_enabled(self._trains):
            return self._walk(batch, seed, scale)

    def _walk(self, batch: Batch, seed: int, scale: float) -> Tensor:
        stage, edges, watch = self._stage, self._edges, self.watch
        watch.settle()
        for ticket in self._sending:  # of the step before
            ticket.get()
        self._sending.clear()
        self._expect(Op.RECV_F, edges.from_previous, "activations")
        self._expect(Op.RECV_B, edges.from_next, "gradients")
        live: dict[int, tuple[Tensor, Tensor]] = {}
        arriving: dict[int, Ticket] = {}
        loss_sum = torch.zeros((), dtype=torch.float64, device=stage.device if stage.is_last else "cpu")
        for action in self._row:
            op, _, mb = action
            match op:
                case Op.RECV_F:
                    assert edges.from_previous is not None
                    arriving[mb] = edges.from_previous.recv()
                case Op.FORWARD:
                    x = arriving.pop(mb).get() if mb in arriving else self._rows(batch.tokens, mb)
                    if self._trains and not stage.is_first:
                        x.requires_grad_()
                    start = watch.start()
                    labels = self._rows(batch.labels, mb) if stage.is_last else None
                    positions = self._rows(batch.positions, mb) if batch.positions is not None else None
                    y = stage(x, seed * self._micro_batches + mb, labels, positions)
                    if stage.is_last:
                        loss_sum += y.detach().double()
                        y = y / batch.valid * scale
                    if self._trains or not stage.is_last:
                        live[mb] = x, y
                    watch.stop("forward", str(action), start)
                case Op.SEND_F:
                    assert edges.to_next is not None
                    self._sending.append(edges.to_next.send(live[mb][1].detach(), "activations"))
                    if not self._trains:
                        del live[mb]
                case Op.RECV_B:
                    assert edges.from_next is not None
                    arriving[mb] = edges.from_next.recv()
                case Op.BACKWARD:
                    x, y = live[mb]
                    grad = arriving.pop(mb).get() if mb in arriving else None
                    start = watch.start()
                    torch.autograd.backward(y, grad)
                    if stage.is_first:
                        del live[mb]
                    watch.stop("backward", str(action), start)
                case Op.SEND_B:
                    assert edges.to_previous is not None
                    grad = live.pop(mb)[0].grad
                    assert grad is not None
                    self._sending.append(edges.to_previous.send(grad, "gradients"))
        return loss_sum

    def _expect(self, op: Op, end: Receiver | None, label: str) -> None:
        count = sum(action.op is op for action in self._row)
        if count:
            assert end is not None
            end.expect(count, self._shape, self._stage.dtype, label)

    def _rows(self, x: Tensor | None, mb: int) -> Tensor:
        assert x is not None
        return to_device(x[mb * self._micro_rows : (mb + 1) * self._micro_rows], self._stage.device)
