"""Directed edges: in memory, where every step can be watched, and between real processes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from farspan.comm.codecs.codec import RawCodec
from farspan.comm.errors import PeerLost
from farspan.comm.lanes.lane import ThreadLane
from farspan.comm.link import Receiver, Sender
from memory import MemoryGroup, MemoryWire
from peers import Peer, Told, error_of, play
from torch import Tensor

CPU = torch.device("cpu")
LONG = 120.0  # seconds: longer than the whole test may take


def message(at: int) -> Tensor:
    """Nine messages, of three types and three shapes."""
    dtype = (torch.float32, torch.bfloat16, torch.int64)[at % 3]
    shape = ((2, 3, 5), (7,), (300, 40))[at // 3]
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(at)) * 100).to(dtype)
    return x.T if at == 7 else x  # a view that is not contiguous travels as what it shows


def sender(group: Any, to: int, lane: ThreadLane, timeout_s: float = 20.0) -> Sender:  # noqa: ANN401 - any Group
    return Sender(group, to, RawCodec(), lane, timeout_s)


def receiver(group: Any, source: int, lane: ThreadLane, timeout_s: float = 20.0, depth: int = 2) -> Receiver:  # noqa: ANN401
    return Receiver(group, source, RawCodec(), lane, timeout_s, device=CPU, depth=depth)


@pytest.fixture
def lane() -> Iterator[ThreadLane]:
    made = ThreadLane("lane")
    yield made
    made.close()


@pytest.fixture
def ends() -> tuple[MemoryGroup, MemoryGroup]:
    wire = MemoryWire()
    return MemoryGroup(wire, "0→1", (0, 1), 0), MemoryGroup(wire, "0→1", (0, 1), 1)


@pytest.mark.parametrize("depth", [0, 1, 2, 4])
def test_receives_are_posted_before_anyone_asks(
    ends: tuple[MemoryGroup, MemoryGroup], lane: ThreadLane, depth: int
) -> None:
    a, b = ends
    for at in range(6):
        a.send(torch.tensor([at]).view(torch.uint8), 1, timeout_s=1)
    end = receiver(b, 0, lane, depth=depth)

    def received() -> int:
        lane.submit(lambda: None).get()  # all that was posted is done
        return len(b.operations)

    assert received() == 0
    end.expect(6, (1,), torch.int64, "data")
    assert received() == depth
    for at in range(6):
        assert end.recv().get().item() == at
        assert received() == min(at + 1 + depth, 6)
    assert set(b.operations) == {"receiving data"}


def test_receives_are_posted_while_the_lane_is_busy(ends: tuple[MemoryGroup, MemoryGroup], lane: ThreadLane) -> None:
    """The sender waits for the word that its message is expected: over a long way that word must leave early."""
    gate = threading.Event()
    lane.submit(lambda: gate.wait(20))
    receiver(ends[1], 0, lane, depth=3).expect(5, (1,), torch.int64, "data")
    assert ends[1].operations == ["receiving data"] * 3
    for _ in range(3):
        ends[0].send(torch.tensor([1]).view(torch.uint8), 1, timeout_s=1)
    gate.set()


@pytest.mark.parametrize(("window", "posted"), [(0, 2), (23, 2), (24, 3), (40, 5), (1000, 6)])
def test_small_messages_are_posted_as_many_as_fit_the_window(
    ends: tuple[MemoryGroup, MemoryGroup], lane: ThreadLane, window: int, posted: int
) -> None:
    for at in range(6):
        ends[0].send(torch.tensor([at]).view(torch.uint8), 1, timeout_s=1)
    end = Receiver(ends[1], 0, RawCodec(), lane, 20.0, device=CPU, window=window)
    end.expect(6, (1,), torch.int64)
    assert len(ends[1].operations) == posted
    assert [end.recv().get().item() for _ in range(6)] == list(range(6))


def test_expectations_add_up_in_order(ends: tuple[MemoryGroup, MemoryGroup], lane: ThreadLane) -> None:
    a, b = ends
    out, end = sender(a, 1, lane), receiver(b, 0, lane)
    for at in range(9):
        out.send(message(at), "x").get()
        x = message(at)
        end.expect(1, tuple(x.shape), x.dtype)
    for at in range(9):
        got = end.recv().get()
        assert got.dtype == message(at).dtype
        assert torch.equal(got, message(at))


def test_a_receive_that_nobody_expects_is_refused_at_once(
    ends: tuple[MemoryGroup, MemoryGroup], lane: ThreadLane
) -> None:
    with pytest.raises(IndexError):
        receiver(ends[1], 0, lane).recv()


def exchange(me: Peer) -> list[tuple[torch.dtype, list[int], bool]]:
    group, lane = me.group("1→0"), ThreadLane("lane")
    got = []
    if me.rank == 1:
        tickets = [sender(group, 0, lane).send(message(at)) for at in range(9)]
        for ticket in tickets:
            ticket.get()
    else:
        end = receiver(group, 1, lane)
        for at in range(9):
            end.expect(1, tuple(message(at).shape), message(at).dtype)
        for at in range(9):
            x = end.recv().get()
            got.append((x.dtype, list(x.shape), torch.equal(x, message(at))))
    lane.close()
    group.close()
    return got


def test_messages_arrive_in_order_with_their_shapes_and_types(tmp_path: Path) -> None:
    got = play(exchange, (0, 1), tmp_path)[0]
    assert got == [(message(at).dtype, list(message(at).shape), True) for at in range(9)]


def cross(me: Peer) -> bool:
    """Each sends all it has before it listens."""
    groups = {name: me.group(name) for name in ("0→1", "1→0")}
    lanes = [ThreadLane("send"), ThreadLane("receive")]
    out = sender(groups[f"{me.rank}→{me.other}"], me.other, lanes[0])
    into = receiver(groups[f"{me.other}→{me.rank}"], me.other, lanes[1])
    size = 4_000_000  # 16 MB: far more than the system's buffers hold
    sent = [out.send(torch.full((size,), float(10 * me.rank + at))) for at in range(2)]
    into.expect(2, (size,), torch.float32)
    right = [bool((into.recv().get() == 10 * me.other + at).all()) for at in range(2)]
    for ticket in sent:
        ticket.get()
    for end in (*lanes, *groups.values()):
        end.close()
    return all(right)


def test_two_directions_do_not_block_each_other(tmp_path: Path) -> None:
    assert play(cross, (0, 1), tmp_path) == {0: True, 1: True}


def die_between_messages(me: Peer) -> tuple[bool, list[Told | None], list[str]] | None:
    group = me.group("7→3")
    heard: list[str] = []
    lane = ThreadLane("lane", on_error=lambda error: heard.append(str(error)))
    if me.rank == 7:
        sender(group, 3, lane).send(message(0)).get()
        me.hear("got one")
        os.kill(os.getpid(), signal.SIGKILL)
    end = receiver(group, 7, lane, timeout_s=LONG)
    end.expect(3, tuple(message(0).shape), message(0).dtype, "activations")
    first = torch.equal(end.recv().get(), message(0))
    me.say("got one")
    return first, [error_of(end.recv().get) for _ in range(2)], heard


def test_a_sender_that_dies_reaches_whoever_waits_and_the_lanes_listener(tmp_path: Path) -> None:
    first, errors, heard = play(die_between_messages, (3, 7), tmp_path, dying=[7])[3]
    assert first
    for error in errors:
        assert error.kind == PeerLost.__name__
        assert error.line.startswith("rank 3: lost rank 7 (interface lo, receiving activations in group 7→3, after ")
    assert heard == [error.line for error in errors]


def starve(me: Peer) -> list[Told | None]:
    groups = {name: me.group(name) for name in ("7→3", "3→7")}
    if me.rank == 7:
        me.hear("done")
        return []
    lanes = [ThreadLane("receive"), ThreadLane("send")]
    end = receiver(groups["7→3"], 7, lanes[0], timeout_s=0.3)
    end.expect(1, (4,), torch.float32, "activations")
    sent = sender(groups["3→7"], 7, lanes[1], timeout_s=0.3).send(torch.zeros(4_000_000), "gradients")
    errors = [error_of(end.recv().get), error_of(sent.get)]
    me.say("done")
    return errors


def test_a_peer_that_stays_silent_is_a_timeout_on_both_ends(tmp_path: Path) -> None:
    for error, operation in zip(
        play(starve, (3, 7), tmp_path)[3],
        ("receiving activations in group 7→3", "sending gradients in group 3→7"),
        strict=True,
    ):
        assert error.kind == "LinkTimeout"
        assert error.line.startswith(f"rank 3: timed out waiting for rank 7 (interface lo, {operation}, after ")
        assert 0.29 <= error.facts["seconds"] < LONG
