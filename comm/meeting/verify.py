"""Is it the peer at the other end, and did the bytes really take the interface that was named?

Gloo's ports take whoever comes first with the number of a pair, for that pair's peer. So the first message over each
connection is one that only ranks of this run can make.

Gloo listens at the named interface's address, and the peer's machine connects to that address by whatever route it has:
two interfaces in one subnet, or a gateway on the other one, and the traffic goes elsewhere without a word. So the
interfaces' own counters are asked which of them carried those messages.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import psutil
import torch

from ..errors import InterfaceError, Intruder, LinkTimeout
from ..groups.group import Group
from ..lanes.lane import ThreadLane

PROBE_BYTES = 8192
"""To each member of a group: far more than what idles on a wire, and less than TCP sends before its first answer."""
_PROBE_S = 10.0
"""How long a probe may take where --join-timeout is short; all members begin within a round trip."""
_LATE_S = 3.0
"""Some drivers read their counters but once a second."""


def host_here() -> str:
    """A name for this host, the same in all its containers."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else os.uname().nodename


def network_here() -> str:
    """A name for this host's network, as this process sees it: two with the same name talk through the loopback."""
    space = Path("/proc/self/ns/net")
    return f"{host_here()} {os.readlink(space)}" if space.exists() else host_here()


def traffic() -> dict[str, tuple[int, int]]:
    """Interface → bytes sent and received since the machine started."""
    counters = psutil.net_io_counters(pernic=True, nowrap=False)
    return {name: (seen.bytes_sent, seen.bytes_recv) for name, seen in counters.items()}


def verify_interfaces(
    groups: Sequence[Group],
    networks: Sequence[str],
    key: bytes,
    timeout_s: float,
    check: Callable[[], None],
    late_s: float = _LATE_S,
) -> dict[str, int]:
    """Send a probe over each of this rank's `groups`, all at once; all members must call this with all their groups.

    `networks` has every rank's `network_here()`. Between ranks of one, bytes take the loopback whatever was named, and
    nothing can be verified of the way. `key`: what only the ranks of this run have. Returns interface → bytes of probes
    that it was seen to carry. Raises `InterfaceError`, naming the interface that carried them instead, `Intruder` for a
    probe that was made without the key, and `LinkTimeout`, far sooner than `timeout_s`, for one that does not come.
    """
    remote = {g.name: sum(networks[m] != networks[g.rank] for m in g.members) * PROBE_BYTES for g in groups}
    due: dict[str, int] = {}
    for group in groups:
        if remote[group.name]:
            due[group.interface] = due.get(group.interface, 0) + remote[group.name]
    limit_s = min(timeout_s, max(_PROBE_S, timeout_s / 20))
    before = traffic()
    lanes = [ThreadLane(f"probe of {group.name}", check=check) for group in groups]
    tickets = [lane.submit(partial(_probe, group, key, limit_s)) for lane, group in zip(lanes, groups, strict=True)]
    for ticket in tickets:
        ticket.get()
    for lane in lanes:
        lane.close()
    deadline = time.monotonic() + late_s
    while True:
        after = traffic()
        grown = {
            name: [after[name][way] - seen[way] for way in (0, 1)] for name, seen in before.items() if name in after
        }
        short = [name for name, size in due.items() if min(grown.get(name, [0])) < size]
        if not short:
            return due
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    name, rank = short[0], groups[0].rank
    lost = [group.name for group in groups if group.interface == name and remote[group.name]]
    others = sorted((n for n in grown if n not in due and n != "lo"), key=lambda n: -max(grown[n]))
    others += [n for n in due if n not in short]  # another of the named ones may have carried these as well
    instead = next((n for n in others if max(grown[n]) - due.get(n, 0) >= due[name]), None)
    raise InterfaceError(
        f"rank {rank}: {due[name]} bytes of probes for {', '.join(lost)} should have gone over {name}, which sent "
        f"{grown[name][0]} and received {grown[name][1]}; "
        + (f"they went over {instead}" if instead else "no other interface carried them either")
        + f": see `ip route get` for the peers' addresses here and on their hosts, or name {instead or 'another'}"
    )


def _proof(key: bytes, group: Group, sender: int) -> torch.Tensor:
    """The probe [PROBE_BYTES] of one member."""
    mac = hmac.digest(key, f"{sender} in {group.name}".encode(), hashlib.sha256)
    return torch.frombuffer(bytearray(mac * (PROBE_BYTES // len(mac))), dtype=torch.uint8)


def _probe(group: Group, key: bytes, limit_s: float) -> None:
    places = torch.zeros(group.size, PROBE_BYTES, dtype=torch.uint8)
    places[group.members.index(group.rank)] = _proof(key, group, group.rank)
    try:
        group.all_gather(places.view(-1), timeout_s=limit_s, operation="proving the connection")
    except LinkTimeout as error:
        raise LinkTimeout(
            rank=error.rank,
            peer=error.peer,
            interface=error.interface,
            operation=error.operation,
            seconds=error.seconds,
            detail="has another process connected to a data port in its place? A firewall or WireGuard keeps it out",
        ) from error
    for place, member in zip(places, group.members, strict=True):
        if not torch.equal(place, _proof(key, group, member)):
            raise Intruder(
                f"rank {group.rank}: what came over {group.interface} in group {group.name} was not sent by rank "
                f"{member}: another process has connected to a data port in its place; keep strangers from them with "
                "a firewall or WireGuard, then start all ranks again"
            )
