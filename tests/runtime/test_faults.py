"""Twenty faults, no silence: each of `fault_table` happens, and every rank says why and ends in time, or goes on.

`pytest -m exhaustive tests/runtime/test_faults.py` kills and stops every position in every phase.
`FAULTS_MD=docs/faults.md pytest -m "" tests/runtime/test_faults.py` writes the table with the seconds it took.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import launch
import pytest
from fault_table import BEYOND_S, JOIN_S, PATIENCE_S, PERIOD_S, STORE_PORT, TABLE, Fault, matches
from lab import lab, why_not
from launch import REPO, Ended, Run, free_port, read_metrics
from tiny import make_model, make_task, make_tokenizer

Flags = Callable[..., dict[str, Any]]
DOC = REPO / "docs" / "faults.md"
MEASURED: dict[str, float] = {}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What stands in braces in the table's flags."""
    launch.start_server()  # its seconds are nobody's
    folder = tmp_path_factory.mktemp("faults")
    make_tokenizer(folder / "large", extra=100)
    return {
        "{other model}": make_model(folder / "other", layers=4),
        "{other weights}": make_model(folder / "again", seed=2),
        "{large tokenizer}": folder / "large",
        "{held out}": make_task(folder / "held.jsonl", lines=4, seed=5),
    }


@pytest.fixture(scope="module", autouse=True)
def _write() -> Iterator[None]:
    yield
    if target := os.environ.get("FAULTS_MD"):
        Path(target).write_text(document({**told_in(DOC), **longest(MEASURED)}))


def cases() -> list[Any]:
    return [
        pytest.param(fault, id=fault.name.replace(" ", "-"), marks=[] if fault.in_suite else [pytest.mark.exhaustive])
        for fault in TABLE
    ]


@pytest.mark.parametrize("fault", cases())
def test_fault(fault: Fault, flags: Flags, tmp_path: Path, places: dict[str, Path]) -> None:
    if fault.lab is not None and (reason := why_not()):
        pytest.skip(reason)
    told = tmp_path / "struck"
    join_s = JOIN_S if fault.waits == "--join-timeout" else 60
    common = {"heartbeat_period": PERIOD_S, "heartbeat_patience": PATIENCE_S, "join_timeout": join_s}
    often = {"evaluation_data": places["{held out}"], "evaluation_steps": 4, "checkpoint_steps": 4}
    changes = {**common, **often, "total_steps": 100_000, **fault.flags}
    by_rank = {
        rank: {flag: places.get(value, value) for flag, value in told.items()} for rank, told in fault.by_rank.items()
    }
    hit = {rank: what for rank, what in fault.hit.items()}
    if fault.victim is not None:
        hit[fault.victim] = partial(hit[fault.victim], str(told))
    with ExitStack() as stack:
        hosts = stack.enter_context(lab(dict(fault.lab))) if fault.lab is not None else None
        port = STORE_PORT if hosts is not None else free_port()
        if fault.name == "port taken":
            stack.enter_context(socket.create_server(("127.0.0.1", port)))
        run = Run(
            fault.stages, fault.replicas, flags(**changes), by_rank=by_rank, port=port, faults=hit, hosts=hosts,
            ranks=list(fault.ranks) if fault.ranks is not None else None,
        )  # fmt: skip
        if fault.before is not None:
            fault.before(hosts, run)
        struck = time.monotonic()
        stack.enter_context(run)
        if fault.act is not None:
            if 2 in run.processes:
                run.wait_for_step(1)
            struck = time.monotonic()
            fault.act(hosts, run)
        if fault.goes_on:
            run.succeed()
            return
        ended = wait(run, fault)
        if told.exists():
            struck = float(told.read_text())
    read_metrics(run.folder)  # what was written can be read
    took = max(end.at for end in ended.values()) - struck
    MEASURED[fault.name] = took
    for rank, end in ended.items():
        line = fault.apart.get(rank, fault.line)
        said = last_line(end)
        assert end.code not in (0, -signal.SIGKILL), f"rank {rank} ended with {end.code}:\n{end.err}"
        assert "Traceback" not in end.err, f"rank {rank}:\n{end.err}"
        assert said.startswith("farspan: rank "), f"rank {rank}: {said}"
        assert matches(line, said), f"rank {rank} says\n{said}\nand not\n{line}"
    if os.environ.get("FAULTS_MD"):  # seconds are measured on a machine that is idle
        assert took < fault.limit_s, f"{took:.1f} s"


def wait(run: Run, fault: Fault) -> dict[int, Ended]:
    """How all but the victim ended; who was stopped is woken when they have, and must end as well."""
    deadline_s = 60.0
    if fault.number == signal.SIGSTOP and fault.victim is not None:
        victim = run.processes.pop(fault.victim)
        ended = run.wait(deadline_s)
        run.processes[fault.victim] = victim
        assert victim.exitcode is None
        run.signal(fault.victim, signal.SIGCONT)
        woken = run.wait(PATIENCE_S + BEYOND_S)[fault.victim]
        assert woken.code not in (0, -signal.SIGKILL)
        assert "farspan: rank " in woken.err
        return ended
    ended = run.wait(deadline_s)
    if fault.victim is not None:
        assert ended.pop(fault.victim).code == -signal.SIGKILL
    return ended


def last_line(end: Ended) -> str:
    return next((line for line in reversed(end.err.splitlines()) if line.startswith("farspan: ")), "nothing")


def document(measured: dict[str, str]) -> str:
    """docs/faults.md. `measured`: seconds by row."""
    rows = {}
    for fault in TABLE:
        line = re.sub(r"rank \d(?=[ '])", "rank r", fault.line) if "`kill" in fault.row or "STOP" in fault.row else ""
        ends = "goes on" if fault.goes_on else f"ends: `{line or fault.line}`"
        for rank, apart in fault.apart.items():
            if apart not in ends:
                ends += f"; rank {rank}, which cannot be told: `{apart}`"
        rows[fault.row] = f"| {fault.row} | {ends} | {fault.allowed()} |"
    lines = [f"{text} {measured.get(row, '–')} |" for row, text in rows.items()]
    return INTRO + "\n".join(lines) + "\n"


INTRO = f"""# What can go wrong between ranks

Made by `tests/runtime/test_faults.py` from the table that drives its tests, `tests/support/fault_table.py`. Every rank
ends with a status that is not 0 and one line. All who can be told print the first cause, after `stopping with the
others. First cause:`. `…` is any text, `‹a/b›` one of the two.

Seconds are from the fault to the end of the last rank: what is allowed, and what was measured at most with
`--heartbeat-period {PERIOD_S} --heartbeat-patience {PATIENCE_S} --join-timeout {JOIN_S:.0f}`; the defaults are
1, 10 and 300.

| what happens | what every rank does | allowed | measured |
|---|---|---|---|
"""


def longest(seconds: dict[str, float]) -> dict[str, str]:
    rows: dict[str, float] = {}
    for fault in TABLE:
        if fault.name in seconds:
            rows[fault.row] = max(rows.get(fault.row, 0.0), seconds[fault.name])
    return {row: f"{took:.1f}" for row, took in rows.items()}


def told_in(path: Path) -> dict[str, str]:
    """The measured seconds that stand in the table, by row."""
    text = path.read_text() if path.exists() else ""
    cells = [re.split(r" \| ", line.strip("| \n")) for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[-1] for row in cells}


def test_the_document_is_the_table() -> None:
    assert DOC.read_text() == document(told_in(DOC)), (
        'FAULTS_MD=docs/faults.md pytest -m "" tests/runtime/test_faults.py'
    )


def test_each_line_says_what_to_try() -> None:
    for fault in TABLE:
        for line in (fault.line, *fault.apart.values()):
            assert fault.goes_on or re.search(r"\?|see |; (give|name|choose)|: …$|more than", line), line
