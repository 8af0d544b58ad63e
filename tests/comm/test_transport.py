"""Groups are made side by side, and the failure of one ends the wait for the others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from farspan.comm.errors import InterfaceError, RemoteFailure, WireError
from farspan.comm.lanes.lane import ThreadLane
from farspan.comm.transport import Transport, Wanted
from peers import Peer, play


class News:
    """As much of `Liveness` as a transport needs."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def check(self) -> None:
        if self.error is not None:
            raise RemoteFailure(str(self.error))

    def report(self, error: BaseException) -> None:
        self.error = error


def transport(me: Peer, timeout_s: float) -> Transport:
    meeting: Any = SimpleNamespace(store=me.store, rank=me.rank, liveness=News())
    return Transport(meeting, torch.device("cpu"), timeout_s)


def other_way_round(me: Peer) -> dict[str, float]:
    made = transport(me, 20.0)
    names = ["a", "b", "c"] if me.rank == 0 else ["c", "b", "a"]
    made.connect(Wanted("gloo", name, (0, 1), "lo") for name in names)
    sums = {}
    for name, group in sorted(made.groups.items()):
        x = torch.tensor([float(me.rank + 1)])
        group.all_reduce(x, timeout_s=20.0)
        sums[name] = x.item()
    made.close()
    return sums


def test_no_order_of_groups_makes_ranks_wait_in_a_circle(tmp_path: Path) -> None:
    sums = {"a": 3.0, "b": 3.0, "c": 3.0}
    assert play(other_way_round, (0, 1), tmp_path) == {0: sums, 1: sums}


def one_fails(me: Peer) -> str:
    made = transport(me, 600.0)
    try:
        made.connect(Wanted("gloo", name, (0, 1), where) for name, where in (("lonely", "lo"), ("bad", "none0")))
    except (RemoteFailure, InterfaceError) as error:
        return str(error)
    raise WireError("it went well")


def test_a_group_that_fails_ends_the_wait_for_the_others(tmp_path: Path) -> None:
    assert "interface none0" in play(one_fails, (0,), tmp_path, dying=[0])[0]


def test_only_lanes_of_what_lies_on_the_device_have_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has 32 streams, and rank 0 a lane for each rank that it feeds."""
    on_streams: list[str] = []

    class Streaming(ThreadLane):
        def __init__(self, name: str, device: torch.device, **more: Any) -> None:  # noqa: ANN401
            assert device.type == "cuda"
            on_streams.append(name)
            super().__init__(name)

    monkeypatch.setattr("farspan.comm.transport.StreamLane", Streaming)
    meeting: Any = SimpleNamespace(store=None, rank=0, liveness=News())
    made = Transport(meeting, torch.device("cuda", 0), 1.0)
    made.lane("forward send")
    made.lane("tokens→1", host=True)
    made.close()
    assert on_streams == ["forward send"]
