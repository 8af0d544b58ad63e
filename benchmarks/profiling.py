"""What profiling costs: python benchmarks/profiling.py

One run of 2 stages × 1 replica in which spans are kept in every other update, so that both kinds see the same machine;
and the cost of one span, times the spans of an update.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from itertools import pairwise
from pathlib import Path

from farspan.pipeline.timeline import Meter, Timeline
from farspan.runtime.cli import main
from small import prepare

STAGES, MICRO_BATCHES = 2, 8


def alternate() -> list[float]:
    """Let meters keep spans in every other update. The list fills with this process's CPU seconds after each update."""
    record, away, spent = Meter.record, {}, []

    def recording(self: Meter, lane: str, name: str, start: float, end: float) -> None:
        record(self, lane, name, start, end)
        if lane == "optimizer":
            self.timeline, away[self] = away.get(self), self.timeline
            spent.append(time.process_time())

    Meter.record = recording  # type: ignore[method-assign]
    return spent


def compare(updates: int) -> None:
    with tempfile.TemporaryDirectory() as name, socket.socket() as probe:
        folder = Path(name)
        prepare(folder, layers=4, width=256, vocabulary=1024)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        told = (
            f"--model-name {folder} --task-name {folder}/task.jsonl --checkpoint-path {folder}/run --seq-length 128 "
            f"--batch-size {MICRO_BATCHES} --micro-batch-size 1 --total-steps {updates} --lr 1e-4 --pp-mode 1f1b "
            f"--pipeline-group-size {STAGES} --dist-url tcp://127.0.0.1:{port} --use-cuda false "
            "--profiling tidy_profiling"
        ).split()
        env = {"OMP_NUM_THREADS": "1", **os.environ}
        ranks = [
            subprocess.Popen([sys.executable, __file__, "--rank-of-run", *told, "--rank", str(rank)], env=env)
            for rank in range(STAGES)
        ]
        if any([rank.wait() for rank in ranks]):
            raise SystemExit("a rank failed; see above")
        spent = json.loads((folder / "run" / "cpu.json").read_text())
        rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        trace = json.loads((folder / "run" / "traces" / "trace.json").read_text())
    # From the third on: the first ones warm up. Updates 1, 3, 5 … kept their spans.
    kinds = {"seconds": [r["step_s"] for r in rows], "CPU seconds of rank 0": [b - a for a, b in pairwise([0, *spent])]}
    spans = sum(e["ph"] == "X" and e["pid"] == 0 for e in trace["traceEvents"]) / len(rows[::2])
    meters = {"with": Meter(Timeline()), "without": Meter()}
    each = {
        kind: min(timeit.repeat(lambda m=meter: m.record("forward", "0F0", 1.0, 2.0), number=20_000, repeat=5)) / 20_000
        for kind, meter in meters.items()
    }
    print("| | spans kept | counters alone |\n|---|---|---|")
    for what, all_seconds in kinds.items():
        medians = [statistics.median(all_seconds[first::2]) * 1e3 for first in (2, 3)]
        print(f"| an update, {what}, median of {len(rows) // 2 - 1} | {medians[0]:.1f} ms | {medians[1]:.1f} ms |")
    print(f"| one span | {each['with'] * 1e6:.2f} µs | {each['without'] * 1e6:.2f} µs |\n")
    for what, all_seconds in kinds.items():  # neighbours differ by less than the machine's moods do
        ratio = statistics.median(a / b for a, b in zip(all_seconds[2::2], all_seconds[3::2], strict=False))
        print(f"{what}: with ÷ without, median of neighbouring updates: {ratio:.4f}")
    share = spans * each["with"] / statistics.median(kinds["seconds"])
    print(f"{spans:.0f} spans an update on rank 0 × {each['with'] * 1e6:.2f} µs: {share:.3%} of an update")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank-of-run"]:
        told = sys.argv[2:]
        spent = alternate()
        status = main(told)
        if told[-1] == "0":
            (Path(told[told.index("--checkpoint-path") + 1]) / "cpu.json").write_text(json.dumps(spent))
        sys.exit(status)
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--updates", type=int, default=200)
    compare(reader.parse_args().updates)
