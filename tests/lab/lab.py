"""A wide-area network on one machine: hosts are network namespaces, joined by links with rate, delay, jitter and cuts.

    with lab({"hosts": 2, "rate_mbit": 50, "delay_ms": 20}) as hosts:
        server = hosts[0].popen(["iperf3", "-s", "-1"])
        hosts[1].run(["iperf3", "-c", hosts[0].address])
        hosts.cut(0, 1)

A matrix holds the number of `hosts` and, for the links,

    rate_mbit   Mbit/s in each direction; without it, as fast as the machine is
    delay_ms    one way
    jitter_ms   the delay differs evenly by up to ± this; packets stay in order
    queue_ms    what would wait longer for the line is dropped (200)

each a number for all pairs, or a matrix of numbers by [from][to]; a rate of null there is no link. `mtu` is one number
(9000). `interfaces`, as in {"wan0": {…}, "lan0": {…}}, gives every host several, each with links of its own; else there
is one, `wan0`.

Needs root and /dev/net/tun; `why_not()` says what is missing. Nothing is left, however the owner ends.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import namespaces

FACTS = ("rate_mbit", "delay_ms", "jitter_ms", "queue_ms")
_ANSWER_S = 10.0


class LabError(RuntimeError):
    """The lab cannot be built, or its matrix makes no sense."""


@cache
def why_not() -> str:
    """What keeps this machine from having a lab, or nothing."""
    if os.geteuid() != 0:
        return "the lab needs root"
    trouble = []

    def attempt() -> None:
        try:
            namespaces.leave_for_a_new_one()  # of this thread alone, and gone with it
            os.close(namespaces.open_tun("try0"))
        except OSError as error:
            trouble.append(f"the lab needs network namespaces and /dev/net/tun: {error}")

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return "".join(trouble)


class Host:
    """One host: its first `interface` and `address`, and all `addresses` by interface. It can be pickled."""

    def __init__(self, rank: int, addresses: dict[str, str], namespace: str) -> None:
        self.rank, self.addresses, self.namespace = rank, addresses, namespace
        self.interface, self.address = next(iter(addresses.items()))

    def enter(self) -> None:
        """Put the calling thread, and all it starts, here for good."""
        namespaces.enter(self.namespace)

    def inside(self) -> AbstractContextManager[None]:
        """The calling thread is here meanwhile; sockets that it opens stay here."""
        return namespaces.inside(self.namespace)

    def popen(self, command: Sequence[str | Path], **options: Any) -> subprocess.Popen:  # noqa: ANN401 - subprocess's
        """`subprocess.Popen` on this host. What still runs when the lab closes is killed, and so are its children."""
        with self.inside():
            return subprocess.Popen(command, **options)

    def run(self, command: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess:  # noqa: ANN401
        """`subprocess.run` on this host."""
        with self.inside():
            return subprocess.run(command, **options)

    def down(self, interface: str = "") -> None:
        with self.inside():
            namespaces.set_up(interface or self.interface, False)

    def up(self, interface: str = "") -> None:
        with self.inside():
            namespaces.set_up(interface or self.interface, True)

    def drop_address(self, interface: str = "") -> None:
        """Leave the interface up and without an address."""
        with self.inside():
            namespaces.drop_address(interface or self.interface)


class Lab(Sequence[Host]):
    """The hosts, by number, and the links between them, which can change at any time."""

    def __init__(self, matrix: dict[str, Any]) -> None:
        spec = _spec(matrix)
        if reason := why_not():
            raise LabError(reason)
        self._lock = threading.Lock()
        self._interfaces = list(spec["interfaces"])
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(_ANSWER_S)
        script = Path(__file__).with_name("forwarder.py")
        with theirs:
            self._forwarder = subprocess.Popen(
                [sys.executable, str(script), json.dumps(spec)],
                stdin=theirs.fileno(), stdout=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self._answers = self._socket.makefile("r")
        made = self._answer()
        self._inodes = made["inodes"]
        self._hosts = []
        for rank, descriptor in enumerate(made["descriptors"]):
            addresses = {name: facts["addresses"][rank] for name, facts in spec["interfaces"].items()}
            self._hosts.append(Host(rank, addresses, f"/proc/{self._forwarder.pid}/fd/{descriptor}"))

    @overload
    def __getitem__(self, rank: int) -> Host: ...
    @overload
    def __getitem__(self, rank: slice) -> Sequence[Host]: ...
    def __getitem__(self, rank: int | slice) -> Host | Sequence[Host]:
        return self._hosts[rank]

    def __len__(self) -> int:
        return len(self._hosts)

    def set(self, a: int, b: int, *, one_way: bool = False, interface: str = "", **change: Any) -> None:  # noqa: ANN401
        """Change the link between hosts a and b, or only from a to b: `rate_mbit`, `delay_ms`, `jitter_ms`, `queue_ms`.

        What is on the way already arrives as it would have.
        """
        if unknown := change.keys() - FACTS:
            raise LabError(f"a link has no {', '.join(sorted(unknown))}; it has {', '.join(FACTS)}")
        self._change([(a, b)] if one_way else [(a, b), (b, a)], interface, change)

    def cut(self, a: int, b: int, *, one_way: bool = False, interface: str = "") -> None:
        """Packets between a and b, or only those from a to b, vanish without a word, also those on the way."""
        self._change([(a, b)] if one_way else [(a, b), (b, a)], interface, {"cut": True})

    def mend(self, a: int, b: int, *, interface: str = "") -> None:
        self._change([(a, b), (b, a)], interface, {"cut": False})

    def firewall(self, ports: Iterable[int] | None, *, interface: str = "") -> None:
        """Between all hosts, only TCP from or to one of `ports` passes, the rest vanishes; None lets all pass again."""
        pairs = [(a, b) for a in range(len(self)) for b in range(len(self)) if a != b]
        self._change(pairs, interface, {"ports": list(ports) if ports is not None else None})

    def close(self) -> None:
        """End all processes on the hosts, and the links. Raises `LabError` where that does not succeed."""
        with self._socket:
            namespaces.end_all_in(self._inodes)
        self._answers.close()
        try:
            self._forwarder.wait(_ANSWER_S)
        except subprocess.TimeoutExpired as error:
            self._forwarder.kill()
            self._forwarder.wait()
            raise LabError("the lab's links did not end by themselves") from error

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, _type: type | None, _error: BaseException | None, _tb: TracebackType | None) -> None:
        self.close()

    def _change(self, pairs: list[tuple[int, int]], interface: str, change: dict[str, Any]) -> None:
        links = [(interface or self._interfaces[0], a, b) for a, b in pairs]
        for name, a, b in links:
            if name not in self._interfaces or a == b or not {a, b} <= set(range(len(self))):
                raise LabError(f"there is no link {a} → {b} over {name}")
        with self._lock:
            self._answer({"links": links, "change": change})

    def _answer(self, order: dict[str, Any] | None = None) -> Any:  # noqa: ANN401 - JSON
        try:
            if order is not None:
                self._socket.sendall(json.dumps(order).encode() + b"\n")
            line = self._answers.readline()
        except OSError:  # also where the answer does not come in time
            line = ""
        if not line:
            self._forwarder.kill()
            raise LabError(f"the lab's links ended with {self._forwarder.wait()}; their reason stands above")
        return json.loads(line)


def lab(matrix: dict[str, Any] | str | Path) -> Lab:
    """A lab by its matrix, or the path of a JSON file of one; use it as a context. Raises `LabError`."""
    if isinstance(matrix, dict):
        return Lab(matrix)
    try:
        return Lab(json.loads(Path(matrix).read_text()))
    except (OSError, ValueError) as error:
        raise LabError(f"{matrix}: {error.strerror if isinstance(error, OSError) else error}") from error


def placed(hosts: Sequence[Host], command: Sequence[str]) -> Iterator[list[str]]:
    """The command for each host, with its {rank}, {world}, {address}, {interface} and {master} (host 0's address)."""
    for host in hosts:
        values = {
            "rank": host.rank,
            "world": len(hosts),
            "address": host.address,
            "interface": host.interface,
            "master": hosts[0].address,
        }
        words = list(command)
        for name, value in values.items():
            words = [word.replace("{" + name + "}", str(value)) for word in words]
        yield words


def _spec(matrix: dict[str, Any]) -> dict[str, Any]:
    """What the forwarder is told: every link of every interface, in full."""
    known = {"hosts", "mtu", *FACTS}
    interfaces = matrix.get("interfaces") or {"wan0": {k: v for k, v in matrix.items() if k != "hosts"}}
    hosts = matrix.get("hosts")
    if not isinstance(hosts, int) or not 1 <= hosts <= 250:
        raise LabError(f"hosts: {hosts!r} is no number from 1 to 250")
    spec: dict[str, Any] = {"hosts": hosts, "interfaces": {}}
    for number, (name, facts) in enumerate(interfaces.items()):
        if unknown := facts.keys() - known:
            raise LabError(f"{name} has {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}")
        links = [[_link(name, facts, hosts, a, b) for b in range(hosts)] for a in range(hosts)]
        addresses = [f"10.77.{number}.{host + 1}" for host in range(hosts)]
        spec["interfaces"][name] = {"addresses": addresses, "mtu": facts.get("mtu", 9000), "links": links}
    return spec


def _link(name: str, facts: dict[str, Any], hosts: int, a: int, b: int) -> dict[str, Any]:
    link: dict[str, Any] = {}
    for fact in FACTS:
        value = facts.get(fact)
        if isinstance(value, list):
            if len(value) != hosts or any(len(row) != hosts for row in value):
                raise LabError(f"{name}: {fact} must be a number or {hosts} rows of {hosts}")
            value = value[a][b]
            if value is None and fact == "rate_mbit":
                link["cut"] = True
        if value is not None:
            if not isinstance(value, int | float) or value < 0 or (fact == "rate_mbit" and value == 0 and a != b):
                raise LabError(f"{name}: {fact} from {a} to {b} is {value!r}")
            link[fact] = value
    return link
