"""Real processes of `dist_train.py`, with a hard deadline; none survives the test that started them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

REPO = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def flags_of(values: dict[str, Any]) -> list[str]:
    """{'seq_length': 16, 'bf16': True} → ['--seq-length', '16', '--bf16']."""
    words = []
    for name, value in values.items():
        if value is not None:
            words.append("--" + name.replace("_", "-"))
            if value is not True:
                words.append(str(value))
    return words


@dataclass
class Ended:
    """How one rank ended."""

    code: int
    err: str
    at: float


class Run:
    """All ranks of one run, as a context: `with Run(2, 1, flags) as run: run.wait()`."""

    def __init__(self, stages: int, replicas: int, flags: dict[str, Any], *, by_rank: dict[int, dict[str, Any]] | None = None, ranks: list[int] | None = None, port: int | None = None, env: dict[str, str] | None = None) -> None:
        self.world = stages * replicas
        self.url = f"tcp://127.0.0.1:{port or free_port()}"
        self.processes: dict[int, subprocess.Popen] = {}
        self.logs: dict[int, Path] = {}
        self._flags = {"dist_url": self.url, "world_size": self.world, "pipeline_group_size": stages, "data_group_size": replicas, "use_cuda": "false", **flags}
        self._by_rank = by_rank or {}
        self._ranks = list(range(self.world)) if ranks is None else ranks
        self._env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", **(env or {})}

    def __enter__(self) -> Run:
        logs = Path(self._flags["checkpoint_path"])
        logs.mkdir(parents=True, exist_ok=True)
        for rank in self._ranks:
            self.start(rank)
        return self

    def start(self, rank: int) -> None:
        values = {**self._flags, "rank": rank, **self._by_rank.get(rank, {})}
        self.logs[rank] = Path(self._flags["checkpoint_path"]) / f"rank{rank}.err"
        with self.logs[rank].open("w") as err:
            self.processes[rank] = subprocess.Popen(
                [sys.executable, str(REPO / "dist_train.py"), *flags_of(values)], stderr=err, stdout=err, env=self._env, start_new_session=True
            )

    def __exit__(self, _type: type | None, _error: BaseException | None, _tb: TracebackType | None) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def err(self, rank: int) -> str:
        return self.logs[rank].read_text()

    def wait(self, deadline_s: float = 90.0) -> dict[int, Ended]:
        """Wait for all ranks; fails the test, with what they said, when the deadline passes."""
        start = time.monotonic()
        ended: dict[int, Ended] = {}
        while len(ended) < len(self.processes):
            for rank, process in self.processes.items():
                if rank not in ended and process.poll() is not None:
                    ended[rank] = Ended(process.returncode, self.err(rank), time.monotonic())
            if time.monotonic() - start > deadline_s:
                said = "\n".join(f"--- rank {rank}\n{self.err(rank)[-2000:]}" for rank in self.processes)
                raise AssertionError(f"ranks {sorted(set(self.processes) - set(ended))} still run after {deadline_s} s\n{said}")
            time.sleep(0.02)
        return ended

    def succeed(self, deadline_s: float = 90.0) -> None:
        for rank, end in self.wait(deadline_s).items():
            assert end.code == 0, f"rank {rank} ended with {end.code}\n{end.err[-3000:]}"

    def wait_for_step(self, step: int, deadline_s: float = 60.0) -> None:
        """Wait until metrics.jsonl has reached `step`."""
        start = time.monotonic()
        while True:
            rows = read_metrics(Path(self._flags["checkpoint_path"]))
            if rows and rows[-1]["step"] >= step:
                return
            dead = [r for r, p in self.processes.items() if p.poll() is not None]
            assert not dead, f"rank {dead[0]} ended early:\n{self.err(dead[0])[-3000:]}"
            assert time.monotonic() - start < deadline_s, f"step {step} was not reached in {deadline_s} s"
            time.sleep(0.02)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
    return [json.loads(line) for line in whole]
