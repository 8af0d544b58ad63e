"""What --check says a step will take, against what steps take: python benchmarks/check_accuracy.py

Each case is a network of its own, in the lab (tests/lab; it needs root): first --check, then a run with the same flags.
It needs two cores that nobody else uses: what others do between the two shows as an error of the simulation.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from small import prepare

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "tests" / "lab"))

from lab import Host, lab, why_not  # noqa: E402 - a folder of scripts

DEADLINE_S = 900
GPIPE_2 = {"pipeline_group_size": 2}
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("100 Mbit/s, 10 ms", {"hosts": 2, "rate_mbit": 100, "delay_ms": 10}, GPIPE_2),
    ("50 Mbit/s, 50 ms", {"hosts": 2, "rate_mbit": 50, "delay_ms": 50}, GPIPE_2),
    ("50 Mbit/s, 50 ms", {"hosts": 2, "rate_mbit": 50, "delay_ms": 50}, {"pp_mode": "1f1b", "pp_ahead": 2, **GPIPE_2}),
    ("20 Mbit/s, 5 ms", {"hosts": 2, "rate_mbit": 20, "delay_ms": 5}, GPIPE_2),
    (
        "100 Mbit/s there, 20 back, 20 ms",
        {"hosts": 2, "rate_mbit": [[0, 100], [20, 0]], "delay_ms": 20},
        {"pp_mode": "1f1b", **GPIPE_2},
    ),
    ("2 replicas, 200 Mbit/s, 2 ms", {"hosts": 2, "rate_mbit": 200, "delay_ms": 2}, {"data_group_size": 2}),
]


def run(hosts: Sequence[Host], flags: dict[str, Any], *more: str) -> str:
    """One rank on each host; what rank 0 printed."""
    env = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **os.environ}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()] + list(more)
    ranks = [
        host.popen(
            [sys.executable, REPO / "dist_train.py", *words, f"--rank={rank}", f"--dist-url=tcp://{hosts[0].address}:29500"],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank, host in enumerate(hosts)
    ]  # fmt: skip
    said = [process.communicate(timeout=DEADLINE_S) for process in ranks]
    for process, (_, err) in zip(ranks, said, strict=True):
        if process.returncode:
            raise SystemExit(err)
    return said[0][0]


def compare(cases: Sequence[int], updates: int, layers: int, width: int, show: bool) -> None:
    print("| network | schedule | simulated | a step | simulated ÷ real |\n|---|---|---|---|---|")
    for number in cases:
        name, matrix, grid = CASES[number]
        with tempfile.TemporaryDirectory() as folder, lab(matrix) as hosts:
            prepare(Path(folder), layers, width, vocabulary=2048)
            flags = {
                "model_name": folder, "task_name": f"{folder}/task.jsonl", "checkpoint_path": f"{folder}/run",
                "seq_length": 256, "batch_size": 16, "micro_batch_size": 2, "total_steps": updates, "lr": 1e-4,
                "use_cuda": "false", **grid,
            }  # fmt: skip
            said = run(hosts, flags, "--check")
            if show:
                print(said)
            found = re.search(r"an update: ([\d.]+) s simulated", said)
            assert found is not None, said
            run(hosts, flags)
            rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
        simulated, real = float(found[1]), statistics.median(row["step_s"] for row in rows[2:])
        schedule = f"{grid.get('pp_mode', 'gpipe')}" + (f", ahead {grid['pp_ahead']}" if "pp_ahead" in grid else "")
        print(f"| {name} | {schedule} | {simulated:.2f} s | {real:.2f} s | {simulated / real:.2f} |", flush=True)


if __name__ == "__main__":
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--cases", type=int, nargs="*", default=list(range(len(CASES))), help="their numbers, from 0")
    reader.add_argument("--updates", type=int, default=7, help="of each run; the median leaves the first two out")
    reader.add_argument("--layers", type=int, default=4)
    reader.add_argument("--width", type=int, default=256)
    reader.add_argument("--show", action="store_true", help="what --check prints, too")
    told = reader.parse_args()
    if reason := why_not():
        raise SystemExit(reason)
    compare(told.cases, told.updates, told.layers, told.width, told.show)
