"""The lab does what its matrix says, changes when told to, and leaves nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab import Host, Lab, LabError, lab, placed, why_not
from namespaces import processes_in

needs_lab = pytest.mark.skipif(bool(why_not()), reason=why_not())
FOLDER = Path(__file__).parent
PORT = 5000
SOON_S = 20.0


@pytest.fixture(scope="module")
def pair() -> Iterator[Lab]:
    """Two hosts, which every test leaves as it found them."""
    with lab({"hosts": 2, "rate_mbit": 40, "delay_ms": 20}) as hosts:
        yield hosts


def listen(host: Host, port: int = PORT) -> socket.socket:
    with host.inside():
        return socket.create_server((host.address, port))


def connect(host: Host, to: str, port: int = PORT, timeout_s: float = SOON_S) -> socket.socket:
    with host.inside():
        return socket.create_connection((to, port), timeout=timeout_s)


def round_trip(a: Host, b: Host, interface: str = "wan0") -> float:
    """Seconds from a to b and back: what TCP's handshake takes, at best of 5."""
    with b.inside(), socket.create_server((b.addresses[interface], PORT)):
        times = []
        for _ in range(5):
            start = time.monotonic()
            connect(a, b.addresses[interface]).close()
            times.append(time.monotonic() - start)
    return min(times)


def mbit_of(a: Host, b: Host, seconds: float = 1.0) -> float:
    """What one connection carries from a to b, Mbit/s, once it has got going."""
    with listen(b) as server, connect(a, b.address) as out, server.accept()[0] as into:
        got, done = [0], threading.Event()
        out.settimeout(0.5)
        into.settimeout(0.5)

        def write() -> None:
            while not done.is_set():
                out.send(bytes(100_000))

        def read() -> None:
            while not done.is_set():
                got[0] += len(into.recv(1_000_000))

        threads = [threading.Thread(target=work) for work in (write, read)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        start, before = time.monotonic(), got[0]
        time.sleep(seconds)
        rate = (got[0] - before) * 8e-6 / (time.monotonic() - start)
        done.set()
        for thread in threads:
            thread.join(SOON_S)
        return rate


def datagrams(a: Host, b: Host) -> tuple[socket.socket, socket.socket]:
    """A socket on each, sending to the other."""
    ends = []
    for host in (a, b):
        with host.inside():
            ends.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        ends[-1].bind((host.address, PORT))
        ends[-1].settimeout(0.3)
    ends[0].connect((b.address, PORT))
    ends[1].connect((a.address, PORT))
    return ends[0], ends[1]


def arrives(source: socket.socket, target: socket.socket) -> bool:
    source.send(b"hello")
    try:
        return target.recv(100) == b"hello"
    except TimeoutError:
        return False


@needs_lab
def test_a_packet_takes_the_delay_each_way(pair: Lab) -> None:
    assert 0.040 <= round_trip(pair[0], pair[1]) < 0.050


@needs_lab
def test_a_link_carries_its_rate(pair: Lab) -> None:
    rates = []
    while not rates or (rates[-1] < 0.8 * 40 and len(rates) < 3):  # others may need the machine for a moment
        rates.append(mbit_of(pair[1], pair[0]))
    assert 0.8 * 40 < rates[-1] < 1.05 * 40


@needs_lab
def test_rate_and_delay_change_while_it_runs(pair: Lab) -> None:
    pair.set(0, 1, delay_ms=50, one_way=True)
    assert 0.070 <= round_trip(pair[0], pair[1]) < 0.080
    pair.set(0, 1, delay_ms=5, rate_mbit=8)
    assert 0.010 <= round_trip(pair[0], pair[1]) < 0.020
    assert 0.7 * 8 < mbit_of(pair[0], pair[1]) < 1.1 * 8
    pair.set(0, 1, delay_ms=20, rate_mbit=40)


@needs_lab
def test_a_cut_link_says_nothing_and_goes_on_when_mended(pair: Lab) -> None:
    with listen(pair[0]) as server, connect(pair[1], pair[0].address) as out, server.accept()[0] as into:
        pair.cut(0, 1)
        out.sendall(b"into the dark")
        into.settimeout(0.5)
        with pytest.raises(TimeoutError):
            into.recv(100)
        with pytest.raises(TimeoutError):
            connect(pair[1], pair[0].address, timeout_s=0.5)
        pair.mend(0, 1)
        into.settimeout(SOON_S)
        assert into.recv(100) == b"into the dark"


@needs_lab
def test_a_link_can_be_cut_one_way(pair: Lab) -> None:
    a, b = datagrams(pair[0], pair[1])
    with a, b:
        assert (arrives(a, b), arrives(b, a)) == (True, True)
        pair.cut(0, 1, one_way=True)
        assert (arrives(a, b), arrives(b, a)) == (False, True)
        pair.mend(0, 1)
        assert (arrives(a, b), arrives(b, a)) == (True, True)


@needs_lab
def test_what_is_on_the_way_is_lost_when_the_link_is_cut(pair: Lab) -> None:
    a, b = datagrams(pair[0], pair[1])
    with a, b:
        pair.set(0, 1, delay_ms=200)
        a.send(b"hello")
        time.sleep(0.05)
        pair.cut(0, 1)
        with pytest.raises(TimeoutError):
            b.recv(100)
        pair.mend(0, 1)
        pair.set(0, 1, delay_ms=20)
        assert arrives(a, b)


@needs_lab
def test_a_firewall_lets_named_ports_pass_alone(pair: Lab) -> None:
    with listen(pair[0]), listen(pair[0], 6000):
        pair.firewall([6000])
        with connect(pair[1], pair[0].address, 6000), pytest.raises(TimeoutError):
            connect(pair[1], pair[0].address, PORT, timeout_s=0.5)
        pair.firewall(None)
        connect(pair[1], pair[0].address).close()


@needs_lab
def test_an_interface_goes_down_and_comes_back(pair: Lab) -> None:
    a, b = datagrams(pair[0], pair[1])
    with a, b:
        pair[1].down()
        assert not arrives(a, b)
        pair[1].up()
        assert arrives(a, b)
        assert arrives(b, a)


@needs_lab
def test_every_pair_and_interface_has_its_own_delay() -> None:
    matrix = {
        "hosts": 3,
        "interfaces": {"wan0": {"delay_ms": [[0, 10, 30], [15, 0, 5], [30, 5, 0]]}, "lan0": {"jitter_ms": 1}},
    }
    with lab(matrix) as hosts:
        assert [host.interface for host in hosts] == ["wan0"] * 3
        for (a, b), expected in {(0, 1): 0.025, (0, 2): 0.060, (1, 2): 0.010}.items():
            assert expected <= round_trip(hosts[a], hosts[b]) < expected + 0.010
            assert round_trip(hosts[a], hosts[b], "lan0") < 0.010
        hosts.cut(0, 1)
        assert round_trip(hosts[0], hosts[1], "lan0") < 0.010
        hosts[0].drop_address("lan0")
        with pytest.raises(OSError, match="unreachable"):
            connect(hosts[0], hosts[1].addresses["lan0"])


@needs_lab
def test_jitter_spreads_the_delay_and_keeps_the_order() -> None:
    with lab({"hosts": 2, "delay_ms": 30, "jitter_ms": 20}) as hosts:
        a, b = datagrams(hosts[0], hosts[1])
        with a, b:
            took = []
            for _ in range(20):
                start = time.monotonic()
                assert arrives(a, b)
                took.append(time.monotonic() - start)
            assert min(took) >= 0.010
            assert max(took) - min(took) > 0.010
            for number in range(50):
                a.send(str(number).encode())
            assert [int(b.recv(100)) for _ in range(50)] == list(range(50))


@needs_lab
def test_a_rate_of_null_is_no_link() -> None:
    with lab({"hosts": 2, "rate_mbit": [[None, 10], [None, None]]}) as hosts:
        a, b = datagrams(hosts[0], hosts[1])
        with a, b:
            assert (arrives(a, b), arrives(b, a)) == (True, False)


@needs_lab
def test_leaving_ends_whatever_still_runs() -> None:
    with lab({"hosts": 2}) as hosts:
        child = hosts[1].popen(["sh", "-c", "setsid sleep 1000 & sleep 1000"])
        while len(processes_in(hosts._inodes)) < 3:
            assert child.poll() is None
            time.sleep(0.01)
    assert child.wait(SOON_S) == -signal.SIGKILL
    assert processes_in(hosts._inodes) == []
    assert hosts._forwarder.returncode == 0


OWNER = """
import os, sys, time
from lab import lab
hosts = lab({"hosts": 2})
hosts[1].popen(["sh", "-c", "setsid sleep 1000 & sleep 1000"])
print(hosts._forwarder.pid, *hosts._inodes, flush=True)
time.sleep(1000)
"""


@needs_lab
def test_nothing_is_left_when_the_owner_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], cwd=FOLDER, stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout is not None
            forwarder, *inodes = map(int, owner.stdout.readline().split())
            deadline = time.monotonic() + SOON_S
            while len(processes_in(inodes)) < 3:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            owner.kill()
    while processes_in(inodes) or Path(f"/proc/{forwarder}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@needs_lab
def test_a_lab_whose_links_were_killed_says_so_and_still_ends_its_processes() -> None:
    with lab({"hosts": 2}) as hosts:
        child = hosts[0].popen(["sleep", "1000"])
        with pytest.raises(LabError, match="no link 0 → 2 over wan0"):
            hosts.cut(0, 2)
        os.kill(hosts._forwarder.pid, signal.SIGKILL)
        with pytest.raises(LabError, match="ended with -9"):
            hosts.cut(0, 1)
    assert child.wait(SOON_S) == -signal.SIGKILL


@needs_lab
def test_a_person_runs_a_command_on_every_host(tmp_path: Path) -> None:
    matrix = tmp_path / "matrix.json"
    matrix.write_text('{"hosts": 2}')
    script = "echo {rank} {world} {address} {interface} {master} ${HOME}; exit {rank}"
    words = [sys.executable, str(FOLDER), str(matrix), "--", "sh", "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, timeout=SOON_S, env={**os.environ, "HOME": "here"})
    assert sorted(done.stdout.splitlines()) == [
        "0 2 10.77.0.1 wan0 10.77.0.1 here",
        "1 2 10.77.0.2 wan0 10.77.0.1 here",
    ]
    assert done.returncode == 1
    done = subprocess.run([*words[:2], "none.json", "--", "true"], capture_output=True, text=True, timeout=SOON_S)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def test_only_known_words_are_filled_in() -> None:
    host = Host(0, {"wan0": "10.77.0.1"}, "")
    assert list(placed([host], ["{rank}{world}", '{"a": {master}}'])) == [["01", '{"a": 10.77.0.1}']]


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        ({}, "hosts: None"),
        ({"hosts": 0}, "hosts: 0"),
        ({"hosts": 2, "delay": 3}, "wan0 has delay; known are"),
        ({"hosts": 2, "delay_ms": [[0, 1]]}, "delay_ms must be a number or 2 rows of 2"),
        ({"hosts": 2, "rate_mbit": 0}, "rate_mbit from 0 to 1 is 0"),
        ({"hosts": 2, "delay_ms": "far"}, "delay_ms from 0 to 0 is 'far'"),
    ],
)
def test_a_matrix_that_makes_no_sense_is_refused(matrix: dict[str, Any], said: str) -> None:
    with pytest.raises(LabError, match=said):
        lab(matrix)
