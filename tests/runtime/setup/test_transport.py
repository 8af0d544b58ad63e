"""Which library carries what, in whole runs over a stand-in for NCCL (tests/support/fake_nccl.py) in host memory.
The same on a GPU: tests/gpu/."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_nccl import take_the_place_of_cuda
from farspan.comm.topology import Topology
from farspan.runtime.flags.config import Config
from farspan.runtime.setup.wiring import backend_of, group_members
from launch import Run, read_metrics
from safetensors.torch import load_file
from tiny import make_model

Flags = Callable[..., dict[str, Any]]


def test_each_groups_library() -> None:
    grid, tied = Topology(2, 3), True
    names = [name for name, _ in group_members(grid, tied)]
    config = Config(dist_backend="cupy_nccl", dp_backend="gloo")
    by_nccl = {name for name in names if backend_of(config, name) == "nccl"}
    assert by_nccl == {n for n in names if "tied" in n or n[0].isdigit()}
    assert len(by_nccl) == 2 * (2 * 2 + 1)
    config = replace(config, dist_backend="gloo", dp_backend="nccl")
    assert {n for n in names if backend_of(config, n) == "nccl"} == {f"replicas of stage {s}" for s in range(3)}


def train(run_flags: dict[str, Any], folder: Path, stages: int, replicas: int, **backends: Any) -> dict[str, Any]:  # noqa: ANN401
    told = {**run_flags, "checkpoint_path": folder, "batch_size": 8 // replicas, **backends}
    faults = dict.fromkeys(range(stages * replicas), take_the_place_of_cuda) if backends else None
    with Run(stages, replicas, {**told, "use_cuda": None} if backends else told, faults=faults) as run:
        run.succeed()
    step = folder / f"checkpoint_{run_flags['total_steps']}"
    weights = {k: v for file in sorted(step.glob("*.safetensors")) for k, v in load_file(file).items()}
    return {"curve": [row[k] for row in read_metrics(folder) for k in ("loss", "grad_norm")], **weights}


@pytest.mark.parametrize(
    ("dist", "dp", "more"),
    [
        ("nccl", "nccl", {"pp_mode": "1f1b"}),
        ("cupy_nccl", "gloo", {"dp_mode": "zero1"}),
        ("gloo", "nccl", {"dp_mode": "zero1", "bucket_mb": 0.02}),
    ],
)
def test_any_two_libraries_train_the_same(
    flags: Flags, tmp_path: Path, dist: str, dp: str, more: dict[str, Any]
) -> None:
    told = flags(model_name=make_model(tmp_path / "m", "llama", tie_word_embeddings=True), total_steps=3, **more)
    alone = train({**told, "dp_mode": "allreduce"}, tmp_path / "alone", 1, 1)
    both = train(told, tmp_path / "both", 2, 2, dist_backend=dist, dp_backend=dp)
    assert both["curve"] == pytest.approx(alone["curve"], rel=1e-5)
    for name, weight in alone.items():
        if name != "curve":
            assert torch.allclose(both[name], weight, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("who", [0, 1, 2])
def test_a_peer_that_dies_ends_all(flags: Flags, who: int) -> None:
    told = flags(total_steps=10_000, dist_backend="nccl", dp_backend="nccl", use_cuda=None, join_timeout=30)
    with Run(3, 1, told, faults=dict.fromkeys(range(3), take_the_place_of_cuda)) as run:
        run.wait_for_step(2)
        run.signal(who, signal.SIGKILL)
        ended = run.wait(40)
    for rank, end in ended.items():
        if rank != who:
            assert end.code == 1, end.err
            assert f"lost rank {who}" in end.err.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("flag", ["dist_backend", "dp_backend"])
def test_without_cuda_one_line_says_so(flags: Flags, flag: str) -> None:
    with Run(1, 1, {**flags(), flag: "nccl", "use_cuda": None}) as run:
        ended = run.wait(60)[0]
    assert ended.code == 1
    assert ended.err.splitlines()[-1].endswith("nccl needs a CUDA device, and torch sees none here: use gloo")
