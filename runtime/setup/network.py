"""Which interfaces this rank's traffic takes: what the flags say, and nothing else that contradicts them."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address

from ...comm.errors import InterfaceError
from ...comm.meeting.interfaces import Interface, interface, interface_towards, interfaces
from ...comm.meeting.rendezvous import parse_url
from ..flags.config import Config


@dataclass(frozen=True)
class Network:
    """`wire` carries everything but what replicas sum: that goes over `gradients`, most often the same interface."""

    wire: Interface
    gradients: Interface
    named: bool
    """Whether `wire` was asked for; else it is the one whose route reaches rank 0."""

    def __str__(self) -> str:
        same = self.gradients == self.wire
        return self.wire.name if same else f"{self.wire.name} ({self.gradients.name} between replicas)"

    def of(self, group: str) -> str:
        """The name of the interface for a group (see `group_members` in `runtime/setup/wiring.py`)."""
        return (self.gradients if group.startswith("replicas of stage") else self.wire).name


def find_network(config: Config, environ: Mapping[str, str] = os.environ) -> Network:
    """Raises `InterfaceError` for an interface that cannot be used, or that contradicts another setting."""
    master, port = parse_url(config.dist_url)
    if config.net_interface:
        wire, said = interface(config.net_interface), f"--net-interface {config.net_interface}"
        _check_master(config, wire, master)
    else:
        wire = interface_towards(master, port)
        said = f"{wire.name}, which the route to rank 0 takes where no --net-interface is given"
    _check_environment(config, wire.name, said, environ, any_backend=bool(config.net_interface))
    if not config.dp_net_interface:
        return Network(wire, wire, bool(config.net_interface))
    gradients = interface(config.dp_net_interface)
    _check_environment(config, gradients.name, f"--dp-net-interface {gradients.name}", environ, any_backend=True)
    return Network(wire, gradients, bool(config.net_interface))


def permits(variable: str, value: str, name: str) -> bool:
    """Whether GLOO_SOCKET_IFNAME (names) or NCCL_SOCKET_IFNAME (prefixes; `=`: names; `^`: all others) fits `name`."""
    if variable == "GLOO_SOCKET_IFNAME":
        return name in value.split(",")
    but, value = value.startswith("^"), value.removeprefix("^")
    exact, value = value.startswith("="), value.removeprefix("=")
    return but != any(name == word if exact else name.startswith(word) for word in value.split(","))


def _check_environment(config: Config, name: str, said: str, environ: Mapping[str, str], *, any_backend: bool) -> None:
    nccl = any_backend or "nccl" in config.dist_backend + config.dp_backend
    for variable in ("GLOO_SOCKET_IFNAME", *(["NCCL_SOCKET_IFNAME"] if nccl else [])):
        value = environ.get(variable, "")
        if value and not permits(variable, value, name):
            raise InterfaceError(
                f"rank {config.rank}: {variable}={value} contradicts {said}: unset the one or mend the other"
            )


def _check_master(config: Config, wire: Interface, master: str) -> None:
    """The interface that was named, against the address that --dist-url names."""
    try:
        named = {str(info[4][0]) for info in socket.getaddrinfo(master, None)}
    except (OSError, UnicodeError):
        return  # no such name: meeting the others says so
    holders = {found.name for found in interfaces().values() if named & set(found.addresses)}
    if not holders and all(ip_address(a).is_loopback for a in wire.addresses):
        raise InterfaceError(
            f"rank {config.rank}: --net-interface {wire.name} reaches this machine alone, and rank 0 is at {master}: "
            "name the interface that leads there"
        )
    # Rank 0 serves the store at that address. A loopback's is for a run inside one machine, on whatever interface.
    inside = all(ip_address(a.split("%")[0]).is_loopback for a in named)
    if config.rank == 0 and holders and wire.name not in holders and not inside:
        raise InterfaceError(
            f"rank 0: --dist-url names {master}, an address of {', '.join(sorted(holders))}, and --net-interface "
            f"{wire.name}: name {wire.addresses[0]} in --dist-url, or another interface"
        )
