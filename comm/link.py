"""The two ends of one directed edge: a group, a lane, a codec, and the order of messages, which is the plan's order."""

from __future__ import annotations

from collections import deque
from functools import partial

import torch
from torch import Tensor

from .codec import Codec
from .group import Group
from .lane import Lane, Ticket


class Sender:
    """The sending end of an edge. `send` returns at once."""

    def __init__(self, group: Group, to: int, codec: Codec, lane: Lane, timeout_s: float) -> None:
        self._group, self._to, self._codec, self._lane, self._timeout_s = group, to, codec, lane, timeout_s

    def send(self, x: Tensor, label: str = "send") -> Ticket:
        """Queue `x`, which must not be written to until the ticket is done."""

        def work() -> None:
            self._group.send(self._codec.encode(x), self._to, timeout_s=self._timeout_s, operation=f"sending {label}")

        return self._lane.submit(work, label=label, uses=x)


class Receiver:
    """The receiving end of an edge. Up to `depth` receives are posted before anyone asks for their results; 0: each
    when it is asked for."""

    def __init__(
        self,
        group: Group,
        source: int,
        codec: Codec,
        lane: Lane,
        timeout_s: float,
        *,
        device: torch.device,
        depth: int = 2,
    ) -> None:
        self._group, self._source, self._codec, self._lane, self._timeout_s = group, source, codec, lane, timeout_s
        self._device, self._depth = device, depth
        self._due: deque[tuple[tuple[int, ...], torch.dtype, str]] = deque()
        self._posted: deque[Ticket] = deque()

    def expect(self, count: int, shape: tuple[int, ...], dtype: torch.dtype, label: str = "receive") -> None:
        """`count` more messages of this shape will come."""
        self._due.extend([(shape, dtype, label)] * count)
        self._top_up()

    def recv(self) -> Ticket:
        """The next message that was expected, as a ticket for its tensor."""
        if not self._posted:
            self._post()
        ticket = self._posted.popleft()
        self._top_up()
        return ticket

    def _top_up(self) -> None:
        while self._due and len(self._posted) < self._depth:
            self._post()

    def _post(self) -> None:
        shape, dtype, label = self._due.popleft()
        self._posted.append(self._lane.submit(partial(self._receive, shape, dtype, label), label=label))

    def _receive(self, shape: tuple[int, ...], dtype: torch.dtype, label: str) -> Tensor:
        wire = torch.empty(self._codec.nbytes(shape, dtype), dtype=torch.uint8, device=self._device)
        self._group.recv(wire, self._source, timeout_s=self._timeout_s, operation=f"receiving {label}")
        return self._codec.decode(wire, shape, dtype, self._device)
