"""The two ends of one directed edge: a group, a lane, a codec, and the order of messages, which is the plan's order."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from .codecs.codec import Codec
from .groups.group import Group
from .lanes.lane import Lane, Ticket
from .lanes.staging import host_memory, to_device


class Sender:
    """The sending end of an edge. `send` returns at once."""

    def __init__(self, group: Group, to: int, codec: Codec, lane: Lane, timeout_s: float) -> None:
        self._group, self._to, self._codec, self._lane, self._timeout_s = group, to, codec, lane, timeout_s

    def send(self, x: Tensor, label: str = "send") -> Ticket:
        """Queue `x`, which must not be written to until the ticket is done."""

        def work() -> None:
            self._group.send(self._codec.encode(x), self._to, timeout_s=self._timeout_s, operation=f"sending {label}")

        return self._lane.submit(work, label=label, uses=x)


WINDOW = 8 * 2**20
"""Bytes for which a receiver asks ahead. A message leaves only when the sender has heard that it is expected: with less
than rate × round trip the link stands idle. This is 300 Mbit/s × 200 ms."""


class Receiver:
    """The receiving end of an edge. Before anyone asks for their results, `depth` receives are posted, and more while
    they fit into `window` bytes; with a depth of 0, each when it is asked for."""

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
        window: int = 0,
    ) -> None:
        self._group, self._source, self._codec, self._lane, self._timeout_s = group, source, codec, lane, timeout_s
        self._device, self._depth, self._window = device, depth, window
        self._due: deque[tuple[tuple[int, ...], torch.dtype, str]] = deque()
        self._posted: deque[tuple[Ticket, int]] = deque()

    def expect(self, count: int, shape: tuple[int, ...], dtype: torch.dtype, label: str = "receive") -> None:
        """`count` more messages of this shape will come."""
        self._due.extend([(shape, dtype, label)] * count)
        self._top_up()

    def recv(self) -> Ticket:
        """The next message that was expected, as a ticket for its tensor."""
        if not self._posted:
            self._post()
        ticket, _ = self._posted.popleft()
        self._top_up()
        return ticket

    def _top_up(self) -> None:
        while self._due and self._depth > 0:
            ahead = sum(nbytes for _, nbytes in self._posted) + self._codec.nbytes(*self._due[0][:2])
            if len(self._posted) >= self._depth and ahead > self._window:
                return
            self._post()

    def _post(self) -> None:
        shape, dtype, label = self._due.popleft()
        nbytes, operation = self._codec.nbytes(shape, dtype), f"receiving {label}"
        # Asked for now, and not when the lane comes to it: until the sender knows takes half a round trip.
        arriving = None
        if self._depth > 0:
            wire = host_memory(nbytes, self._device)
            arriving = wire, self._group.post(wire, self._source, operation=operation)

        def work() -> Tensor:
            if arriving is not None:
                wire, arrive = arriving
                arrive(self._timeout_s)
                wire = to_device(wire, self._device)
            else:
                wire = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
                self._group.recv(wire, self._source, timeout_s=self._timeout_s, operation=operation)
            return self._codec.decode(wire, shape, dtype, self._device)

        # A message uses nothing that was computed here, and its memory is the lane's own: the allocator hands a block
        # of the lane's stream to that stream alone, and one that another has used only when that is done with it. So it
        # comes in while the device computes what was queued before.
        self._posted.append((self._lane.submit(work, label=label, after_caller=False), nbytes))
