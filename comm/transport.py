"""Which library and which kind of lane: the one place that chooses."""

from __future__ import annotations

import torch

from .errors import InterfaceError
from .gloo import GlooGroup
from .group import Group
from .lane import Lane, Recorder, ThreadLane
from .nccl import NcclGroup, bind, load
from .rendezvous import Rendezvous
from .stream_lane import StreamLane
from .watchdog import Watchdog


def prepare(backend: str, interface: str) -> None:
    """What `backend` needs before CUDA is touched. Raises `InterfaceError` where it cannot work here."""
    if backend != "nccl":
        return
    bind(interface)
    if not torch.cuda.is_available():
        raise InterfaceError("the backend nccl needs a CUDA device, and torch sees none here: use gloo")
    load()


class Transport:
    """Makes one rank's groups and lanes, and keeps them.

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
        self.watchdog = Watchdog(meeting.liveness.check, meeting.liveness.report)
        self.lanes: list[Lane] = []
        self.groups: dict[str, Group] = {}

    def group(self, backend: str, name: str, members: tuple[int, ...], interface: str) -> Group:
        """Blocks until all members have come."""
        self._meeting.liveness.check()
        store, rank, limit = self._meeting.store, self._meeting.rank, self._timeout_s
        made: Group
        if backend == "nccl":
            made = NcclGroup(store, name, members, rank, interface, limit, self._device, self.watchdog)
        else:
            made = GlooGroup(store, name, members, rank, interface, limit)
        self.groups[name] = made
        return made

    def lane(self, name: str) -> Lane:
        liveness = self._meeting.liveness
        made: Lane
        if self._device.type == "cuda":
            made = StreamLane(name, self._device, check=liveness.check, on_error=liveness.report, record=self._record)
        else:
            made = ThreadLane(name, check=liveness.check, on_error=liveness.report, record=self._record)
        self.lanes.append(made)
        return made
