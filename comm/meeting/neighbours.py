"""A heartbeat on each connection of this process, whichever library made it.

Gloo says nothing of a dead link before its own timeout, and NCCL never does. So the kernel asks: TCP's own probes
(keepalive, RFC 9293 §3.8.4) go over the very connections that carry the data, through the same routes and firewalls,
and TCP_INFO tells how long nothing has been heard from the other end. No byte of ours is on the wire, and no port is
open for it. A connection that is busy hears acknowledgements instead, however long one message takes.

On a slow link a probe may stand in a queue for longer than anyone's patience, behind other connections' data. So these
count as life too: as long as bytes flow between this process and a host, nobody there is given up.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
import struct
import threading
import time
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

log = logging.getLogger("farspan")

_ESTABLISHED, _SYN_SENT = 1, 2
_INFO = struct.Struct("=B7x24I4Q")  # tcp_info of linux/tcp.h, up to the bytes acknowledged and received
_LAST_DATA, _LAST_ACK, _ACKED, _RECEIVED = 12, 13, 27, 28


@dataclass(frozen=True)
class Connection:
    """One TCP socket; addresses as host:port, `remote` empty where it is not connected. `flown`: bytes both ways."""

    inode: int
    local: str
    remote: str
    silent_s: float
    flown: int


class Neighbours:
    """Looks at all TCP connections of this process, and keeps their heartbeats going.

    On systems without TCP_INFO (all but Linux) there is nothing to be seen: the heartbeats in the store remain.
    """

    def __init__(self, period_s: float, store: str) -> None:
        """`store`: the store's host:port. Its connections are in use even when all others are dead."""
        self._period_s, self._store = period_s, store
        self._since: dict[int, float] = {}
        self._flown: dict[str, tuple[int, float]] = {}
        self.connections: list[Connection] = []
        self._lock = threading.Lock()

    def look(self) -> None:
        with self._lock:
            self._look()

    def _look(self) -> None:
        now, found = time.monotonic(), []
        try:
            numbers = _descriptors()
        except OSError as error:  # listing them takes a descriptor, and all may be in use for a moment
            log.debug("nothing seen of the neighbours this time: %s", error)
            self.connections = []
            return
        for number in numbers:
            try:
                status = os.fstat(number)
                if stat.S_ISSOCK(status.st_mode):
                    since = self._since.setdefault(status.st_ino, now)
                    if (seen := self._examine(number, status.st_ino, now - since)) is not None:
                        found.append(seen)
            except OSError:
                continue  # it was closed meanwhile
        self.connections = found
        self._since = {c.inode: self._since[c.inode] for c in found}
        flown: dict[str, int] = {}
        for c in found:
            if c.remote and self._store not in (c.local, c.remote):
                flown[host_of(c.remote)] = flown.get(host_of(c.remote), 0) + c.flown
        for host, count in flown.items():
            if self._flown.get(host, (-1, 0.0))[0] != count:
                self._flown[host] = count, now

    @property
    def endpoints(self) -> list[str]:
        """Where this process can be seen: the local address of each of its sockets."""
        return sorted({c.local for c in self.connections})

    def idle_s(self, host: str) -> float:
        """Seconds since bytes flowed between this process and `host`, beside the store's."""
        return time.monotonic() - self._flown.get(host, (0, float("-inf")))[1]

    def silent(self, limit_s: float) -> list[Connection]:
        """Connections on which nothing has been heard for more than `limit_s`, longest first."""
        return sorted((c for c in self.connections if c.silent_s > limit_s), key=lambda c: -c.silent_s)

    def _examine(self, number: int, inode: int, known_s: float) -> Connection | None:
        """`known_s`: how long we have been watching it; what was before does not count."""
        handle = socket.socket(fileno=number)
        try:
            if handle.family not in (socket.AF_INET, socket.AF_INET6) or handle.type != socket.SOCK_STREAM:
                return None
            facts = _INFO.unpack_from(handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size))
            local, state = endpoint(handle.getsockname()), facts[0]
            if state != _ESTABLISHED:
                return Connection(inode, local, "", known_s if state == _SYN_SENT else 0.0, 0)
            self._probe(handle)
            silent_s = min(facts[_LAST_DATA] / 1e3, facts[_LAST_ACK] / 1e3, known_s)
            return Connection(inode, local, endpoint(handle.getpeername()), silent_s, facts[_ACKED] + facts[_RECEIVED])
        finally:
            handle.detach()  # it is not ours to close

    def _probe(self, handle: socket.socket) -> None:
        """Have the kernel ask once a period (its own unit is a second) whether the other end is there.

        The verdict is not left to the kernel, which looks at one connection alone.
        """
        seconds = max(1, int(self._period_s))
        if handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) != seconds:
            for option, value in ((socket.TCP_KEEPINTVL, seconds), (socket.TCP_KEEPCNT, 127)):
                handle.setsockopt(socket.IPPROTO_TCP, option, value)
            handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds)
            handle.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def host_of(endpoint: str) -> str:
    return endpoint.rpartition(":")[0]


def connecting_to(inode: int) -> str:
    """Where the socket with this inode is trying to connect to, or nothing: the socket itself does not tell that."""
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        path = Path("/proc/self/net") / table
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            fields = line.split()
            if fields[9] == str(inode):
                host, port = fields[2].split(":")
                words = struct.unpack(f">{len(host) // 8}I", bytes.fromhex(host))
                return endpoint((socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words)), int(port, 16)))
    return ""


def _descriptors() -> list[int]:
    folder = "/proc/self/fd"
    return [int(name) for name in os.listdir(folder)] if hasattr(socket, "TCP_INFO") and os.path.isdir(folder) else []


def endpoint(address: tuple[Any, ...]) -> str:
    """A socket's address as host:port, the same on both ends."""
    host = ip_address(address[0].split("%")[0])
    plain = getattr(host, "ipv4_mapped", None) or host
    return f"{plain}:{address[1]}"
