"""Gloo groups, built directly so that each has its own device on its own interface.

`init_process_group` and `new_group` ignore a Gloo group's options, so the interface cannot be chosen through them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import PrefixStore, Store, Work

from ..errors import InterfaceError, LinkTimeout, PeerLost, WireError
from ..lanes.staging import placed
from .group import add_in_order, only_other

# Members ask a store that can for all others' addresses at once, and not for one after the other.
os.environ.setdefault("GLOO_ENABLE_STORE_V2_API", "1")
# torch ships no types for this class's methods.
ProcessGroupGloo: Any = torch.distributed.ProcessGroupGloo
_HOST = torch.device("cpu")
SMALL = 64 * 2**10
"""Bytes that a member may send to have a sum in one round trip."""


def _reason(error: RuntimeError | TimeoutError) -> str:
    """Gloo's own words, without the place in its source and the advice behind them."""
    return str(error).partition("\n")[0].split("] ", 1)[-1].partition(". ")[0][:200]


def _is_timeout(error: RuntimeError | TimeoutError) -> bool:
    said = str(error).lower()
    # Where a connection is refused, the process is gone: Gloo says that it "timed out" after its last attempt.
    return "refused" not in said and (isinstance(error, TimeoutError) or "timed out" in said or "timeout" in said)


class GlooGroup:
    """A `Group` over Gloo. Two groups never share a connection, so they never block each other.

    Creating one blocks until all members have come, at most `timeout_s` seconds. What lies on a CUDA device goes
    through pinned memory, queued on the current stream.
    """

    ahead = 2

    def __init__(
        self, store: Store, name: str, members: tuple[int, ...], rank: int, interface: str, timeout_s: float
    ) -> None:
        self.name, self.members, self.rank, self.interface = name, members, rank, interface
        self._other = only_other(members, rank)
        options = ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=timeout_s)
        try:
            options._devices = [ProcessGroupGloo.create_device(interface=interface)]
        except RuntimeError as error:
            raise InterfaceError(f"rank {rank}: Gloo cannot use the interface {interface}: {_reason(error)}") from error
        with self._errors("connecting", self._other):
            self._pg = ProcessGroupGloo(PrefixStore(name, store), members.index(rank), len(members), options)

    @property
    def size(self) -> int:
        return len(self.members)

    def send(self, x: Tensor, to: int, *, timeout_s: float, operation: str = "send") -> None:
        with placed(x, _HOST, write=False) as host:
            self._run(lambda: self._pg.send([host], self.members.index(to), 0), to, timeout_s, operation)

    def recv(self, out: Tensor, source: int, *, timeout_s: float, operation: str = "receive") -> None:
        with placed(out, _HOST, read=False) as host:
            self.post(host, source, operation=operation)(timeout_s)

    def post(self, out: Tensor, source: int, *, operation: str = "receive") -> Callable[[float], None]:
        operation = f"{operation} in group {self.name}"
        with self._errors(operation, source):
            work = self._pg.recv([out], self.members.index(source), 0)

        def arrive(timeout_s: float) -> None:
            with self._errors(operation, source):
                work.wait(timedelta(seconds=timeout_s))

        return arrive

    def all_reduce(self, x: Tensor, *, timeout_s: float, operation: str = "all-reduce") -> None:
        # Without a deadline of their own, collectives take the one for connecting, and go on when the wait has ended.
        limit = timedelta(seconds=timeout_s)
        with placed(x, _HOST) as host:
            if (self.size - 1) * host.nbytes <= SMALL:
                self._sum_at_once(host, timeout_s, operation)
            else:
                self._run(lambda: self._pg.allreduce(host, timeout=limit), self._other, timeout_s, operation)

    def reduce_scatter(self, x: Tensor, *, timeout_s: float, operation: str = "reduce-scatter") -> None:
        # Gloo's own is an all-reduce that throws most of its result away.
        with placed(x, _HOST) as host:
            places = host.view(self.size, -1)
            arriving = torch.empty_like(places)
            self._exchange(places, arriving, timeout_s, operation)
            add_in_order(places, arriving, self.members.index(self.rank))

    def all_gather(self, x: Tensor, *, timeout_s: float, operation: str = "all-gather") -> None:
        with placed(x, _HOST) as host:
            places = host.view(self.size, -1)
            own = places[self.members.index(self.rank)]
            self._exchange([own] * self.size, places, timeout_s, operation)

    def broadcast(self, x: Tensor, source: int, *, timeout_s: float, operation: str = "broadcast") -> None:
        root, limit = self.members.index(source), timedelta(seconds=timeout_s)
        mine = source == self.rank
        with placed(x, _HOST, read=mine, write=not mine) as host:
            self._run(lambda: self._pg.broadcast(host, root, timeout=limit), self._other, timeout_s, operation)

    def barrier(self, *, timeout_s: float, operation: str = "barrier") -> None:
        # An all-reduce of one number, since Gloo's own barrier leaves no way to name a deadline per call.
        self.all_reduce(torch.zeros(1), timeout_s=timeout_s, operation=operation)

    def _sum_at_once(self, x: Tensor, timeout_s: float, operation: str) -> None:
        """Each sends all of it to everyone, which takes one round trip. Gloo's ring takes two for each member."""
        arriving = x.new_empty((self.size, *x.shape))
        self._exchange([x] * self.size, arriving, timeout_s, operation)
        arriving[self.members.index(self.rank)] = x
        x.copy_(arriving[0])
        for other in arriving[1:]:  # in the members' order: everyone ends with the same bits
            x += other

    def _exchange(
        self, outgoing: Sequence[Tensor] | Tensor, arriving: Tensor, timeout_s: float, operation: str
    ) -> None:
        """Send `outgoing[m]` to member m and receive `arriving[m]` from it, with all others at once."""
        others = [m for m, member in enumerate(self.members) if member != self.rank]
        deadline, works = time.monotonic() + timeout_s, []
        for m in others:
            with self._errors(f"{operation} in group {self.name}", self.members[m]):
                works.append((m, self._pg.recv([arriving[m]], m, 0)))
        for m in others:
            with self._errors(f"{operation} in group {self.name}", self.members[m]):
                works.append((m, self._pg.send([outgoing[m]], m, 0)))
        for m, work in works:
            with self._errors(f"{operation} in group {self.name}", self.members[m]):
                work.wait(timedelta(seconds=max(deadline - time.monotonic(), 0.001)))

    def close(self) -> None:
        # A group that is alive when the interpreter ends sometimes aborts the process.
        self._pg.shutdown()

    def _run(self, start: Callable[[], Work], peer: int | None, timeout_s: float, operation: str) -> None:
        with self._errors(f"{operation} in group {self.name}", peer):
            start().wait(timedelta(seconds=timeout_s))

    def _errors(self, operation: str, peer: int | None) -> _Translate:
        return _Translate(self, operation, peer)


class _Translate:
    """Turns Gloo's plain `RuntimeError`, and a store's `TimeoutError`, into ours, with the time that it took."""

    def __init__(self, group: GlooGroup, operation: str, peer: int | None) -> None:
        self.group, self.operation, self.peer = group, operation, peer

    def __enter__(self) -> None:
        self.start = time.monotonic()

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        # Connecting goes through our store, whose `TimeoutError` Gloo passes on.
        if not isinstance(error, (RuntimeError, TimeoutError)) or isinstance(error, WireError):
            return
        kind = LinkTimeout if isinstance(error, TimeoutError) or _is_timeout(error) else PeerLost
        raise kind(
            rank=self.group.rank,
            peer=self.peer,
            interface=self.group.interface,
            operation=self.operation,
            seconds=time.monotonic() - self.start,
            detail=_reason(error),
        ) from error
