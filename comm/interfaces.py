"""Network interfaces of this machine: by name, or by the route that reaches a host."""

from __future__ import annotations

import socket
from dataclasses import dataclass

import psutil

from .errors import InterfaceError


@dataclass(frozen=True)
class Interface:
    """One interface: its IP addresses (IPv4 first), whether it is up, and its MTU in bytes."""

    name: str
    addresses: tuple[str, ...]
    up: bool
    mtu: int


def interfaces() -> dict[str, Interface]:
    """All interfaces of this machine, by name."""
    stats = psutil.net_if_stats()
    found = {}
    for name, entries in psutil.net_if_addrs().items():
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
    here = f"this machine has: {_inventory(found)}"
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
