"""What the wire costs beside its bytes: `python benchmarks/wire.py [--quick] [--only setup|messages]`.

Set-up: 4 stages × 2 replicas, a process a rank, from the first word to rank 0 until all have agreed ("join"), and from
there until every rank has all its groups ("groups"); then the all-reduce of a few numbers over all ranks that ends each
update ("vote"). On loopback, and in a lab (`tests/lab`) in which every rank is a host of its own with 100 ms of delay
each way to every other one: there the figure that counts is round trips.

Messages: two processes on loopback. A `Sender` and a `Receiver` (comm/link.py) over a Gloo group, against the group's
own Gloo, with buffers that were allocated before. Both take turns in one run, so that the machine's moods meet them
alike. Then the same with 100 ms of delay each way.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from farspan.comm.codecs.codec import RawCodec
from farspan.comm.groups.gloo import GlooGroup
from farspan.comm.lanes.lane import ThreadLane, Ticket
from farspan.comm.link import WINDOW, Receiver, Sender
from farspan.comm.meeting.rendezvous import Rendezvous
from farspan.comm.topology import Topology
from farspan.runtime.flags.config import Config
from farspan.runtime.setup.network import find_network
from farspan.runtime.setup.prepare import keep_freed_memory
from farspan.runtime.setup.wiring import connect
from torch.distributed import FileStore

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "lab"))
from lab import Host, lab, why_not

STAGES, REPLICAS = 4, 2
DELAY_MS = 100.0
PATIENCE_S = 120.0
KIB, MIB = 2**10, 2**20

# The server imports everything once; each rank is a fork of it.
_server = multiprocessing.get_context("forkserver")


def play(ranks: int, act: Callable[..., Any], *words: object, hosts: Sequence[Host] | None = None) -> list[Any]:
    """Run `act(rank, gate, *words)` in a process a rank, at once; what each sent through its gate."""
    gates, processes = [], []
    try:
        for rank in range(ranks):
            ours, theirs = _server.Pipe()
            what = (act, hosts[rank] if hosts else None, rank, theirs, *words)
            processes.append(_server.Process(target=_rank, args=what, daemon=True))
            processes[-1].start()
            theirs.close()
            gates.append(ours)
        for gate in gates:
            gate.recv()  # it is there
        for gate in gates:
            gate.send("go")
        answers = []
        for rank, gate in enumerate(gates):
            if not gate.poll(PATIENCE_S):
                raise SystemExit(f"rank {rank} says nothing")
            answers.append(gate.recv())
        return answers
    finally:
        for process in processes:
            process.kill()
            process.join()


def _rank(act: Callable[..., Any], host: Host | None, rank: int, gate: Connection, *words: object) -> None:
    if host is not None:
        host.enter()
    torch.set_num_threads(1)
    gate.send("here")
    gate.recv()
    gate.send(act(rank, *words))
    gate.recv()  # until it is killed: others may not be ready yet


# ---- set-up


def set_up(rank: int, url: str) -> tuple[float, float, float]:
    """Seconds until all have agreed, from there until this rank has its groups, and of a vote (median of 5)."""
    topology = Topology(REPLICAS, STAGES)
    config = Config(
        rank=rank, world_size=topology.world, pipeline_group_size=STAGES, data_group_size=REPLICAS, dist_url=url
    )
    network = find_network(config)
    start = time.monotonic()
    meeting = Rendezvous(url, rank, topology.world, timeout_s=PATIENCE_S, on_hopeless=sys.exit, via=network.wire)
    meeting.agree({"who": "all of us"})
    met = time.monotonic()
    wires = connect(config, topology, meeting, network, True, torch.device("cpu"), None)
    times = [time.monotonic()]
    assert wires.world is not None
    for _ in range(6):
        wires.world.all_reduce(torch.zeros(64), timeout_s=PATIENCE_S)
        times.append(time.monotonic())
    # The first waits for the last rank to be ready.
    return met - start, times[0] - met, median(b - a for a, b in pairwise(times[1:]))


def time_set_up(times: int, hosts: Sequence[Host] | None = None) -> tuple[float, ...]:
    """Medians, over several set-ups, of the slowest rank's seconds: joining, groups, both, a vote."""
    slowest = []
    for _ in range(times):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        url = f"tcp://{hosts[0].address if hosts else '127.0.0.1'}:{port}"
        answers = play(STAGES * REPLICAS, set_up, url, hosts=hosts)
        joins, groups, votes = (max(column) for column in zip(*answers, strict=True))
        slowest.append((joins, groups, max(join + group for join, group, _ in answers), votes))
    return tuple(map(median, zip(*slowest, strict=True)))


def setup_table(quick: bool) -> None:
    times = 2 if quick else 5
    print(f"\n{STAGES} stages × {REPLICAS} replicas | join | groups | both | a vote\n---|---|---|---|---")
    print(row("loopback, seconds", "{:.3f}", time_set_up(times)), flush=True)
    if why_not():
        print(f"(no figures from the lab: {why_not()})")
        return
    with lab({"hosts": STAGES * REPLICAS, "delay_ms": DELAY_MS}) as hosts:
        seconds = time_set_up(times, hosts)
    trip_s = 2 * DELAY_MS / 1000
    print(row(f"{1000 * trip_s:.0f} ms round trip, seconds", "{:.2f}", seconds))
    print(row("… in round trips", "{:.1f}", [value / trip_s for value in seconds]))


def row(label: str, style: str, values: Iterable[float]) -> str:
    return " | ".join([label, *map(style.format, values)])


# ---- messages


class Bare:
    """Gloo alone: one message after the other, through one buffer."""

    def __init__(self, group: GlooGroup, x: torch.Tensor) -> None:
        self._pg, self._x, self._to = group._pg, x, 1 - group.rank

    def send(self, count: int) -> None:
        for _ in range(count):
            self._pg.send([self._x], self._to, 0).wait()

    def expect(self, count: int) -> None:
        """Nothing: Gloo alone posts a receive when it is asked for, and waits for what it sends at once."""

    def finish(self) -> None:
        """Nothing, likewise."""

    def receive(self, count: int) -> None:
        for _ in range(count):
            self._pg.recv([self._x], self._to, 0).wait()


class Linked:
    """The same through a `Sender` and a `Receiver`."""

    def __init__(self, out: GlooGroup, into: GlooGroup, x: torch.Tensor) -> None:
        self._x, peer = x, 1 - out.rank
        self._tickets: list[Ticket] = []
        self._sender = Sender(out, peer, RawCodec(), ThreadLane("send"), PATIENCE_S)
        self._receiver = Receiver(
            into, peer, RawCodec(), ThreadLane("receive"), PATIENCE_S, device=torch.device("cpu"), window=WINDOW
        )

    def send(self, count: int) -> None:
        self._tickets += [self._sender.send(self._x) for _ in range(count)]

    def finish(self) -> None:
        """A run waits for what it sent when it must: at the end of its step."""
        for ticket in self._tickets:
            ticket.get()
        self._tickets = []

    def expect(self, count: int) -> None:
        self._receiver.expect(count, tuple(self._x.shape), self._x.dtype)

    def receive(self, count: int) -> None:
        for _ in range(count):
            self._receiver.recv().get()


def messages(rank: int, folder: str, interface: str, nbytes: int, count: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a message of each kind, by round: `count` at once (a stream), and there and back (half of it)."""
    keep_freed_memory()
    store = FileStore(f"{folder}/meeting-{nbytes}", 2)
    names = "gate", "out", "back", "bare", "bare back"
    groups = {name: GlooGroup(store, name, (0, 1), rank, interface, PATIENCE_S) for name in names}
    x = torch.ones(nbytes // 4)
    out, back = ("out", "back") if rank == 0 else ("back", "out")
    linked = Linked(groups[out], groups[back], x)
    bare, bare_back = Bare(groups["bare"], x), Bare(groups["bare back"], x)

    def stream(end: Bare | Linked) -> None:
        if rank == 0:
            end.send(count)
            end.finish()
        else:
            end.expect(count)
            end.receive(count)

    def there_and_back(first: Bare | Linked, second: Bare | Linked) -> None:
        out, into = (first, second) if rank == 0 else (second, first)
        into.expect(count // 2)
        for _ in range(count // 2):
            if rank == 0:
                out.send(1)
                into.receive(1)
            else:
                into.receive(1)
                out.send(1)
        out.finish()

    work = {
        "stream, bare": partial(stream, bare),
        "stream, Link": partial(stream, linked),
        "there and back, bare": partial(there_and_back, bare, bare_back),
        "there and back, Link": partial(there_and_back, linked, linked),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + 1):
        for name, run in work.items():
            groups["gate"].barrier(timeout_s=PATIENCE_S)
            start = time.perf_counter()
            run()
            if turn:  # the first finds cold memory
                seconds[name].append((time.perf_counter() - start) / count)
    return seconds


def message_table(quick: bool) -> None:
    print("\nmicroseconds a message | bare Gloo | Link | Link ÷ bare\n---|---|---|---")
    for label, nbytes, count in (("4 KiB", 4 * KIB, 200), ("4 MiB", 4 * MIB, 20)):
        with tempfile.TemporaryDirectory() as folder:
            seconds = play(2, messages, folder, "lo", nbytes, count, 5 if quick else 40)[1]
        for pattern in ("stream", "there and back"):
            bare, link = seconds[f"{pattern}, bare"], seconds[f"{pattern}, Link"]
            ratio = median(b / a for a, b in zip(bare, link, strict=True))
            print(f"{label}, {pattern} | {1e6 * median(bare):.0f} | {1e6 * median(link):.0f} | {ratio:.2f}", flush=True)


def far_table(quick: bool) -> None:
    print(f"\nround trips a message, of {2 * DELAY_MS:.0f} ms | bare Gloo | Link\n---|---|---")
    with lab({"hosts": 2, "delay_ms": DELAY_MS}) as hosts, tempfile.TemporaryDirectory() as folder:
        seconds = play(2, messages, folder, hosts[0].interface, 64 * KIB, 20, 1 if quick else 3, hosts=hosts)[1]
    for pattern in ("stream", "there and back"):
        trips = [median(seconds[f"{pattern}, {kind}"]) / (2e-3 * DELAY_MS) for kind in ("bare", "Link")]
        print(row(f"64 KiB, {pattern}", "{:.2f}", trips), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repetitions")
    parser.add_argument("--only", choices=("setup", "messages"))
    args = parser.parse_args()
    _server.set_forkserver_preload(["__main__"])
    if args.only != "messages":
        setup_table(args.quick)
    if args.only != "setup":
        message_table(args.quick)
        if not why_not():
            far_table(args.quick)
