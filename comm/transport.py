"""Which library and which kind of lane: the one place that chooses."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch

from .errors import InterfaceError
from .groups.gloo import GlooGroup
from .groups.group import Group
from .groups.nccl import NcclGroup, bind, load
from .groups.watchdog import Watchdog
from .lanes.lane import Lane, Recorder, ThreadLane
from .lanes.stream_lane import StreamLane
from .meeting.rendezvous import Rendezvous


def prepare(backend: str, interface: str) -> None:
    """What `backend` needs before CUDA is touched. Raises `InterfaceError` where it cannot work here."""
    if backend != "nccl":
        return
    bind(interface)
    if not torch.cuda.is_available():
        raise InterfaceError("the backend nccl needs a CUDA device, and torch sees none here: use gloo")
    load()


class Wanted(NamedTuple):
    """A group that is to be made."""

    backend: str
    name: str
    members: tuple[int, ...]
    interface: str

    @property
    def is_gloo(self) -> bool:
        return self.backend == "gloo"


class Transport:
    """Makes one rank's groups and lanes. `close` finishes what is under way first.

    A lane belongs to the device, a group to its backend: Gloo carries what lies on a CUDA device too.
    """

    def __init__(
        self,
        meeting: Rendezvous,
        device: torch.device,
        timeout_s: float,
        record: Recorder | None = None,
    ) -> None:
        self._meeting, self._device = meeting, device
        self._timeout_s, self._record = timeout_s, record
        self._watchdog = Watchdog(meeting.liveness.check, meeting.liveness.report)
        self.lanes: list[Lane] = []
        self.groups: dict[str, Group] = {}

    def connect(self, wanted: Iterable[Wanted]) -> None:
        """Make groups; blocks until the members of all have come. All ranks name theirs in one order.

        A Gloo group takes some round trips: side by side, all take no longer than one. NCCL's come one by one, since
        two that are made at once, in another order on another rank, may wait for each other on the device.
        """
        wanted, liveness = list(wanted), self._meeting.liveness
        store, rank, limit = self._meeting.store, self._meeting.rank, self._timeout_s
        makers = {w: ThreadLane(w.name, check=liveness.check, on_error=liveness.report) for w in wanted if w.is_gloo}
        tickets = {
            w: maker.submit(partial(GlooGroup, store, w.name, w.members, rank, w.interface, limit))
            for w, maker in makers.items()
        }
        made: dict[Wanted, Group] = {w: ticket.get() for w, ticket in tickets.items()}
        for maker in makers.values():
            maker.close()
        for w in wanted:
            if not w.is_gloo:
                liveness.check()
                made[w] = NcclGroup(store, w.name, w.members, rank, w.interface, limit, self._device, self._watchdog)
        self.groups.update({w.name: made[w] for w in wanted})

    def lane(self, name: str, *, host: bool = False) -> Lane:
        """`host`: all that its work touches lies in host memory. Such a lane takes no stream, of which torch has 32:
        the 33rd lane would get the first one's, and each wait for the other's transfers."""
        liveness = self._meeting.liveness
        made: Lane
        if self._device.type == "cuda" and not host:
            made = StreamLane(name, self._device, check=liveness.check, on_error=liveness.report, record=self._record)
        else:
            made = ThreadLane(name, check=liveness.check, on_error=liveness.report, record=self._record)
        self.lanes.append(made)
        return made

    def close(self) -> None:
        for lane in self.lanes:
            lane.close()
        self._watchdog.close()
        for group in self.groups.values():
            group.close()
