"""What a communicator can do, whichever library carries the bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class Group(Protocol):
    """Some ranks that talk over one interface. Peers are named by their global rank.

    Every call blocks until it is done, and raises `PeerLost` or `LinkTimeout` at the latest after `timeout_s` seconds;
    where the library works on a CUDA stream, it only queues the work there, and a watchdog has the deadline.
    After an error the group is dead: every further call fails at once.
    Tensors are contiguous, and lie in host memory or on the process's device.
    """

    name: str
    rank: int
    members: tuple[int, ...]
    interface: str
    ahead: int
    """How many receives may be posted before anyone needs their results."""

    @property
    def size(self) -> int: ...

    def send(self, x: Tensor, to: int, *, timeout_s: float, operation: str = "send") -> None: ...

    def recv(self, out: Tensor, source: int, *, timeout_s: float, operation: str = "receive") -> None: ...

    def post(self, out: Tensor, source: int, *, operation: str = "receive") -> Callable[[float], None]:
        """Ask for the next message ahead of time, into `out` in host memory, where `ahead` is not 0. The call of what
        is returned waits for it, for so many seconds; waits come in the order of the posts."""
        ...

    def all_reduce(self, x: Tensor, *, timeout_s: float, operation: str = "all-reduce") -> None:
        """Sums `x` over the group, in place; every member ends with the same bits."""
        ...

    def reduce_scatter(self, x: Tensor, *, timeout_s: float, operation: str = "reduce-scatter") -> None:
        """`x` [size × n]: the n elements at this member's place become their sum over the group, added in the members'
        order wherever they lie; the other places are left as they are."""
        ...

    def all_gather(self, x: Tensor, *, timeout_s: float, operation: str = "all-gather") -> None:
        """`x` [size × n]: each member brings the n elements at its own place, in place; all end with all of them."""
        ...

    def broadcast(self, x: Tensor, source: int, *, timeout_s: float, operation: str = "broadcast") -> None: ...

    def barrier(self, *, timeout_s: float, operation: str = "barrier") -> None: ...

    def close(self) -> None: ...


def only_other(members: tuple[int, ...], rank: int) -> int | None:
    """The one other member where there is just one: then even a collective's failure can be blamed."""
    others = [member for member in members if member != rank]
    return others[0] if len(others) == 1 else None


def add_in_order(places: Tensor, arrived: Tensor, own: int) -> None:
    """The end of a reduce-scatter: `places[own]` [n] becomes its sum with `arrived[m]` of all others m, in the members'
    order. Both [size × n]; `arrived[own]` is free."""
    arrived[own] = places[own]
    places[own] = arrived[0]
    for other in arrived[1:]:
        places[own] += other
