"""ZeRO-1 in real runs: the numbers of one process, checkpoints that any grid takes over, buckets under computation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import Run, read_metrics
from safetensors.torch import load_file
from tiny import make_model

Flags = Callable[..., dict[str, Any]]
BATCH = 12  # sequences of one update, over all replicas


def train(run_flags: dict[str, Any], folder: Path, stages: int, replicas: int) -> list[dict[str, Any]]:
    told = {**run_flags, "checkpoint_path": folder, "batch_size": BATCH // replicas, "bucket_mb": 0.02}
    with Run(stages, replicas, told) as run:
        run.succeed()
    return read_metrics(folder)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, the optimizer's too."""
    return {k: v for file in sorted(folder.rglob("*.safetensors")) for k, v in load_file(file).items()}


def assert_close(a: Path, b: Path, rtol: float) -> None:
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    for name, x in left.items():
        y = right[name].double()
        assert (x.double() - y).norm() <= rtol * y.norm() + 1e-12, name


def curve(rows: list[dict[str, Any]]) -> list[float]:
    return [row[key] for row in rows for key in ("loss", "grad_norm")]


@pytest.mark.parametrize(
    ("stages", "replicas", "family", "changes"),
    [
        (1, 2, "gptneox", {}),
        (2, 2, "gptneox", {"pp_mode": "1f1b", "gradient_accumulate_step": 2, "total_steps": 8}),
        (1, 3, "llama", {"tie_word_embeddings": True}),
        (2, 3, "llama", {"tie_word_embeddings": True}),  # saving fails where the two copies' bits differ
        (2, 2, "gptj", {"bf16": True}),
    ],
)
def test_shards_train_what_one_process_trains(
    flags: Flags, tmp_path: Path, stages: int, replicas: int, family: str, changes: dict[str, Any]
) -> None:
    tie = {k: changes.pop(k) for k in list(changes) if k == "tie_word_embeddings"}
    told = flags(**{"model_name": make_model(tmp_path / "m", family, **tie), "total_steps": 4, **changes})
    alone = train({**told, "micro_batch_size": BATCH}, tmp_path / "alone", 1, 1)
    zero = train({**told, "dp_mode": "zero1"}, tmp_path / "zero", stages, replicas)
    rtol = 3e-2 if "bf16" in changes else 1e-5
    assert curve(zero) == pytest.approx(curve(alone), rel=rtol)
    if rtol == 1e-5:
        last = f"checkpoint_{told['total_steps']}"
        assert_close(tmp_path / "zero" / last, tmp_path / "alone" / last, 1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_two_replicas_have_the_bits_of_allreduce(flags: Flags, tmp_path: Path, precision: str) -> None:
    """Two summands have one order only. The same files, too: the names, the shapes and every bit."""
    told = flags(total_steps=4, **{precision: True})
    for mode in ("allreduce", "zero1"):
        train({**told, "dp_mode": mode}, tmp_path / mode, 2, 2)
    a, b = (tensors(tmp_path / mode / "checkpoint_4") for mode in ("allreduce", "zero1"))
    assert a.keys() == b.keys()
    assert any("exp_avg_sq" in name for name in a)
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_zero1_resumes_bit_for_bit(flags: Flags, tmp_path: Path) -> None:
    told = flags(dp_mode="zero1", checkpoint_steps=3, bf16=True)
    whole = train(told, tmp_path / "whole", 1, 3)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint_6")
    (tmp_path / "cut" / "latest").write_text("3")
    assert curve(train(told, tmp_path / "cut", 1, 3)) == curve(whole)
    assert_close(tmp_path / "cut" / "checkpoint_6", tmp_path / "whole" / "checkpoint_6", 0.0)


@pytest.mark.parametrize(("stages", "replicas", "mode"), [(1, 2, "allreduce"), (2, 2, "zero1")])
def test_another_grid_and_mode_take_over(flags: Flags, tmp_path: Path, stages: int, replicas: int, mode: str) -> None:
    """From zero1 on 1 × 3, the run goes on as it would have; and from there back again."""
    told = flags(checkpoint_steps=2, dp_mode="zero1", scheduler="constant")
    whole = train(told, tmp_path / "whole", 1, 3)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "latest").write_text("2")
    train({**told, "dp_mode": mode, "total_steps": 4}, tmp_path / "cut", stages, replicas)
    rows = train(told, tmp_path / "cut", 1, 3)
    assert curve(rows) == pytest.approx(curve(whole), rel=1e-5)
    assert len(rows) == 6


@pytest.mark.parametrize("mode", ["allreduce", "zero1"])
def test_buckets_are_summed_while_others_are_computed(flags: Flags, tmp_path: Path, mode: str) -> None:
    """In the trace, a bucket's sum starts before the last backward pass of its update has ended."""
    told = flags(dp_mode=mode, profiling="tidy_profiling", total_steps=3, seq_length=64)
    told["model_name"] = make_model(tmp_path / "wide", "gptneox", hidden_size=128, intermediate_size=512)
    train(told, tmp_path / "ck", 1, 2)
    events = json.loads((tmp_path / "ck" / "traces" / "trace.json").read_text())["traceEvents"]
    for rank in range(2):
        trace = [e for e in events if e["pid"] == rank]
        lane = [e for e in trace if e.get("cat") == "gradients" and e["name"].startswith("bucket")]
        backwards = [e for e in trace if e.get("cat") == "backward"]
        per_update = len(backwards) // 3
        for update in (1, 2):  # the first one counts how often each gradient is added to
            last = backwards[(update + 1) * per_update - 1]
            during = [e for e in lane if last["ts"] < e["ts"] < last["ts"] + last["dur"]]
            assert during, f"rank {rank}, update {update + 1}"
            numbers = [int(e["name"].split()[1]) for e in during]
            assert numbers == sorted(numbers, reverse=True)
