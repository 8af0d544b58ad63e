"""Groups on interfaces of their own, and the proof by the interfaces' counters. Two hosts, two cables."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from farspan.comm.groups.gloo import GlooGroup
from farspan.comm.lanes.lane import ThreadLane
from farspan.comm.meeting import verify
from farspan.comm.meeting.interfaces import interface
from farspan.comm.meeting.store import StoreClient
from farspan.comm.meeting.store_server import StoreServer
from farspan.comm.meeting.verify import PROBE_BYTES, network_here, verify_interfaces
from netns import Host, hosts
from peers import Peer, error_of, play

BIG = 4 << 20


@pytest.fixture
def two() -> Iterator[list[Host]]:
    with hosts(2, ["wan0", "lan0"]) as made:
        yield made


def both_ways(group: GlooGroup, me: Peer) -> None:
    x = torch.zeros(BIG, dtype=torch.uint8)
    if me.rank == 0:
        group.send(x, 1, timeout_s=20)
        group.recv(x, 1, timeout_s=20)
    else:
        group.recv(x, 0, timeout_s=20)
        group.send(x, 0, timeout_s=20)
    group.barrier(timeout_s=20)  # a message counts as sent when it is in the socket's buffer


def talk(me: Peer, names: str) -> dict[str, int]:
    """What each interface sent while BIG bytes went each way over a group on each of `names`, all at once."""
    groups = [GlooGroup(me.store, name, me.ranks, me.rank, name, 20.0) for name in names.split()]
    before = verify.traffic()
    lanes = [ThreadLane(group.name) for group in groups]
    for ticket in [lane.submit(lambda g=g: both_ways(g, me)) for lane, g in zip(lanes, groups, strict=True)]:
        ticket.get()
    after = verify.traffic()
    for group in groups:
        group.close()
    return {name: after[name][0] - before[name][0] for name in after}


def talk_on_wan(me: Peer) -> dict[str, int]:
    return talk(me, "wan0")


def talk_on_lan(me: Peer) -> dict[str, int]:
    return talk(me, "lan0")


def talk_on_both(me: Peer) -> dict[str, int]:
    return talk(me, "wan0 lan0")


@pytest.mark.parametrize(
    ("scenario", "used"), [(talk_on_wan, ["wan0"]), (talk_on_lan, ["lan0"]), (talk_on_both, ["wan0", "lan0"])]
)
def test_bytes_take_the_named_interface_only(scenario: Any, used: list[str], two: list[Host], tmp_path: Path) -> None:  # noqa: ANN401
    sent = play(scenario, (0, 1), tmp_path, places={0: two[0].enter, 1: two[1].enter})
    for rank in (0, 1):
        for name, size in sent[rank].items():
            if name in used:
                assert BIG < size < 1.1 * BIG, (rank, name, size)
            else:
                assert size < 10_000, (rank, name, size)


def verified(me: Peer, key: bytes = b"of this run") -> Any:  # noqa: ANN401 - what was seen, or the error
    me.store.set(f"network/{me.rank}", network_here())
    networks = [me.store.get(f"network/{rank}").decode() for rank in me.ranks]
    groups = [GlooGroup(me.store, f"on {name}", me.ranks, me.rank, name, 20.0) for name in ("wan0", "lan0")]
    seen: dict[str, int] = {}
    error = error_of(lambda: seen.update(verify_interfaces(groups, networks, key, 20.0, lambda: None, late_s=0.5)))
    me.say(f"done {me.rank}")
    me.hear(f"done {me.other}")
    for group in groups:
        group.close()
    return error or seen


def test_the_counters_bear_it_out(two: list[Host], tmp_path: Path) -> None:
    seen = play(verified, (0, 1), tmp_path, places={0: two[0].enter, 1: two[1].enter})
    carried = {"wan0": PROBE_BYTES, "lan0": PROBE_BYTES}
    assert seen == {0: carried, 1: carried}


def test_ranks_of_one_host_talk_through_the_loopback_and_that_is_no_error(two: list[Host], tmp_path: Path) -> None:
    assert play(verified, (0, 1), tmp_path, places=dict.fromkeys((0, 1), two[0].enter)) == {0: {}, 1: {}}


def test_bytes_that_take_another_interface_are_found_out(two: list[Host], tmp_path: Path) -> None:
    for host, other in zip(two, (2, 1), strict=True):
        host.ip(f"route add 10.77.0.{other}/32 dev lan0")  # to the other's address on wan0
    told = play(verified, (0, 1), tmp_path, places={0: two[0].enter, 1: two[1].enter})
    for rank in (0, 1):
        assert told[rank].kind == "InterfaceError"
        for words in (
            f"rank {rank}: ",
            f"{PROBE_BYTES} bytes of probes for on wan0",
            "they went over lan0",
            "ip route",
        ):
            assert words in told[rank].line


def verified_with_a_key_of_its_own(me: Peer) -> Any:  # noqa: ANN401 - what was seen, or the error
    return verified(me, b"of rank %d" % me.rank)


def test_a_probe_that_was_made_without_the_key_is_found_out(two: list[Host], tmp_path: Path) -> None:
    told = play(verified_with_a_key_of_its_own, (0, 1), tmp_path, places={0: two[0].enter, 1: two[1].enter})
    for rank in (0, 1):
        assert told[rank].kind == "Intruder"
        assert told[rank].line.startswith(
            f"rank {rank}: what came over wan0 in group on wan0 was not sent by rank {1 - rank}: another process"
        )


GROUPS = 16


def hijacked(me: Peer) -> Any:  # noqa: ANN401 - the error
    """Rank 2 is no member: it connects to rank 0's data ports before rank 1 does. Whether rank 0 waits there or
    connects to rank 1 itself depends on their ports' numbers: so there are many groups."""
    if me.rank == 2:
        with ExitStack() as held:
            for port in json.loads(me.store.get("ports")):
                for pair in range(8):
                    stranger = held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
                    stranger.sendall(struct.pack("q", pair))
            me.say("parked")
            for rank in (0, 1):
                me.hear(f"done {rank}")
        return None
    if me.rank == 1:
        me.hear("parked")
    lanes = [ThreadLane(f"group {n}") for n in range(GROUPS)]
    tickets = [lane.submit(partial(GlooGroup, me.store, lane.name, (0, 1), me.rank, "lo", 20.0)) for lane in lanes]
    if me.rank == 0:
        deadline, ports = time.monotonic() + 20, []
        while len(ports) < GROUPS and time.monotonic() < deadline:
            ports = [c.laddr.port for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
        me.store.set("ports", json.dumps(ports))
    groups = [ticket.get() for ticket in tickets]
    error = error_of(lambda: verify_interfaces(groups, ["here"] * 2, b"of this run", 2.0, lambda: None))
    me.say(f"done {me.rank}")
    me.hear(f"done {1 - me.rank}")
    return error


def test_who_takes_a_members_place_is_found_out(tmp_path: Path) -> None:
    told = play(hijacked, (0, 1, 2), tmp_path)
    for rank in (0, 1):
        assert told[rank].kind == "LinkTimeout"
        assert told[rank].facts["seconds"] < 20
        line = told[rank].line
        assert line.startswith(
            f"rank {rank}: timed out waiting for rank {1 - rank} (interface lo, proving the connection in group group "
        )
        assert "has another process connected to a data port in its place?" in line


def tell_the_store(me: Peer) -> dict[str, int]:
    """Rank 0 serves a store; rank 1 puts 300 kB into it over wan0. What each interface of this rank sent."""
    before = verify.traffic()
    if me.rank == 0:
        server = StoreServer("10.77.0.1", 29998, b"")
        me.say("open")
        me.hear("told")
        server.close()
    else:
        me.hear("open")
        client = StoreClient("10.77.0.1", 29998, 1, b"", 20.0, interface("wan0"))
        client.set("x", "x" * 300_000)
        client.close()
        me.say("told")
    return {name: sent - before[name][0] for name, (sent, _) in verify.traffic().items()}


def test_the_way_to_the_store_is_the_named_interface_whatever_the_routes_say(two: list[Host], tmp_path: Path) -> None:
    two[1].ip("route add 10.77.0.1/32 dev lan0")
    sent = play(tell_the_store, (0, 1), tmp_path, places={0: two[0].enter, 1: two[1].enter})
    assert sent[1]["wan0"] > 300_000
    assert sent[1]["lan0"] < 10_000
