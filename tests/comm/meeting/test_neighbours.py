"""What TCP knows of a process's connections: who answers, who does not, and whether bytes flow."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator

import pytest
from farspan.comm.meeting.neighbours import Connection, Neighbours, connecting_to, endpoint, host_of
from lab import Lab, lab, why_not

needs_lab = pytest.mark.skipif(bool(why_not()), reason=why_not())
PORT = 5000


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as near:
        far, _ = server.accept()
        with far:
            yield near, far


def seen(neighbours: Neighbours, end: socket.socket) -> Connection:
    neighbours.look()
    (found,) = [c for c in neighbours.connections if c.local == endpoint(end.getsockname()) and c.remote]
    return found


def until(true: Callable[[], bool], within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_both_ends_are_seen_and_probed(pair: tuple[socket.socket, socket.socket]) -> None:
    neighbours = Neighbours(2.0, "127.0.0.1:1")
    for end in pair:
        assert seen(neighbours, end).remote == endpoint(end.getpeername())
        assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 2
        assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 2
        assert endpoint(end.getsockname()) in neighbours.endpoints
        end.sendall(b"they are still ours")


def test_bytes_that_flow_are_life_but_not_the_stores(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    neighbours, deaf = Neighbours(1.0, "127.0.0.1:1"), Neighbours(1.0, endpoint(near.getsockname()))
    assert neighbours.idle_s("127.0.0.1") == float("inf")
    for each in (neighbours, deaf):
        each.look()
    first = neighbours.idle_s("127.0.0.1")
    time.sleep(0.2)
    neighbours.look()
    assert neighbours.idle_s("127.0.0.1") > first + 0.15
    near.sendall(b"x" * 1000)
    assert len(far.recv(1000)) == 1000
    until(lambda: (neighbours.look(), neighbours.idle_s("127.0.0.1"))[1] < 0.2)
    until(lambda: (deaf.look(), deaf.idle_s("127.0.0.1"))[1] == float("inf"), 0.1)


def test_an_answered_probe_ends_the_silence(pair: tuple[socket.socket, socket.socket]) -> None:
    """Nothing is sent here but what the kernel sends, once a second."""
    neighbours, most = Neighbours(1.0, ""), 0.0
    start = time.monotonic()
    while time.monotonic() - start < 2.5:
        most = max(most, seen(neighbours, pair[0]).silent_s)
        time.sleep(0.05)
    assert 0.5 < most < 2.0
    assert neighbours.silent(2.0) == []


@pytest.fixture
def hosts() -> Iterator[Lab]:
    with lab({"hosts": 2, "delay_ms": 1}) as made:
        yield made


@needs_lab
@pytest.mark.parametrize("one_way", [(), (0, 1), (1, 0)])
def test_a_cut_is_silence_on_both_ends(hosts: Lab, one_way: tuple[int, ...]) -> None:
    with hosts[0].inside():
        server = socket.create_server((hosts[0].address, PORT))
    with hosts[1].inside():
        near = socket.create_connection((hosts[0].address, PORT), timeout=5)
    far, _ = server.accept()
    with server, near, far:
        neighbours = Neighbours(1.0, "")
        for end in (near, far):
            assert seen(neighbours, end).silent_s < 1.0
        hosts.cut(*(one_way or (0, 1)), one_way=bool(one_way))
        until(lambda: all(seen(neighbours, end).silent_s > 2.5 for end in (near, far)))
        silent = {c.local for c in neighbours.silent(2.0)}
        assert silent == {endpoint(near.getsockname()), endpoint(far.getsockname())}


@needs_lab
def test_connecting_to_where_nobody_answers(hosts: Lab) -> None:
    hosts.cut(0, 1)
    with hosts[0].inside(), socket.socket() as trying:
        trying.setblocking(False)
        assert trying.connect_ex((hosts[1].address, PORT)) != 0
        neighbours = Neighbours(1.0, "")
        until(lambda: (neighbours.look(), bool(neighbours.silent(0.3)))[1])
        (found,) = neighbours.silent(0.3)
        assert (found.remote, connecting_to(found.inode)) == ("", f"{hosts[1].address}:{PORT}")


def test_both_ends_give_an_address_the_same_name() -> None:
    assert endpoint(("::ffff:10.0.0.1", 80, 0, 0)) == endpoint(("10.0.0.1", 80)) == "10.0.0.1:80"
    assert endpoint(("fe80::1%eth0", 80, 0, 2)) == "fe80::1:80"
    assert host_of("fe80::1:80") == "fe80::1"
