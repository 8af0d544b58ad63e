"""What a run can be told, on a GPU: precision, memory, optimizers, evaluation, stopping; and what it does when a rank
is killed."""

from __future__ import annotations

import importlib.util
import signal
from pathlib import Path
from typing import Any

import gpu
import pytest
import torch
from launch import Run, read_metrics
from tiny import make_model, make_task

pytestmark = gpu.with_nccl


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_model(folder / "model", "llama")
    make_task(folder / "a.jsonl")
    make_task(folder / "held.jsonl", lines=10, seed=5)
    return folder


def flags(folder: Path, checkpoints: Path, **changes: Any) -> dict[str, Any]:  # noqa: ANN401
    return {
        "model_name": folder / "model",
        "task_name": folder / "a.jsonl",
        "checkpoint_path": checkpoints,
        "seq_length": 16,
        "batch_size": 8,
        "micro_batch_size": 2,
        "total_steps": 6,
        "lr": 3e-3,
        "wire_timeout": 60,
        "join_timeout": 60,
        "dist_backend": "nccl",
        "dp_backend": "nccl",
        **changes,
    }


ON_CPU = {"dist_backend": "gloo", "dp_backend": "gloo", "use_cuda": "false"}


@pytest.mark.parametrize(
    ("stages", "replicas", "changes", "rtol"),
    [
        (2, 1, {"recompute": "selective", "use_offload": True}, 1e-4),
        (2, 1, {"bf16": True, "recompute": "block", "pp_mode": "1f1b"}, 3e-2),
        (1, 2, {"bf16": True, "dp_mode": "zero1", "bucket_mb": 0.02, "use_offload": True}, 3e-2),
        (1, 2, {"fp16": True, "dp_mode": "zero1", "initial_loss_scale": 1024.0}, 3e-2),
        (2, 1, {"optimizer": "8bit-adam"}, 3e-2),
    ],
)
def test_as_on_cpu(
    folder: Path, tmp_path: Path, stages: int, replicas: int, changes: dict[str, Any], rtol: float
) -> None:
    if changes.get("optimizer") == "8bit-adam" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    told = {"batch_size": 8 // replicas, **changes}
    with gpu.gpu_run(stages, replicas, flags(folder, tmp_path / "gpu", **told)) as run:
        run.succeed(60)
    # 16 bits are slow on CPU, and fp32 is what they stand for.
    plain = {name: value for name, value in told.items() if name not in ("fp16", "bf16", "use_offload", "recompute")}
    with Run(stages, replicas, flags(folder, tmp_path / "cpu", **{**plain, **ON_CPU})) as run:
        run.succeed(60)
    if rtol < 1e-3:
        gpu.assert_same(tmp_path / "gpu", tmp_path / "cpu", rtol)
    else:
        assert gpu.curve(tmp_path / "gpu") == pytest.approx(gpu.curve(tmp_path / "cpu"), rel=rtol)


def test_evaluation_and_going_on(folder: Path, tmp_path: Path) -> None:
    held = {"evaluation_data": folder / "held.jsonl", "evaluation_steps": 2, "checkpoint_steps": 2}
    told = flags(folder, tmp_path / "whole", **held)
    with gpu.gpu_run(2, 1, told) as run:
        run.succeed(60)
    whole = read_metrics(tmp_path / "whole")
    with gpu.gpu_run(2, 1, {**told, "checkpoint_path": tmp_path / "cpu", **ON_CPU}) as run:
        run.succeed(60)
    on_gpu, on_cpu = (
        [row["eval_loss"] for row in read_metrics(tmp_path / name) if "eval_loss" in row] for name in ("whole", "cpu")
    )
    assert on_gpu == pytest.approx(on_cpu, rel=1e-4)
    assert len(on_gpu) == 3
    assert all(row["peak_memory_gib"] > 0 for row in whole)
    before = gpu.weights(tmp_path / "whole")
    with gpu.gpu_run(2, 1, {**told, "load_step": 2}) as run:
        run.succeed(60)
    after = gpu.weights(tmp_path / "whole")
    for name, x in before.items():  # some of CUDA's kernels add in no fixed order
        torch.testing.assert_close(after[name], x, rtol=1e-4, atol=1e-6)


def test_checking_a_grid(folder: Path, tmp_path: Path) -> None:
    """Every stage plans its memory and measures its layers, the middle one too, which only has neighbours."""
    with gpu.gpu_run(3, 1, flags(folder, tmp_path, check=True, document_mask=True, bf16=True)) as run:
        run.succeed(90)
        assert "verdict: good" in run.err(0)


@pytest.mark.parametrize("who", [0, 1, 2])
def test_a_killed_rank_is_named_by_the_others(folder: Path, tmp_path: Path, who: int) -> None:
    with gpu.gpu_run(3, 1, flags(folder, tmp_path, total_steps=100_000)) as run:
        run.wait_for_step(3)
        run.signal(who, signal.SIGKILL)
        ended = run.wait(30)
    for rank, end in ended.items():
        if rank != who:
            assert end.code == 1, end.err
            assert f"lost rank {who}" in gpu.last_line(end), end.err


def test_a_stopped_rank_is_named_by_the_others(folder: Path, tmp_path: Path) -> None:
    with gpu.gpu_run(2, 1, flags(folder, tmp_path, total_steps=100_000)) as run:
        run.wait_for_step(3)
        run.signal(1, signal.SIGSTOP)
        stopped = run.processes.pop(1)  # it cannot end by itself
        try:
            ended = run.wait(40)
        finally:
            run.processes[1] = stopped
    assert ended[0].code == 1
    assert "rank 1" in gpu.last_line(ended[0])
