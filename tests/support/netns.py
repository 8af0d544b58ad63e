"""Hosts of a test as anonymous network namespaces, joined by cables (veth pairs). Needs root; leaves nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import namespaces
import pytest


@dataclass(frozen=True)
class Host:
    """One namespace, held by the process `pid`."""

    pid: int

    def ip(self, words: str) -> str:
        """Run `ip …` in it."""
        return _run(f"nsenter -t {self.pid} -n ip {words}")

    def set(self, name: str, value: str) -> None:
        """A kernel parameter of it, by its path in /proc/sys."""
        command = ["nsenter", "-t", str(self.pid), "-n", "tee", f"/proc/sys/{name}"]
        done = subprocess.run(command, input=value, capture_output=True, text=True, timeout=20)
        assert done.returncode == 0, f"{name} {value}: {done.stderr}"

    def ports(self) -> set[int]:
        """Its own TCP ports at which somebody listens or is connected."""
        with open(f"/proc/{self.pid}/net/tcp") as file:
            rows = [line.split() for line in file.readlines()[1:]]
        return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] in ("0A", "01")}

    def enter(self) -> None:
        """Move this thread, and those that it will start, into it."""
        namespaces.enter(f"/proc/{self.pid}/ns/net")

    def sent(self) -> dict[str, int]:
        """Interface → bytes sent."""
        with open(f"/proc/{self.pid}/net/dev") as file:
            rows = [line.split(":") for line in file.readlines()[2:]]
        return {name.strip(): int(counts.split()[8]) for name, counts in rows}


@contextmanager
def hosts(count: int, cables: Sequence[str] = ()) -> Iterator[list[Host]]:
    """`count` hosts; each name in `cables` becomes an interface of the first two, 10.77.K.1 and 10.77.K.2 on the K-th.

    Skips the test, saying why, where this cannot be.
    """
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    for tool in ("unshare", "nsenter", "ip"):
        if shutil.which(tool) is None:
            pytest.skip(f"network namespaces need the program {tool}")
    if (tried := subprocess.run(["unshare", "-n", "true"], capture_output=True, text=True)).returncode:
        pytest.skip(f"no network namespaces here: {tried.stderr.strip()}")
    holders: list[subprocess.Popen[bytes]] = []
    start = time.monotonic()
    try:
        made = []
        for _ in range(count):
            # The namespace is there when the shell says so; it ends with its input, so also when this process dies.
            holder = subprocess.Popen(
                ["unshare", "-n", "sh", "-c", "echo; read _"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            holders.append(holder)
            assert holder.stdout is not None
            holder.stdout.readline()
            made.append(Host(holder.pid))
            made[-1].ip("link set lo up")
        for k, name in enumerate(cables):
            _run(f"ip link add {name} netns {made[0].pid} type veth peer name {name} netns {made[1].pid}")
            for number, host in enumerate(made[:2], 1):
                host.ip(f"addr add 10.77.{k}.{number}/24 dev {name}")
                host.ip(f"link set {name} up")
        for host in made[:2]:
            while any("state UP" not in host.ip(f"link show dev {name}") for name in cables):  # moments later
                assert time.monotonic() - start < 20
                time.sleep(0.01)
        yield made
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()


def _run(command: str) -> str:
    done = subprocess.run(command.split(), capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout
