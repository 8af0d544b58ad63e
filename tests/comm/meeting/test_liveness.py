"""Heartbeats in the store, and the first cause, with ranks that are threads of this process."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
from farspan.comm.errors import PeerLost, RemoteFailure
from farspan.comm.meeting.liveness import Liveness
from farspan.comm.meeting.store import StoreClient
from farspan.comm.meeting.store_server import StoreServer
from launch import free_port

PERIOD_S, PATIENCE_S = 0.05, 2.0
Join = Callable[[int], tuple[Liveness, StoreClient]]


@pytest.fixture
def join() -> Iterator[Join]:
    """`join(rank)`: a rank of three."""
    port, made = free_port(), []
    server = StoreServer("127.0.0.1", port, b"")

    def joined(rank: int) -> tuple[Liveness, StoreClient]:
        client = StoreClient("127.0.0.1", port, rank, b"", 5.0)
        liveness = Liveness(
            client, rank, 3, "lo", lambda line: None, period_s=PERIOD_S, patience_s=PATIENCE_S, grace_s=0.0
        )
        made.append(liveness)
        return liveness, client

    yield joined
    for liveness in made:
        liveness.close()
    server.close()


def cause(liveness: Liveness, within_s: float = 20.0) -> str:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            liveness.check()
        except RemoteFailure as failure:
            return str(failure)
        time.sleep(0.01)
    raise AssertionError("no failure is known")


def quiet(*ranks: Liveness, for_s: float) -> None:
    time.sleep(for_s)
    for liveness in ranks:
        liveness.check()


def test_a_rank_that_leaves_without_a_farewell_is_lost_at_once(join: Join) -> None:
    master, other, (leaving, client) = join(0)[0], join(1)[0], join(2)
    quiet(master, other, leaving, for_s=0.3)
    leaving._stop.set()
    client._socket.shutdown(2)  # as when its process dies
    line = "rank 0: lost rank 2 (interface lo, its connection to the store closed, after 0.0 s): see rank 2's last line"
    assert cause(master, 1.5).startswith(line)
    assert cause(other).startswith(f"rank 1: stopping with the others. First cause: {line}")


def test_a_farewell_is_no_loss(join: Join) -> None:
    master, (leaving, client) = join(0)[0], join(2)
    quiet(master, for_s=0.3)
    leaving.close()
    client.set("bye/2", "")
    client.close()
    quiet(master, for_s=0.5)


def test_a_rank_whose_heartbeat_stands_still_is_given_up(join: Join) -> None:
    master, (stopped, _) = join(0)[0], join(1)
    quiet(master, for_s=0.3)
    stopped.close()  # its connection stays
    quiet(master, for_s=PATIENCE_S / 2)
    assert cause(master).startswith("rank 0: no sign of life from rank 1 (interface lo, waiting for its heartbeat in ")


def test_a_rank_that_comes_late_has_not_been_silent_before(join: Join) -> None:
    master = join(0)[0]
    quiet(master, for_s=PATIENCE_S + 0.5)
    late = join(1)[0]
    quiet(master, late, for_s=PATIENCE_S / 2)


def test_the_first_cause_wins_and_reaches_all(join: Join) -> None:
    ranks = [join(rank)[0] for rank in range(3)]
    first = PeerLost(rank=1, peer=2, interface="lo", operation="sending", seconds=1.0)
    assert ranks[1].report(first) == str(first)
    assert ranks[0].report(ValueError("a consequence")).endswith(f"First cause: {first}")
    assert cause(ranks[2]).endswith(f"First cause: {first}")


def test_an_error_that_is_not_of_the_wire_says_whose_it_is(join: Join) -> None:
    assert join(1)[0].report(ValueError("no such file")) == "rank 1: no such file"
    assert "First cause: rank 1: no such file" in cause(join(2)[0])


@pytest.fixture
def no_descriptor() -> Iterator[Callable[[bool], None]]:
    """`no_descriptor(True)`: this process can open nothing, until `no_descriptor(False)`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def free(none: bool) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3 if none else soft, hard))

    yield free
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def beats(client: StoreClient, rank: int, more: int) -> None:
    """Wait until the rank's heart has beaten so many times more."""
    first, deadline = client.add(f"beat/{rank}", 0), time.monotonic() + 20
    while client.add(f"beat/{rank}", 0) < first + more:
        assert time.monotonic() < deadline, "the heart stands still"
        time.sleep(0.01)


def test_a_moment_without_descriptors_does_not_end_the_watching(
    join: Join, no_descriptor: Callable[[bool], None]
) -> None:
    (master, client), (leaving, other) = join(0), join(2)
    beats(client, 0, 3)
    published = client.get("endpoints/0")
    no_descriptor(True)
    with pytest.raises(OSError, match="Too many open files"):
        os.listdir("/proc/self/fd")
    for rank in (0, 2):
        beats(client, rank, 5)
    assert client.get("endpoints/0") == published
    no_descriptor(False)
    quiet(master, leaving, for_s=0.2)
    leaving._stop.set()
    other._socket.shutdown(2)
    assert cause(master).startswith("rank 0: lost rank 2 ")


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), psutil.AccessDenied()])
def test_what_cannot_be_looked_at_now_is_looked_at_later(
    join: Join, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def blind() -> None:
        raise error

    liveness, client = join(1)
    monkeypatch.setattr(liveness, "_silent_connection", blind)
    beats(client, 1, 5)
    liveness.check()


def test_a_watcher_that_cannot_go_on_is_its_ranks_failure(join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    def odd() -> None:
        raise ZeroDivisionError("odd")

    told, other = join(1)[0], join(2)[0]
    monkeypatch.setattr(told, "_silent_connection", odd)
    line = "rank 1: unexpected ZeroDivisionError in the watcher: odd"
    assert cause(told) == line
    assert cause(other).endswith(f"First cause: {line}")


def test_a_watcher_that_cannot_even_tell_the_others_says_so_itself(join: Join) -> None:
    liveness, client = join(1)
    client.set("failure", "no JSON")
    assert cause(liveness).startswith("rank 1: unexpected JSONDecodeError in the watcher: ")
