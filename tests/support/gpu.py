"""What the tests on a GPU share: whether there is one, ranks that may all use the same, and what a run has made."""

from __future__ import annotations

import importlib.util
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import Ended, Run, read_metrics
from safetensors.torch import load_file
from torch import Tensor

DEVICE = torch.device("cuda", 0)
_MISSING = (
    "no CUDA device here"
    if not torch.cuda.is_available()
    else "NCCL needs cupy, which is not installed"
    if importlib.util.find_spec("cupy") is None
    else ""
)
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
with_nccl = [pytest.mark.gpu, pytest.mark.skipif(bool(_MISSING), reason=_MISSING)]


def own_host(rank: int) -> None:
    """NCCL refuses two ranks on one GPU of one host, so each claims to be a host of its own. (From 2.30 on it has a
    switch instead.) Few channels: all ranks' transfers share one GPU's processors."""
    os.environ["NCCL_HOSTID"] = f"farspan-rank-{rank}"
    os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    os.environ["NCCL_MAX_CTAS"] = "2"
    os.environ["NCCL_DEBUG"] = "WARN"  # so that a failed test shows why


def gpu_run(stages: int, replicas: int, flags: dict[str, Any], **options: Any) -> Run:  # noqa: ANN401
    """All ranks on the one device."""
    faults = {rank: partial(own_host, rank) for rank in range(stages * replicas)}
    return Run(stages, replicas, {"use_cuda": "true", "cuda_id": 0, **flags}, faults=faults, **options)


def last_line(end: Ended) -> str:
    """farspan's own; NCCL's warnings may stand around it."""
    return next(line for line in reversed(end.err.splitlines()) if line.startswith("farspan: "))


def curve(folder: Path) -> list[float]:
    return [row[key] for row in read_metrics(folder) for key in ("loss", "grad_norm")]


def weights(folder: Path) -> dict[str, Tensor]:
    """Of a run's last checkpoint."""
    files = (folder / f"checkpoint_{(folder / 'latest').read_text().strip()}").glob("*.safetensors")
    return {name: x for file in sorted(files) for name, x in load_file(file).items()}


def assert_same(folder: Path, reference: Path, rtol: float) -> None:
    """Losses, gradient norms and weights of two runs."""
    assert curve(folder) == pytest.approx(curve(reference), rel=rtol)
    ours, theirs = weights(folder), weights(reference)
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        assert (ours[name].double() - want.double()).norm() <= rtol * want.double().norm() + 1e-12, name
