"""A heartbeat on each connection of this process, whichever library made it.

Gloo says nothing of a dead link before its own timeout, and NCCL never does. So the kernel asks: TCP's own probes
(keepalive, RFC 9293 §3.8.4) go over the very connections that carry the data, through the same routes and firewalls,
and TCP_INFO tells how long nothing has been heard from the other end. No byte of ours is on the wire, and no port is
open for it. A connection that is busy hears acknowledgements instead, however long one message takes.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import time
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

_ESTABLISHED, _SYN_SENT = 1, 2
_INFO = struct.Struct("=B7x24I")  # tcp_info of linux/tcp.h, as far as the round trip and beyond
_LAST_DATA, _LAST_ACK, _ROUND_TRIP = 12, 13, 16


@dataclass(frozen=True)
class Connection:
    """One TCP socket; addresses as host:port, `remote` empty while it listens."""

    inode: int
    local: str
    remote: str
    connected: bool
    silent_s: float
    round_trip_s: float


class Neighbours:
    """Looks at all TCP connections of this process, and keeps their heartbeats going.

    On systems without TCP_INFO (all but Linux) there is nothing to be seen: the heartbeats in the store remain.
    """

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._since: dict[int, float] = {}
        self.connections: list[Connection] = []

    def look(self) -> None:
        now, found = time.monotonic(), []
        for number in _descriptors():
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

    @property
    def endpoints(self) -> list[str]:
        """Where this process can be seen: the local address of each of its sockets."""
        return sorted({c.local for c in self.connections})

    @property
    def round_trip_s(self) -> float:
        """The longest that any of the connections has: behind a slow link's queue it may be many seconds."""
        return max((c.round_trip_s for c in self.connections if c.connected), default=0.0)

    def silent(self, patience_s: float) -> list[Connection]:
        """Connections on which nothing has been heard for the patience and two round trips, longest first.

        The round trips are there for probes that wait behind the data of other connections on a slow link.
        """
        limit_s = patience_s + 2 * self.round_trip_s
        return sorted((c for c in self.connections if c.silent_s > limit_s), key=lambda c: -c.silent_s)

    def _examine(self, number: int, inode: int, known_s: float) -> Connection | None:
        """`known_s`: how long we have been watching it; what was before does not count."""
        handle = socket.socket(fileno=number)
        try:
            if handle.family not in (socket.AF_INET, socket.AF_INET6) or handle.type != socket.SOCK_STREAM:
                return None
            facts = _INFO.unpack_from(handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size))
            local, state = _name(handle.getsockname()), facts[0]
            if state == _ESTABLISHED:
                self._probe(handle)
                heard_s = min(facts[_LAST_DATA], facts[_LAST_ACK]) / 1e3
                remote, round_trip_s = _name(handle.getpeername()), facts[_ROUND_TRIP] / 1e6
                return Connection(inode, local, remote, True, min(heard_s, known_s), round_trip_s)
            return Connection(inode, local, "", False, known_s if state == _SYN_SENT else 0.0, 0.0)
        finally:
            handle.detach()  # it is not ours to close

    def _probe(self, handle: socket.socket) -> None:
        """Have the kernel ask once a period (its own unit is a second) whether the other end is there.

        The verdict is not the kernel's: it knows nothing of the queue that its probes may stand in.
        """
        seconds = max(1, int(self._period_s))
        if handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) != seconds:
            for option, value in ((socket.TCP_KEEPINTVL, seconds), (socket.TCP_KEEPCNT, 127)):
                handle.setsockopt(socket.IPPROTO_TCP, option, value)
            handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds)
            handle.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def connecting_to(inode: int) -> str:
    """Where the socket with this inode is trying to connect to, or nothing: the socket itself does not tell that."""
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        path = Path("/proc/self/net") / table
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            fields = line.split()
            if fields[9] == str(inode):
                host, port = fields[2].split(":")
                words = struct.unpack(f">{len(host) // 8}I", bytes.fromhex(host))
                return _name((socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words)), int(port, 16)))
    return ""


def _descriptors() -> list[int]:
    folder = "/proc/self/fd"
    return [int(name) for name in os.listdir(folder)] if hasattr(socket, "TCP_INFO") and os.path.isdir(folder) else []


def _name(address: tuple) -> str:
    host = ip_address(address[0].split("%")[0])
    plain = getattr(host, "ipv4_mapped", None) or host
    return f"{plain}:{address[1]}"
