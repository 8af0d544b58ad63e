"""torchrun on two hosts starts all ranks again when one is killed, and they go on from the latest checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from launch import REPO, flags_of, free_port, read_metrics

Flags = Callable[..., dict[str, Any]]
DEADLINE_S = 180


def test_a_killed_rank_is_healed(flags: Flags, tmp_path: Path) -> None:
    told = flags(pipeline_group_size=2, use_cuda="false", total_steps=200, checkpoint_steps=4, checkpoint_path=tmp_path)
    agents = []
    port = free_port()
    for host in range(2):
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(host),
            "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port), "--max-restarts", "1",
            "--monitor-interval", "0.1", str(REPO / "dist_train.py"), *flags_of(told),
        ]  # fmt: skip
        with (tmp_path / f"host{host}.log").open("w") as log:
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            agents.append(subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=REPO))
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not (tmp_path / "latest").exists():
            assert all(agent.poll() is None for agent in agents), said(tmp_path)
            assert time.monotonic() < deadline, said(tmp_path)
            time.sleep(0.02)
        (rank1,) = psutil.Process(agents[1].pid).children()
        rank1.kill()
        for agent in agents:
            assert agent.wait(deadline - time.monotonic()) == 0, said(tmp_path)
    finally:
        for agent in agents:
            agent.terminate()  # and it ends its ranks
            agent.wait()
    assert "lost rank 1" in said(tmp_path)
    assert "resuming from" in said(tmp_path)
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 201))


def said(folder: Path) -> str:
    return "\n".join((folder / f"host{host}.log").read_text() for host in range(2))
