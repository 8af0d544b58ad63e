"""The links between all hosts of a lab: one process that holds every host's devices and moves packets between them.

A packet that host a sends to host b waits until the line from a to b is free, takes size ÷ rate to leave, and arrives
after the delay. Kernels do this with netem, but not every kernel has it.

`lab.py` starts it with a socket as its standard input. It makes the namespaces and devices, tells what it made, and
obeys changes of links. When the socket closes, however that came about, it ends all processes in the namespaces, and
then itself.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import json
import os
import random
import select
import socket
import sys
import time
from dataclasses import dataclass

import namespaces

BATCH = 64
"""Packets read from one device before the others have their turn."""
LARGEST = 65536


@dataclass
class Link:
    """One direction between two hosts. Both ends are TUN descriptors."""

    to: int
    rate_mbit: float | None = None
    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    queue_ms: float = 200.0
    cut: bool = False
    ports: list[int] | None = None
    free_at: float = 0.0
    last: float = 0.0

    def schedule(self, packet: bytes, now: float) -> float | None:
        """When the packet arrives (time.monotonic), or None where it is lost: cut, forbidden, or the queue is full."""
        if self.cut or (self.ports is not None and not self._allowed(packet)):
            return None
        if self.rate_mbit is not None:
            start = max(now, self.free_at)
            took = len(packet) * 8e-6 / self.rate_mbit
            if start - now > max(self.queue_ms * 1e-3, 16 * took):
                return None
            self.free_at = now = start + took
        arrival = now + (self.delay_ms + random.uniform(-self.jitter_ms, self.jitter_ms)) * 1e-3
        self.last = max(self.last, arrival)  # jitter does not reorder: one path, one queue
        return self.last

    def _allowed(self, packet: bytes) -> bool:
        """Whether a firewall that knows only `ports` lets the packet through; what is not TCP passes."""
        if packet[9] != socket.IPPROTO_TCP or self.ports is None:
            return True
        at = (packet[0] & 15) * 4
        return any(int.from_bytes(packet[at + i : at + i + 2]) in self.ports for i in (0, 2))


class Forwarder:
    """`spec`: {"hosts", "interfaces": {name: {"addresses", "mtu", "links": [[facts of a link]]}}}."""

    def __init__(self, spec: dict) -> None:
        self.links: dict[tuple[str, int, int], Link] = {}
        self._by_address: dict[int, dict[bytes, Link]] = {}
        self._waiting: list[tuple[float, int, Link, bytes]] = []
        self._count = 0
        home = os.open("/proc/self/ns/net", os.O_RDONLY)
        self.namespaces: list[int] = []
        tuns: list[dict[str, int]] = []
        for host in range(spec["hosts"]):
            namespaces.leave_for_a_new_one()
            namespaces.without_ipv6()
            namespaces.set_up("lo", True)
            tuns.append({})
            for name, facts in spec["interfaces"].items():
                tuns[host][name] = namespaces.open_tun(name)
                namespaces.configure(name, facts["addresses"][host], facts["mtu"])
            self.namespaces.append(os.open("/proc/self/ns/net", os.O_RDONLY))
        namespaces.enter(f"/proc/self/fd/{home}")
        for name, facts in spec["interfaces"].items():
            addresses = [socket.inet_aton(address) for address in facts["addresses"]]
            for a in range(spec["hosts"]):
                routes = self._by_address[tuns[a][name]] = {}
                for b in range(spec["hosts"]):
                    if a != b:
                        link = Link(tuns[b][name], **facts["links"][a][b])
                        routes[addresses[b]] = self.links[name, a, b] = link

    def inodes(self) -> list[int]:
        return [os.fstat(descriptor).st_ino for descriptor in self.namespaces]

    def serve(self, control: socket.socket) -> None:
        """Move packets until the other end of `control` closes."""
        orders = control.makefile("rw")
        orders.write(json.dumps({"descriptors": self.namespaces, "inodes": self.inodes()}) + "\n")
        orders.flush()
        sources: list[int] = [control.fileno(), *self._by_address]
        while True:
            now = time.monotonic()
            while self._waiting and self._waiting[0][0] <= now:
                self._deliver(*heapq.heappop(self._waiting)[2:])
            pause = max(self._waiting[0][0] - time.monotonic(), 0.0) if self._waiting else None
            for source in select.select(sources, [], [], pause)[0]:
                if source != control.fileno():
                    self._take(source)
                elif line := orders.readline():
                    order = json.loads(line)
                    for link in order["links"]:
                        vars(self.links[tuple(link)]).update(order["change"])
                    orders.write("true\n")
                    orders.flush()
                else:
                    return

    def _take(self, source: int) -> None:
        routes = self._by_address[source]
        for _ in range(BATCH):
            try:
                packet = os.read(source, LARGEST)
            except BlockingIOError:
                return
            link = routes.get(packet[16:20])
            if link is not None and packet[0] >> 4 == 4:
                at = link.schedule(packet, time.monotonic())
                if at is not None:
                    self._count += 1
                    heapq.heappush(self._waiting, (at, self._count, link, packet))

    def _deliver(self, link: Link, packet: bytes) -> None:
        if not link.cut:  # what is on the way when a link is cut is lost with it
            try:
                os.write(link.to, packet)
            except OSError as error:
                if error.errno not in (errno.EIO, errno.EAGAIN):  # the interface is down, or its queue is full
                    raise


if __name__ == "__main__":
    # Packets must not wait for whoever computes. In a container that may not ask for this, delays have a little jitter.
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    forwarder = Forwarder(json.loads(sys.argv[1]))
    try:
        forwarder.serve(socket.socket(fileno=0))
    finally:
        namespaces.end_all_in(forwarder.inodes())
