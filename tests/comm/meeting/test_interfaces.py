"""Interfaces by name and by route, and what a person reads when the name was wrong."""

from __future__ import annotations

import ipaddress
import re
import socket

import pytest
from farspan.comm.errors import InterfaceError
from farspan.comm.meeting import interfaces as room
from farspan.comm.meeting.interfaces import Interface, interface, interface_towards, interfaces

MACHINE = {
    "lo": Interface("lo", ("127.0.0.1", "::1"), up=True, mtu=65536),
    "eth0": Interface("eth0", ("10.0.0.5",), up=True, mtu=1500),
    "wg0": Interface("wg0", ("10.9.0.2",), up=False, mtu=1420),
    "ib0": Interface("ib0", (), up=True, mtu=4092),
}
HERE = "name one that reaches the others; this machine has: lo 127.0.0.1, eth0 10.0.0.5, wg0 10.9.0.2, ib0 (no address)"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "interfaces", lambda: MACHINE)


def test_the_loopback_is_found() -> None:
    lo = interface("lo")
    assert lo == interfaces()["lo"]
    assert "127.0.0.1" in lo.addresses
    assert lo.up
    assert lo.mtu > 0


def test_every_interface_bears_its_name_and_ip_addresses_only() -> None:
    for name, found in interfaces().items():
        assert found.name == name
        versions = [ipaddress.ip_address(address).version for address in found.addresses]
        assert versions == sorted(versions)


@pytest.mark.usefixtures("machine")
def test_an_unknown_name_is_refused_with_what_is_here() -> None:
    assert interface("eth0") is MACHINE["eth0"]
    for name, why in (
        ("eth7", "no interface eth7 here"),
        ("wg0", "interface wg0 is down"),
        ("ib0", "interface ib0 has no address"),
    ):
        with pytest.raises(InterfaceError) as caught:
            interface(name)
        assert str(caught.value) == f"{why}; {HERE}"


def test_the_real_machine_is_listed_too() -> None:
    with pytest.raises(InterfaceError) as caught:
        interface("no-such-interface")
    for name in interfaces():
        assert re.search(rf"[:,] {re.escape(name)} \S", str(caught.value))


def test_the_route_to_this_machine_is_the_loopback() -> None:
    assert interface_towards("127.0.0.1", 9000).name == "lo"


def test_no_route_or_no_such_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(InterfaceError) as caught:
        interface_towards("nowhere", 9000)
    assert str(caught.value) == "no route to the master nowhere: Name or service not known; check --dist-url"


def test_an_address_that_no_interface_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "interfaces", lambda: {"eth0": MACHINE["eth0"]})
    with pytest.raises(InterfaceError) as caught:
        interface_towards("127.0.0.1", 9000)
    assert str(caught.value) == (
        "no interface holds 127.0.0.1, the address towards 127.0.0.1; name one with --net-interface"
    )
