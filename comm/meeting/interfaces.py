"""Network interfaces of this machine: by name, or by the route that reaches a host."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass

import psutil

from ..errors import InterfaceError


@dataclass(frozen=True)
class Interface:
    """One interface: its IP addresses (IPv4 first), whether it is up, and its MTU in bytes."""

    name: str
    addresses: tuple[str, ...]
    up: bool
    mtu: int


def interfaces() -> dict[str, Interface]:
    """All interfaces of this machine, by name."""
    stats, addresses = psutil.net_if_stats(), psutil.net_if_addrs()
    found = {}
    for name in dict.fromkeys([*addresses, *stats]):  # what has no address at all is in `stats` alone
        entries = addresses.get(name, [])
        v4 = [e.address for e in entries if e.family == socket.AF_INET]
        v6 = [e.address.split("%")[0] for e in entries if e.family == socket.AF_INET6]
        state = stats.get(name)
        found[name] = Interface(name, (*v4, *v6), bool(state and state.isup), state.mtu if state else 0)
    return found


def _inventory(found: dict[str, Interface]) -> str:
    return ", ".join(f"{i.name} {i.addresses[0] if i.addresses else '(no address)'}" for i in found.values())


def interface(name: str) -> Interface:
    """The interface called `name`. Raises `InterfaceError` where it is absent, down, or has no address."""
    found = interfaces()
    here = f"name one that reaches the others; this machine has: {_inventory(found)}"
    if name not in found:
        raise InterfaceError(f"no interface {name} here; {here}")
    if not found[name].addresses:
        raise InterfaceError(f"interface {name} has no address; {here}")
    if not found[name].up:
        raise InterfaceError(f"interface {name} is down; {here}")
    return found[name]


def interface_towards(host: str, port: int) -> Interface:
    """The interface whose route reaches `host`. Nothing is sent: a connected UDP socket has just been routed."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            local = probe.getsockname()[0]
    except (OSError, UnicodeError) as error:  # no route, no such name, or no name at all
        raise InterfaceError(f"no route to the master {host}: {error}; check --dist-url") from error
    found = interfaces()
    for candidate in found.values():
        if local in candidate.addresses:
            return candidate
    raise InterfaceError(f"no interface holds {local}, the address towards {host}; name one with --net-interface")


def connect_from(host: str, port: int, via: Interface | None, timeout_s: float) -> socket.socket:
    """A TCP connection to (host, port) that leaves by `via` [by the route]. Raises `OSError`.

    A connection to this very machine stays inside it, whatever `via` is.
    """
    failed: OSError | None = None
    local = {address for found in interfaces().values() for address in found.addresses}
    for family, kind, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        connection = socket.socket(family, kind)
        try:
            if via is not None and address[0] not in local:
                _leave_by(connection, via)
            connection.settimeout(timeout_s)
            connection.connect(address)
            return connection
        except OSError as error:
            failed = failed or error
            connection.close()
    raise failed or OSError(f"{host} has no address")


def _leave_by(connection: socket.socket, via: Interface) -> None:
    """Bind to the interface where the system allows it (Linux), else at least to one of its addresses."""
    if hasattr(socket, "SO_BINDTODEVICE"):
        with contextlib.suppress(PermissionError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, via.name.encode())
            return
    six = connection.family == socket.AF_INET6
    own = next((a for a in via.addresses if (":" in a) == six and not a.startswith("fe80:")), None)
    if own is None:
        raise OSError(f"{via.name} has no IPv{6 if six else 4} address")
    connection.bind((own, 0))
