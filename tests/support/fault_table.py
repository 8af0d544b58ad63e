"""What can go wrong between ranks, as data: what happens, and the line that a person reads.

`tests/runtime/test_faults.py` makes each happen, and makes docs/faults.md of it.

In a line, `…` stands for any text and `‹a/b›` for one of two.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from faults import PHASES, meets, other_version, signalled, slow_to_save
from launch import Run

PERIOD_S, PATIENCE_S, JOIN_S = 0.25, 2.5, 3.0
BEYOND_S = 10.0
"""How much later than what is waited for a rank may end."""
STORE_PORT = 7033
AGAIN = "start all ranks again, and they resume"
SILENT = f"is its process stopped, its host down, or a firewall on the way over …? Try ping, then {AGAIN}"

Act = Callable[[Any, Run], object]
"""Does something to the hosts of a lab, or to a run, once it has come to its third step."""


@dataclass(frozen=True)
class Fault:
    """One way to go wrong. Ranks not named otherwise end with a status that is not 0, and say `line`.

    `row` is the table's, which several may share. `hit` is what happens inside ranks; `act`, from outside. `apart` are
    ranks that cannot be told the first cause, and what they say. `waits`: what ranks wait for before they give up,
    beside `seconds` more. `goes_on`: nothing ends, and the run is done.
    """

    name: str
    row: str
    line: str
    stages: int = 3
    replicas: int = 1
    flags: Mapping[str, Any] = field(default_factory=dict)
    by_rank: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    ranks: tuple[int, ...] | None = None
    hit: Mapping[int, Callable[..., None]] = field(default_factory=dict)
    act: Act | None = None
    before: Act | None = None
    lab: Mapping[str, Any] | None = None
    victim: int | None = None
    number: signal.Signals = signal.SIGKILL
    apart: Mapping[int, str] = field(default_factory=dict)
    waits: str = ""
    seconds: float = 0.0
    goes_on: bool = False
    in_suite: bool = True

    @property
    def limit_s(self) -> float:
        known = {"": 0.0, "--heartbeat-patience": PATIENCE_S, "--join-timeout": JOIN_S}
        return known[self.waits] + self.seconds + BEYOND_S

    def allowed(self) -> str:
        parts = [self.waits, f"{self.seconds + BEYOND_S:.0f}"]
        return "–" if self.goes_on else " + ".join(filter(None, parts))


def matches(line: str, said: str) -> bool:
    """Whether `said` has `line` in it."""
    pattern = ""
    for part in re.split(r"(…|‹[^›]*›)", line):
        chosen = part.startswith("‹")
        pattern += ".*?" if part == "…" else f"[{part[1:-1]}]" if chosen else re.escape(part)
    return re.search(pattern, said) is not None


def kills() -> list[Fault]:
    """kill -9 of each position in each phase, on 2 pipelines of 3 stages."""
    suite = {(0, "while loading"), (4, "while connecting"), (1, "in evaluation"), (0, "in evaluation"),
             (0, "in a checkpoint"), (5, "in a checkpoint"), *((rank, "in a step") for rank in range(6))}  # fmt: skip
    return [
        Fault(
            f"kill rank {rank} {phase}",
            f"`kill -9` {phase}: of the master, or of a first, middle or last stage of either replica",
            f"rank …: lost rank {rank} (interface lo, …, after … s): …see rank {rank}'s last line and its host's log "
            f"for why; {AGAIN}",
            replicas=2,
            hit={rank: partial(signalled, phase, signal.SIGKILL)},
            victim=rank,
            in_suite=(rank, phase) in suite,
        )
        for phase in PHASES
        for rank in range(6)
    ]


def stops() -> list[Fault]:
    """SIGSTOP of each position in each phase; all end when it is woken again."""
    suite = {(0, "in a step"), (2, "in evaluation"), (1, "while connecting")}
    return [
        Fault(
            f"stop rank {rank} {phase}",
            f"SIGSTOP {phase}: of the master, a middle or a last stage; it ends itself when it is woken",
            f"rank …: no sign of life from rank {rank} (interface lo, …, after … s): {SILENT}",
            hit={rank: partial(signalled, phase, signal.SIGSTOP)},
            victim=rank,
            number=signal.SIGSTOP,
            waits="--heartbeat-patience",
            in_suite=(rank, phase) in suite,
        )
        for phase in PHASES
        for rank in range(3)
    ]


def pause(_hosts: Any, run: Run) -> None:  # noqa: ANN401 - no lab
    run.signal(1, signal.SIGSTOP)
    time.sleep(0.5 * PATIENCE_S)
    run.signal(1, signal.SIGCONT)


def late(_hosts: Any, run: Run) -> None:  # noqa: ANN401 - no lab
    time.sleep(8)
    run.start(2)


DEAF = f"rank …: no sign of life from rank 0 (interface wan0, asking its store, after … s): …{SILENT}"
LINK = {"hosts": 3, "rate_mbit": 100, "delay_ms": 5}


def lost_way(name: str, row: str, ranks: str, act: Act, apart: tuple[int, ...] = (), **more: Any) -> Fault:  # noqa: ANN401
    """A way that dies without a word, between two of `ranks`, while the run is in a step."""
    line = f"rank ‹{ranks}›: no sign of life from rank ‹{ranks}› (interface wan0, …, after … s): …{SILENT}"
    how = {"lab": LINK, "waits": "--heartbeat-patience", "apart": dict.fromkeys(apart, DEAF), **more}
    return Fault(name, row, line, act=act, **how)


def lost_ways() -> list[Fault]:
    return [
        lost_way("cut between stages", "a link between two hosts that are not the master is cut, mid-send", "1/2",
                 lambda hosts, run: hosts.cut(1, 2)),
        lost_way("cut one way forward", "the same, one way only (activations do not arrive)", "1/2",
                 lambda hosts, run: hosts.cut(1, 2, one_way=True)),
        lost_way("cut one way back", "the same, one way only (gradients do not arrive)", "1/2",
                 lambda hosts, run: hosts.cut(2, 1, one_way=True), in_suite=False),
        lost_way("cut in a checkpoint", "the same, in a checkpoint", "1/2",
                 lambda hosts, run: hosts.cut(1, 2), hit={2: partial(slow_to_save, 20.0)},
                 flags={"checkpoint_steps": 1, "evaluation_steps": 1}, in_suite=False),
        lost_way("cut between replicas", "the same, between two replicas", "1/2",
                 lambda hosts, run: hosts.cut(1, 2), stages=1, replicas=3, in_suite=False),
        lost_way("host vanishes", "a host vanishes: all its links are cut", "0/1/2",
                 lambda hosts, run: (hosts.cut(0, 1), hosts.cut(1, 2)), (1,), in_suite=False),
        Fault(
            "cut of the replicas' interface", "the replicas' own interface (`--dp-net-interface`) is cut off",
            f"rank ‹0/1›: no sign of life from rank ‹0/1› (interface lan0, …, after … s): …{SILENT}",
            stages=1, replicas=2, lab={"hosts": 2, "interfaces": {"wan0": {"delay_ms": 5}, "lan0": {"delay_ms": 1}}},
            flags={"net_interface": "wan0", "dp_net_interface": "lan0"}, waits="--heartbeat-patience", in_suite=False,
            act=lambda hosts, run: hosts.cut(0, 1, interface="lan0"),
        ),
        lost_way("cut to the master", "the link to the master is cut", "0/2",
                 lambda hosts, run: hosts.cut(0, 2), (2,)),
        lost_way("cut one way from the master", "the link from the master is cut, one way", "0/1",
                 lambda hosts, run: hosts.cut(0, 1, one_way=True), (1,), in_suite=False),
        lost_way("firewall in a step", "a firewall begins to drop the data's ports, not the store's", "0/1/2",
                 lambda hosts, run: hosts.firewall([run.port])),
        lost_way("interface down", "an interface is taken down", "0/1/2", lambda hosts, run: hosts[1].down(), (1,),
                 in_suite=False),
        lost_way("interface down on the master", "the master's interface is taken down", "0/1/2",
                 lambda hosts, run: hosts[0].down(), (1, 2)),
        lost_way("interface loses its address", "an interface loses its address", "0/1/2",
                 lambda hosts, run: hosts[1].drop_address(), (1,), in_suite=False),
        Fault(
            "firewall from the start", "a firewall drops the data's ports from the start, not the store's",
            f"rank …: no sign of life from rank … (interface wan0, connecting to …, after … s): {SILENT}",
            lab=LINK, before=lambda hosts, run: hosts.firewall([run.port]), waits="--heartbeat-patience",
        ),
        Fault(
            "interface without an address", "the named interface has no address",
            "rank 0: no sign of rank 1 within 3 s at … (handshake); were all 3 ranks started?",
            lab=LINK, before=lambda hosts, run: hosts[1].drop_address(), flags={"net_interface": "wan0"},
            apart={1: "rank 1: interface wan0 has no address; name one that reaches the others; this machine has: …"},
            waits="--join-timeout",
        ),
        Fault(
            "loopback with a remote master", "the loopback is named although the master is remote",
            "rank …: --net-interface lo reaches this machine alone, and rank 0 is at …: …",
            lab=LINK, by_rank={1: {"net_interface": "lo"}}, waits="--join-timeout",
        ),
        Fault(
            "slow link", "a link so slow that one message outlasts the patience", "", goes_on=True,
            lab={"hosts": 3, "rate_mbit": [[None, 0.35, 50], [0.35, None, 50], [50, 50, None]], "delay_ms": 20,
                 "queue_ms": 3000, "mtu": 1500},
            flags={"evaluation_data": None, "evaluation_steps": None, "total_steps": 1, "seq_length": 64,
                   "batch_size": 16, "micro_batch_size": 16},
        ),
    ]  # fmt: skip


def starts() -> list[Fault]:
    return [
        Fault("wrong interface", "an interface that is not there",
              "rank 1: no interface nope0 here; name one that reaches the others; this machine has: …lo 127.0.0.1…",
              by_rank={1: {"net_interface": "nope0"}}),
        Fault("port taken", "rank 0's port is taken by another program",
              "rank 0 cannot serve the rendezvous at …: the port is in use; choose another port in --dist-url",
              apart={1: "rank 1: … does not answer as farspan's rank 0 does, or has another secret (--secret-file); "
                        "is another program, or another run, at --dist-url?"}, stages=2, waits="--join-timeout"),
        Fault("no master", "the master is not started, or its port is closed",
              "rank … cannot reach the master at … within 3 s (…); is rank 0 running there, and the port open?",
              ranks=(1, 2), waits="--join-timeout"),
        Fault("missing rank", "a rank is not started",
              "rank 0: no sign of rank 2 within 3 s at … (handshake); were all 3 ranks started?",
              ranks=(0, 1), hit={0: partial(meets, 1)}, by_rank={1: {"join_timeout": 60.0}}, waits="--join-timeout"),
        Fault("two processes with one rank", "two processes with one rank",
              "rank 1: two processes were started with --rank 1; see your hosts' launch scripts",
              by_rank={2: {"rank": 1}}, waits="--join-timeout"),
        Fault("different flags", "different flags",
              "rank …: --lr differs: rank 0 has 0.003, rank 2 has 0.004; give all ranks the same",
              by_rank={2: {"lr": 0.004}}),
        Fault("different versions", "different versions",
              "rank …: farspan's version differs: rank 0 has …, rank 1 has 0.0.1; give all ranks the same",
              hit={1: partial(other_version, "0.0.1")}),
        Fault("different models", "different models",
              "rank …: the model's config.json differs: rank 0 has …, rank 2 has …; give all ranks the same",
              by_rank={2: {"model_name": "{other model}"}}),
        Fault("different weights", "different weights of one model",
              "rank …: the weights differ: … is not the same on rank 0 and rank 1; give all ranks the same files "
              "(--check names those that differ)",
              stages=1, replicas=2, by_rank={1: {"model_name": "{other weights}"}}),
        Fault("tokenizer of another model", "the tokenizer of another model",
              "rank 0: --tokenizer-name … has 123 tokens, more than the model's vocabulary of 64",
              by_rank={0: {"tokenizer_name": "{large tokenizer}"}}),
        Fault("tokenizers differ", "another tokenizer on another rank, which needs none: only rank 0 reads text", "",
              by_rank={2: {"tokenizer_name": "{large tokenizer}"}}, flags={"total_steps": 2}, goes_on=True),
        Fault("late rank", "a rank comes 8 s late", "", ranks=(0, 1), act=late, goes_on=True,
              flags={"total_steps": 2}),
        Fault("pause", "a process pauses for less than the patience", "", act=pause, goes_on=True,
              flags={"total_steps": 6}, hit={2: partial(slow_to_save, 0.3)}),
    ]  # fmt: skip


TABLE: tuple[Fault, ...] = (*starts(), *kills(), *stops(), *lost_ways())
