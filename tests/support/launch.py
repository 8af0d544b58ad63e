"""Real processes of `dist_train.py`, with a hard deadline; none survives the test that started them."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Any

REPO = Path(__file__).resolve().parents[2]

RESUMABLE = 75
"""The exit status of a run that a signal ended before its last step."""

# The server imports torch once; each rank is a fork of it, in a process of its own, without those two seconds.
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["warm"])
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_server() -> None:
    """Have the imports done before anything is timed."""
    process = _server.Process(target=os.getpid)
    process.start()
    process.join()


def flags_of(values: dict[str, Any]) -> list[str]:
    """{'seq_length': 16, 'bf16': True, 'num_layers': None} → ['--seq-length', '16', '--bf16']."""
    words = []
    for name, value in values.items():
        if value is not None:
            words.append("--" + name.replace("_", "-"))
            if value is not True:
                words.append(str(value))
    return words


def _rank(
    argv: list[str],
    log: str,
    env: dict[str, str],
    fault: Callable[[], None] | None,
    host: Any = None,  # noqa: ANN401 - a lab's
) -> None:
    os.setsid()
    if host is not None:
        host.enter()
    os.environ.update(env)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    import torch
    from farspan.runtime.cli import main

    torch.set_num_threads(1)
    if fault is not None:
        fault()
    sys.exit(main(argv))


@dataclass
class Ended:
    """How one rank ended, and when (time.monotonic)."""

    code: int
    err: str
    at: float


class Run:
    """All ranks of one run, as a context: `with Run(2, 1, flags) as run: run.succeed()`.

    With the `hosts` of a lab, rank r runs on `hosts[r]`, and all meet on the first.
    """

    def __init__(
        self,
        stages: int,
        replicas: int,
        flags: dict[str, Any],
        *,
        by_rank: dict[int, dict[str, Any]] | None = None,
        ranks: list[int] | None = None,
        port: int | None = None,
        env: dict[str, str] | None = None,
        faults: dict[int, Callable[[], None]] | None = None,
        hosts: Sequence[Any] | None = None,
    ) -> None:
        world = stages * replicas
        self.port = port or free_port()
        self.folder = Path(flags["checkpoint_path"])
        self.processes: dict[int, ForkServerProcess] = {}
        self._flags = {
            "dist_url": f"tcp://{hosts[0].address if hosts else '127.0.0.1'}:{self.port}",
            "world_size": world,
            "pipeline_group_size": stages,
            "data_group_size": replicas,
            "use_cuda": "false",
            **flags,
        }
        self._by_rank = by_rank or {}
        self._faults = faults or {}
        self._hosts = hosts
        self._ranks = list(range(world)) if ranks is None else ranks
        self._env = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", **(env or {})}

    def __enter__(self) -> Run:
        self.folder.mkdir(parents=True, exist_ok=True)
        for rank in self._ranks:
            self._log(rank).unlink(missing_ok=True)
            self.start(rank)
        return self

    def start(self, rank: int) -> None:
        argv = flags_of({**self._flags, "rank": rank, **self._by_rank.get(rank, {})})
        host = self._hosts[rank] if self._hosts is not None else None
        what = argv, str(self._log(rank)), self._env, self._faults.get(rank), host
        process = _server.Process(target=_rank, args=what)
        process.start()
        self.processes[rank] = process

    def __exit__(self, _type: type | None, _error: BaseException | None, _tb: TracebackType | None) -> None:
        for process in self.processes.values():
            if process.is_alive():
                process.kill()
            process.join()

    def _log(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.err"

    def err(self, rank: int) -> str:
        return self._log(rank).read_text() if self._log(rank).exists() else ""

    def signal(self, rank: int, number: signal.Signals) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def wait(self, deadline_s: float = 90.0) -> dict[int, Ended]:
        """Wait for all ranks; fails the test, with what they said, when the deadline passes."""
        start = time.monotonic()
        ended: dict[int, Ended] = {}
        while len(ended) < len(self.processes):
            for rank, process in self.processes.items():
                if rank not in ended and process.exitcode is not None:
                    ended[rank] = Ended(process.exitcode, self.err(rank), time.monotonic())
            if time.monotonic() - start > deadline_s:
                said = "\n".join(f"--- rank {rank}\n{self.err(rank)[-2000:]}" for rank in self.processes)
                alive = sorted(set(self.processes) - set(ended))
                raise AssertionError(f"ranks {alive} still run after {deadline_s} s\n{said}")
            time.sleep(0.02)
        return ended

    def succeed(self, deadline_s: float = 90.0, *, status: int = 0) -> None:
        """Wait for all ranks, which must end with `status`: `RESUMABLE` where a test stops them by a signal."""
        for rank, end in self.wait(deadline_s).items():
            assert end.code == status, f"rank {rank} ended with {end.code}\n{end.err[-3000:]}"

    def wait_for_step(self, step: int, deadline_s: float = 60.0) -> None:
        """Wait until metrics.jsonl has reached `step`."""
        start = time.monotonic()
        while not ((rows := read_metrics(self.folder)) and rows[-1]["step"] >= step):
            dead = [rank for rank, process in self.processes.items() if process.exitcode is not None]
            assert not dead, f"rank {dead[0]} ended early:\n{self.err(dead[0])[-3000:]}"
            assert time.monotonic() - start < deadline_s, f"step {step} was not reached in {deadline_s} s"
            time.sleep(0.02)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The whole rows of a run's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
