"""metrics.jsonl, wandb, the trace, the threads: what a person sees of a run."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launch import Run, read_metrics

Flags = Callable[..., dict[str, Any]]
KEYS = ["step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "step_s", "tasks"]
needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")


def test_metrics_of_every_update(flags: Flags, tmp_path: Path) -> None:
    with Run(2, 2, flags(total_steps=8, gradient_accumulate_step=2, warmup_steps=1, lr=0.5e-3, log_steps=2)) as run:
        run.succeed()
    rows = read_metrics(tmp_path / "ck")
    assert [list(row) for row in rows] == [KEYS] * 4
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert [row["tokens"] for row in rows] == [2 * 2 * 4 * 16 * n for n in (1, 2, 3, 4)]
    # Up over one update, then down: the last update is at a third of the peak and 0 comes next.
    assert [row["lr"] for row in rows] == pytest.approx([0, 0.5e-3, 0.5e-3 * 2 / 3, 0.5e-3 / 3])
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(256 / row["step_s"])
    err = run.err(0)
    assert f"step 4/8  loss {rows[1]['loss']:.4f}" in err
    assert "step 2/8  loss" not in err  # --log-steps 2
    assert f"{rows[0]['loss']:.4f} at first, {rows[-1]['loss']:.4f} at last" in err
    assert "step" not in run.err(1).replace("steps", "")  # only rank 0 reports


def test_rows_past_the_checkpoint_are_dropped_on_resume(flags: Flags, tmp_path: Path) -> None:
    with Run(1, 1, flags(checkpoint_steps=3)) as run:
        run.succeed()
    folder = tmp_path / "ck"
    (folder / "latest").write_text("3")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # as a kill leaves it
    with Run(1, 1, flags(checkpoint_steps=3)) as run:
        run.succeed()
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3, 4, 5, 6]


def wandb_rows(folder: Path) -> tuple[list[dict[str, Any]], str]:
    (run_dir,) = (folder / "wandb").glob("offline-run-*")
    wandb = Path(sys.executable).with_name("wandb")
    out = subprocess.run([wandb, "leet", "inspect", "--json", run_dir], capture_output=True, text=True, timeout=60)
    rows = [json.loads(line) for line in out.stdout.splitlines() if '"history"' in line]
    return [row["history"]["item"] for row in rows], out.stdout


@needs_wandb
def test_wandb_offline_gets_every_update(flags: Flags, tmp_path: Path) -> None:
    env = {"WANDB_MODE": "offline", "WANDB_NAME": "a-name-of-mine", "WANDB_API_KEY": "k" * 40, "SECRET_THING": "hush"}
    with Run(2, 1, flags(train_log_backend="wandb", project_name="far"), env=env) as run:
        run.succeed()
    items, text = wandb_rows(tmp_path / "ck")
    assert [item["loss"] for item in items] == pytest.approx([row["loss"] for row in read_metrics(tmp_path / "ck")])
    assert "a-name-of-mine" in text
    assert "hush" not in text
    assert "k" * 40 not in text


@needs_wandb
def test_a_killed_run_loses_at_most_a_second_of_wandb(flags: Flags, tmp_path: Path) -> None:
    told = flags(train_log_backend="wandb", total_steps=100_000)
    with Run(1, 1, told, env={"WANDB_MODE": "offline"}) as run:
        run.wait_for_step(300)
        run.signal(0, signal.SIGKILL)
        run.wait(20)
    rows = read_metrics(tmp_path / "ck")
    items, _ = wandb_rows(tmp_path / "ck")
    lost = [row["step_s"] for row in rows[len(items) :]]
    assert len(items) > 0
    assert sum(lost) <= 1.0


def test_the_trace_shows_every_lane(flags: Flags, tmp_path: Path) -> None:
    with Run(2, 2, flags(profiling="tidy_profiling", total_steps=3)) as run:
        run.succeed()
    for rank in range(4):
        trace = json.loads((tmp_path / "ck" / "traces" / f"rank{rank}.json").read_text())["traceEvents"]
        lanes = {event["args"]["name"] for event in trace if event["name"] == "thread_name"}
        wire = {"forward send", "backward receive"} if rank % 2 == 0 else {"forward receive", "backward send"}
        assert {"forward", "backward", "gradients", "optimizer", *wire} <= lanes
        forwards = [event for event in trace if event.get("cat") == "forward"]
        assert len(forwards) == 3 * 2  # steps × micro-batches
        assert {event["name"] for event in forwards} == {f"{rank % 2}F0", f"{rank % 2}F1"}


def test_messages_travel_while_the_stages_compute(flags: Flags, tmp_path: Path) -> None:
    """The receive of micro-batch 1 is posted before micro-batch 0 is computed, on the lane of its own."""
    told = flags(profiling="tidy_profiling", total_steps=2, batch_size=8, micro_batch_size=2, net_interface="lo")
    with Run(2, 1, told) as run:
        run.succeed()
    trace = json.loads((tmp_path / "ck" / "traces" / "rank1.json").read_text())["traceEvents"]
    spans = {lane: [e for e in trace if e.get("cat") == lane] for lane in ("forward receive", "forward")}
    for step in range(2):
        received = spans["forward receive"][4 * step + 1]
        computed = spans["forward"][4 * step]
        assert received["ts"] < computed["ts"] + computed["dur"]
        assert received["tid"] != computed["tid"]


def test_threads_are_shared_out(flags: Flags) -> None:
    env = {"OMP_NUM_THREADS": ""}
    with Run(2, 1, flags(), env=env) as run:
        run.succeed()
    cores = len(os.sched_getaffinity(0))
    assert f"{max(1, cores // 2)} thread(s) ({cores} cores, 2 ranks)" in run.err(0)
    with Run(1, 1, flags(load_checkpoint="false"), env={"OMP_NUM_THREADS": "1"}) as run:
        run.succeed()
    assert "1 thread(s) (OMP_NUM_THREADS)" in run.err(0)
