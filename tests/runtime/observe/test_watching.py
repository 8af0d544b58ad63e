"""metrics.jsonl, wandb, the trace, the threads: what a person sees of a run."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from farspan.comm.lanes.lane import ThreadLane
from farspan.comm.topology import Topology
from farspan.pipeline.timeline import Span, Timeline
from farspan.pipeline.trace import RankSpans
from farspan.runtime.flags.config import Config, ConfigError, parse
from farspan.runtime.observe.backends import check_backends, open_backends
from farspan.runtime.observe.metrics import Metrics
from farspan.runtime.observe.picture import COLOURS, draw_step
from farspan.runtime.observe.profiling import Profile
from faults import talkative, told_of_the_disk
from launch import RESUMABLE, Run, read_metrics

Flags = Callable[..., dict[str, Any]]
KEYS = ["step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "step_s"]
USAGE = [f"{name}{stage}" for name in ("bubble", "wire", "peak_memory_gib") for stage in ("", "/stage0", "/stage1")]
needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")


def test_metrics_of_every_update(flags: Flags, tmp_path: Path) -> None:
    with Run(2, 2, flags(total_steps=8, gradient_accumulate_step=2, warmup_steps=1, lr=0.5e-3, log_steps=2)) as run:
        run.succeed()
    rows = read_metrics(tmp_path / "ck")
    assert [list(row) for row in rows] == [[*KEYS, "tasks", *USAGE]] * 4
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert [row["tokens"] for row in rows] == [2 * 2 * 4 * 16 * n for n in (1, 2, 3, 4)]
    # Up over one update, then down: the last update is at a third of the peak and 0 comes next.
    assert [row["lr"] for row in rows] == pytest.approx([0, 0.5e-3, 0.5e-3 * 2 / 3, 0.5e-3 / 3])
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(256 / row["step_s"])
        assert all(0 <= row[key] <= 1 for key in USAGE if "memory" not in key)
        assert row["bubble"] == pytest.approx((row["bubble/stage0"] + row["bubble/stage1"]) / 2)
        assert row["bubble"] < 1
        assert row["wire"] > 0
        assert 0.01 < row["peak_memory_gib"] == max(row["peak_memory_gib/stage0"], row["peak_memory_gib/stage1"]) < 8
    err = run.err(0)
    assert f"step 4/8  loss {rows[1]['loss']:.4f}" in err
    assert "step 6/8  loss" not in err  # --log-steps 2, the first and the last
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


def test_rows_are_on_the_disk_before_a_checkpoint_counts_them(flags: Flags, tmp_path: Path) -> None:
    log = tmp_path / "disk"
    told = flags(checkpoint_steps=2, total_steps=4)
    with Run(2, 1, told, faults={0: partial(told_of_the_disk, str(log))}) as run:
        run.succeed()
    words = [line for line in log.read_text().splitlines() if line in ("flushed metrics.jsonl", "named latest")]
    assert words == ["flushed metrics.jsonl", "named latest"] * 2


def test_a_crash_while_rows_are_dropped_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = "".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(1, 4))
    path.write_text(rows)
    before = path.stat()
    Metrics(config_of("print", tmp_path), 3).close()
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            Metrics(config_of("print", tmp_path), 2)
    assert path.read_text() == rows
    Metrics(config_of("print", tmp_path), 2).close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    path.write_text(rows.rstrip())  # a row that is whole but for its end
    Metrics(config_of("print", tmp_path), 3).close()
    assert path.read_text() == rows


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
def test_a_resumed_run_goes_on_in_its_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    seen = []
    for mode, start in (("offline", 0), ("disabled", 2), ("offline", 2), ("offline", 1), ("offline", 0)):
        monkeypatch.setenv("WANDB_MODE", mode)
        (backend,) = open_backends(config_of("wandb", tmp_path), start)
        backend.write({"step": start + 1, "loss": 2.0})
        backend.close(0)
        if mode == "offline":
            seen.append((tmp_path / "wandb" / "run-id").read_text())
    assert len({*seen[:3]}) == 1  # also after a return to an earlier checkpoint
    assert seen[3] != seen[0]  # a run that starts over is another one
    assert {path.name.split("-")[3] for path in (tmp_path / "wandb").glob("offline-run-*")} == {*seen}


@needs_wandb
def test_wandb_gets_evaluations(flags: Flags, tmp_path: Path) -> None:
    told = flags(train_log_backend="wandb", evaluation_steps=3)
    told["evaluation_data"] = told["task_name"].split(":")[0]
    with Run(1, 1, told, env={"WANDB_MODE": "offline"}) as run:
        run.succeed()
    items, _ = wandb_rows(tmp_path / "ck")
    rows = read_metrics(tmp_path / "ck")
    assert len(items) == len(rows) == 6
    for step in (3, 6):
        for key in ("eval_loss", "eval_perplexity"):
            assert items[step - 1][key] == pytest.approx(rows[step - 1][key])


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


needs_tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="no tensorboard")


@needs_wandb
@needs_tensorboard
def test_several_backends_get_the_same_rows(flags: Flags, tmp_path: Path) -> None:
    told = flags(train_log_backend="print,wandb, tensorboard", total_steps=4, checkpoint_steps=2)
    with Run(2, 1, told, env={"WANDB_MODE": "offline"}) as run:
        run.succeed()
    (tmp_path / "ck" / "latest").write_text("2")  # go on from there: steps 3 and 4 are done anew
    with Run(2, 1, told, env={"WANDB_MODE": "disabled"}) as run:
        run.succeed()
    rows = read_metrics(tmp_path / "ck")
    items, _ = wandb_rows(tmp_path / "ck")
    assert items[-1].keys() >= set(KEYS + USAGE)
    assert [item["step"] for item in items] == [1, 2, 3, 4]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "ck" / "tensorboard")).Reload()
    scalars = set(events.Tags()["scalars"])
    assert {name for name in scalars if not name.startswith("tasks/")} == set(KEYS + USAGE) - {"step"}
    assert {name.rpartition("/")[2] for name in scalars if name.startswith("tasks/")} >= {"sequences", "tokens"}
    for key in ("loss", "lr", "peak_memory_gib/stage1"):
        found = events.Scalars(key)
        assert [event.step for event in found] == [1, 2, 3, 4]
        assert [event.value for event in found] == pytest.approx([row[key] for row in rows])


@needs_tensorboard
def test_rows_of_any_shape_reach_the_backends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other parts of a run add to a row, or write as a row of their own, needs nothing done here."""
    config = config_of("tensorboard", tmp_path)
    metrics = Metrics(config, 0)
    said: list[str] = []
    monkeypatch.setattr(metrics._terminal, "say", said.append)
    base = dict(zip(KEYS, (1, 2.0, 0.1, 1.0, 64, 10.0, 6.4), strict=True))
    metrics.write({**base, "loss_scale": 1024, "tasks": {"a": {"share": 0.25}}, "note": "text"})
    metrics.write({"step": 1, "eval_loss": 1.5})
    metrics.close()
    assert (metrics.first_loss, metrics.last_loss) == (2.0, 2.0)
    assert "loss scale 1024" in said[0]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {*KEYS[1:], "loss_scale", "tasks/a/share", "eval_loss"}
    again = Metrics(config_of("print", tmp_path), 1)
    again.close()
    assert again.last_loss == 2.0
    assert [row.get("eval_loss") for row in read_metrics(tmp_path)] == [None, 1.5]


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_an_absent_package_is_named_before_the_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == name else object())
    with pytest.raises(ConfigError, match=f"--train-log-backend {name} needs the package: pip install {name}"):
        check_backends(config_of(f"print,{name}", tmp_path))


def config_of(backends: str, folder: Path) -> Config:
    told = ["--train-log-backend", backends, "--checkpoint-path", str(folder), "--total-steps", "4", "--log-steps", "1"]
    return parse(told, {})[0]


class Trace:
    """What trace.json says, by rank."""

    def __init__(self, folder: Path) -> None:
        told = json.loads((folder / "traces" / "trace.json").read_text())
        self.metadata = told["otherData"]
        self.ranks = {event["pid"] for event in told["traceEvents"]}
        self._meta = [event for event in told["traceEvents"] if event["ph"] == "M"]
        self._work = [event for event in told["traceEvents"] if event["ph"] == "X"]

    def lanes(self, rank: int) -> list[str]:
        """In the order in which they are shown."""
        events = [event for event in self._meta if event["name"] == "thread_name" and event["pid"] == rank]
        return [event["args"]["name"] for event in sorted(events, key=lambda event: event["tid"])]

    def spans(self, rank: int, lane: str) -> list[dict[str, Any]]:
        tid = self.lanes(rank).index(lane)
        return [event for event in self._work if (event["pid"], event["tid"]) == (rank, tid)]


def test_one_trace_shows_every_lane_of_all_ranks(flags: Flags, tmp_path: Path) -> None:
    """Each rank has a folder of its own, as on hosts without a common file system."""
    by_rank = {rank: {"checkpoint_path": tmp_path / f"host{rank}"} for rank in (1, 2, 3)}
    with Run(2, 2, flags(profiling="tidy_profiling", total_steps=3), by_rank=by_rank) as run:
        run.succeed()
    assert not list(tmp_path.glob("host*/traces"))
    trace = Trace(tmp_path / "ck")
    assert trace.ranks == {0, 1, 2, 3}
    for rank in range(4):
        first = rank % 2 == 0
        receive, send = ("backward receive", "forward send") if first else ("forward receive", "backward send")
        order = [receive, "forward", send, "backward", "gradients", "optimizer"]
        assert trace.lanes(rank)[: len(order)] == order
        assert [span["name"] for span in trace.spans(rank, "forward")] == [f"{rank % 2}F0", f"{rank % 2}F1"] * 3
        assert [span["name"] for span in trace.spans(rank, "optimizer")] == ["update 1", "update 2", "update 3"]
        assert len(trace.spans(rank, receive)) == len(trace.spans(rank, send)) == 3 * 2


def test_the_ranks_are_on_one_clock(flags: Flags, tmp_path: Path) -> None:
    with Run(3, 1, flags(profiling="tidy_profiling", total_steps=3)) as run:
        run.succeed()
    trace = Trace(tmp_path / "ck")
    uncertainty_us = trace.metadata["clock_uncertainty_us"]
    assert uncertainty_us.keys() == {"rank 0", "rank 1", "rank 2"}
    assert uncertainty_us["rank 0"] == 0 < uncertainty_us["rank 1"]
    for rank in (1, 2):
        slack = uncertainty_us[f"rank {rank}"] + uncertainty_us[f"rank {rank - 1}"] + 0.01
        before, after = trace.spans(rank - 1, "forward"), trace.spans(rank, "forward")
        for cause, effect in zip(before, after, strict=True):  # no micro-batch arrives before it left
            assert effect["ts"] >= cause["ts"] + cause["dur"] - slack


def test_a_stopped_run_leaves_its_trace(flags: Flags, tmp_path: Path) -> None:
    told = flags(profiling="tidy_profiling", total_steps=100_000)
    with Run(2, 1, told) as run:
        run.wait_for_step(3)
        run.signal(1, signal.SIGTERM)
        run.succeed(status=RESUMABLE)
    trace = Trace(tmp_path / "ck")
    done = len(read_metrics(tmp_path / "ck"))
    assert [len(trace.spans(rank, "optimizer")) for rank in (0, 1)] == [done, done]


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_a_picture_of_one_step(flags: Flags, tmp_path: Path) -> None:
    with Run(1, 2, flags(profiling="tidy_profiling")) as run:
        run.succeed()
    from matplotlib.image import imread

    pixels = imread(tmp_path / "ck" / "traces" / "step.png")
    seen = {tuple(pixel) for pixel in (pixels[..., :3] * 255).round().astype(int).reshape(-1, 3)}
    for kind in ("forward", "backward", "gradients", "optimizer"):
        assert tuple(bytes.fromhex(COLOURS[kind][1:])) in seen, kind


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_what_began_before_the_step_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    told: list[str] = []

    def savefig(figure: Figure, _path: Path) -> None:
        (axes,) = figure.axes
        told.extend([*(text.get_text() for text in axes.texts), axes.get_xlabel()])

    monkeypatch.setattr(Figure, "savefig", savefig)
    steps = [Span("optimizer", f"update {n}", n - 0.1, float(n)) for n in (1, 2)]
    sent = Span("forward send", "F0", 0.75, 1.5)
    draw_step([RankSpans(0, 0, 0, [*steps, sent])], tmp_path / "step.png")
    assert told == ["← 250 ms", "milliseconds (←: it began so much earlier)"]
    told.clear()
    draw_step([RankSpans(0, 0, 0, [*steps, sent._replace(start=1.2)])], tmp_path / "step.png")
    assert told == ["milliseconds"]


def test_without_matplotlib_there_is_a_trace_and_a_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None)
    lane, timeline = ThreadLane("gradients"), Timeline()
    timeline.record("forward", "0F0", 1.0, 2.0)
    with caplog.at_level(logging.INFO, logger="farspan"):
        Profile(timeline, None, lane, [], Topology(1, 1), 0, 5.0).write(tmp_path / "ck" / "traces")
    assert "needs the package matplotlib" in caplog.text
    assert len(Trace(tmp_path / "ck").spans(0, "forward")) == 1
    assert not (tmp_path / "ck" / "traces" / "step.png").exists()


def test_torchs_profiler_around_a_few_updates_of_one_rank(flags: Flags, tmp_path: Path) -> None:
    with Run(2, 1, flags(profiling="pytorch_profiling")) as run:
        run.succeed()
    path = tmp_path / "ck" / "traces" / "pytorch.json"
    assert list(path.parent.iterdir()) == [path]
    assert f"torch's profile of rank 0: {path}" in run.err(0)
    names = [event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]]
    assert {name for name in names if name.startswith("ProfilerStep")} == {f"ProfilerStep#{n}" for n in (2, 3, 4)}
    assert any(name.startswith("aten::") for name in names)


def test_messages_travel_while_the_stages_compute(flags: Flags, tmp_path: Path) -> None:
    """Receives are posted on a lane of their own before what is computed without them has ended. Not each of them is
    seen there in time: a machine that is busy wakes the lane late."""
    told = flags(profiling="tidy_profiling", total_steps=4, batch_size=8, micro_batch_size=2, net_interface="lo")
    with Run(2, 1, told) as run:
        run.succeed()
    trace = Trace(tmp_path / "ck")
    assert trace.lanes(1).index("forward receive") != trace.lanes(1).index("forward")
    received, computed = trace.spans(1, "forward receive"), trace.spans(1, "forward")
    assert len(received) == len(computed) == 16
    assert all(span["args"]["posted"] <= span["ts"] for span in received)
    early = [
        after["args"]["posted"] < before["ts"] + before["dur"]
        for number, (before, after) in enumerate(zip(computed, received[1:], strict=False), 1)
        if number % 4 != 0  # of the same step
    ]
    assert any(early)


def test_threads_are_shared_out(flags: Flags) -> None:
    env = {"OMP_NUM_THREADS": ""}
    with Run(2, 1, flags(), env=env) as run:
        run.succeed()
    cores = len(os.sched_getaffinity(0))
    assert f"{max(1, cores // 2)} thread(s) ({cores} cores, 2 ranks)" in run.err(0)
    with Run(1, 1, flags(load_checkpoint="false"), env={"OMP_NUM_THREADS": "1"}) as run:
        run.succeed()
    assert "1 thread(s) (OMP_NUM_THREADS)" in run.err(0)


def test_a_rank_without_a_progress_bar_says_how_far_the_run_is(flags: Flags) -> None:
    with Run(2, 1, flags(), faults={1: partial(talkative, 0.0)}) as run:
        run.succeed()
    said = re.findall(r"^rank 1: step (\d) of 6, \d+\.\d\d s a step$", run.err(1), re.MULTILINE)
    assert said == list("123456")
    assert "rank 0: step" not in run.err(0)
