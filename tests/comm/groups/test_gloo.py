"""Groups over real Gloo connections between real processes."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from farspan.comm.errors import LinkTimeout
from farspan.comm.groups.gloo import GlooGroup, _is_timeout
from farspan.comm.lanes.lane import ThreadLane
from peers import Peer, Told, error_of, play
from torch import Tensor
from torch.distributed import FileStore

BIG = 16_000_000  # bytes: far more than the system's buffers hold
LONG = 120.0  # seconds: longer than the whole test may take


def numbers(rank: int, size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(rank)) * 10.0**rank


def digest(x: Tensor) -> str:
    return hashlib.sha256(x.numpy().tobytes()).hexdigest()


def sum_and_spread(me: Peer) -> dict[str, Any]:
    group = me.group("all")
    sums = {}
    for size in (1, 5, 8192, 100_003):  # up to SMALL bytes go another way than more
        sums[size] = numbers(me.rank, size)
        group.all_reduce(sums[size], timeout_s=20)
    right = {
        size: bool(torch.allclose(x.double(), sum(numbers(r, size).double() for r in me.ranks), rtol=1e-5, atol=1e-2))
        for size, x in sums.items()
    }
    told = numbers(me.rank, 7)
    group.broadcast(told, 4, timeout_s=20)
    group.barrier(timeout_s=20)
    group.close()
    return {
        "size": group.size,
        "right": right,
        "bits": {size: digest(x) for size, x in sums.items()},
        "told": torch.equal(told, numbers(4, 7)),
    }


def test_a_sum_leaves_the_same_bits_on_all_members(tmp_path: Path) -> None:
    answers = play(sum_and_spread, (1, 4, 6), tmp_path)
    first = answers[1]
    assert first["right"] == {1: True, 5: True, 8192: True, 100_003: True}
    assert len(set(first["bits"].values())) == 4
    for answer in answers.values():
        assert answer == {**first, "told": True, "size": 3}


def scatter_and_gather(me: Peer) -> dict[str, Any]:
    """Each member's place of the sum, then all places again."""
    group, place = me.group("all"), me.ranks.index(me.rank)
    answer = {}
    for n in (1, 5, 40_001):
        x = numbers(me.rank, 3 * n)
        group.reduce_scatter(x, timeout_s=20)
        mine = x.view(3, n)[place]
        in_order = numbers(1, 3 * n) + numbers(4, 3 * n) + numbers(6, 3 * n)
        right = torch.equal(mine, in_order.view(3, n)[place])
        everything = torch.full((3, n), float("nan"))
        everything[place] = mine
        group.all_gather(everything.view(-1), timeout_s=20)
        answer[n] = (right, torch.equal(everything.view(-1), in_order))
    half = torch.full((6,), float(me.rank), dtype=torch.bfloat16)
    group.all_gather(half, timeout_s=20)
    group.close()
    return {**answer, "half": half.tolist()}


def test_scattered_sums_are_added_in_order_and_gathered_whole(tmp_path: Path) -> None:
    told = {1: (True, True), 5: (True, True), 40_001: (True, True), "half": [1.0, 1.0, 4.0, 4.0, 6.0, 6.0]}
    assert play(scatter_and_gather, (1, 4, 6), tmp_path) == {1: told, 4: told, 6: told}


def operations(group: GlooGroup, timeout_s: float) -> dict[str, Callable[[], None]]:
    """Each kind of operation, as seen by the member that waits for the other."""
    (other,) = set(group.members) - {group.rank}
    return {
        "receiving x": lambda: group.recv(torch.zeros(4), other, timeout_s=timeout_s, operation="receiving x"),
        "sending x": lambda: group.send(torch.zeros(BIG), other, timeout_s=timeout_s, operation="sending x"),
        "summing x": lambda: group.all_reduce(torch.zeros(4), timeout_s=timeout_s, operation="summing x"),
        "scattering x": lambda: group.reduce_scatter(torch.zeros(4), timeout_s=timeout_s, operation="scattering x"),
        "gathering x": lambda: group.all_gather(torch.zeros(4), timeout_s=timeout_s, operation="gathering x"),
        "spreading x": lambda: group.broadcast(torch.zeros(4), other, timeout_s=timeout_s, operation="spreading x"),
        "barrier": lambda: group.barrier(timeout_s=timeout_s),
    }


OPERATIONS = ("receiving x", "sending x", "summing x", "scattering x", "gathering x", "spreading x", "barrier")


def wait_in_vain(
    me: Peer, timeout_s: float, meanwhile: Callable[[], object]
) -> dict[str, tuple[Told | None, Told | None]]:
    """What each operation, in a group of its own, says of a peer that does not answer, and what the group says next."""
    groups = {name: me.group(name, timeout_s=LONG) for name in OPERATIONS}
    if me.rank == 7:
        me.hear("waiting")
        meanwhile()
        me.hear("done")
        return {}
    tickets = {name: ThreadLane(name).submit(operations(groups[name], timeout_s)[name]) for name in OPERATIONS}
    me.say("waiting")
    first = {name: error_of(ticket.get) for name, ticket in tickets.items()}
    then = {name: error_of(operations(groups[name], LONG)["receiving x"]) for name in OPERATIONS}
    me.say("done")
    return {name: (first[name], then[name]) for name in OPERATIONS}


def lose_a_peer(me: Peer) -> dict[str, Any]:
    return wait_in_vain(me, LONG, meanwhile=lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_a_peer_that_dies_is_named(tmp_path: Path) -> None:
    told = play(lose_a_peer, (3, 7), tmp_path, dying=[7])[3]
    for operation in OPERATIONS:
        error, next_error = told[operation]
        assert error.kind == "PeerLost", error
        facts = {key: error.facts[key] for key in ("rank", "peer", "interface", "operation")}
        assert facts == {"rank": 3, "peer": 7, "interface": "lo", "operation": f"{operation} in group {operation}"}
        assert error.facts["seconds"] >= 0
        assert error.line.startswith(f"rank 3: lost rank 7 (interface lo, {operation} in group {operation}, after ")
        assert f"after {error.facts['seconds']:.1f} s)" in error.line
        assert "\n" not in error.line
        assert next_error is not None  # the group is dead


def be_silent(me: Peer) -> dict[str, Any]:
    return wait_in_vain(me, 0.3, meanwhile=lambda: None)


def test_a_peer_that_stays_silent_is_a_timeout(tmp_path: Path) -> None:
    told = play(be_silent, (3, 7), tmp_path)[3]
    for operation in OPERATIONS:
        error, next_error = told[operation]
        assert error.kind == "LinkTimeout", error
        facts = {key: error.facts[key] for key in ("rank", "peer", "interface", "operation")}
        assert facts == {"rank": 3, "peer": 7, "interface": "lo", "operation": f"{operation} in group {operation}"}
        assert error.facts["seconds"] >= 0.29
        assert error.line.startswith(
            f"rank 3: timed out waiting for rank 7 (interface lo, {operation} in group {operation}, after "
        )
        assert next_error is not None  # the group is dead: no late message can be taken for the next one


def come_late(me: Peer) -> bool:
    me.say(f"here {me.rank}")
    for rank in me.ranks:
        me.hear(f"here {rank}")
    group = me.group("all", timeout_s=1.0)
    if me.rank == 1:
        time.sleep(1.3)
    x = torch.ones(3)
    group.all_reduce(x, timeout_s=20.0)
    group.broadcast(x, 1, timeout_s=20.0)
    group.close()
    return x.tolist() == [2.0, 2.0, 2.0]


def test_a_sum_has_its_own_deadline_and_not_that_of_connecting(tmp_path: Path) -> None:
    assert play(come_late, (0, 1), tmp_path) == {0: True, 1: True}


def test_a_peer_that_never_comes_is_a_timeout_of_connecting(tmp_path: Path) -> None:
    with pytest.raises(LinkTimeout) as caught:
        GlooGroup(FileStore(str(tmp_path / "meeting"), 2), "x", (3, 7), 3, "lo", 0.1)
    assert str(caught.value).startswith("rank 3: timed out waiting for rank 7 (interface lo, connecting, after ")


def test_a_larger_group_cannot_say_who_was_missing(tmp_path: Path) -> None:
    with pytest.raises(LinkTimeout) as caught:
        GlooGroup(FileStore(str(tmp_path / "meeting"), 3), "x", (3, 7, 8), 3, "lo", 0.1)
    assert caught.value.peer is None
    assert str(caught.value).startswith("rank 3: timed out waiting for a peer (interface lo, connecting, after ")


@pytest.mark.parametrize(
    ("said", "timeout"),
    [
        ("Timed out waiting 6000ms for recv operation to complete", True),
        ("Application timeout caused pair closure", True),
        ("timed out connecting: SO_ERROR: Connection refused, remote=[127.0.0.1]:24983$1", False),
        ("Connection closed by peer [127.0.0.1]:3510", False),
    ],
)
def test_what_gloo_says_of_a_peer_that_is_gone_and_of_one_that_is_slow(said: str, timeout: bool) -> None:
    assert _is_timeout(RuntimeError(said)) == timeout
