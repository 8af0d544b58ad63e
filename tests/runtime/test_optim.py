"""The optimizer against torch's own, the schedule against transformers', and what bf16 keeps in fp32."""

from __future__ import annotations

from pathlib import Path

import torch
from farspan.modules.shards import ShardStore
from farspan.pipeline.stage import Stage
from farspan.runtime.checkpoint import load_weights
from farspan.runtime.config import Config
from farspan.runtime.optim import Optimizer, clip_factor

CPU = torch.device("cpu")


def stage_of(model: Path, dtype: torch.dtype = torch.float32) -> tuple[Stage, Optimizer]:
    store = ShardStore(model)
    stage = Stage(store.spec, range(store.spec.unit_count), dtype=dtype, device=CPU)
    optimizer = Optimizer(stage, Config(lr=1e-2, weight_decay=0.1))
    load_weights(store, optimizer)
    return stage, optimizer


def test_clipping_is_torchs_own() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    weight.grad = torch.tensor([3.0, 4.0, 12.0])
    norm = float(torch.nn.utils.clip_grad_norm_([weight], 2.0))
    torch.testing.assert_close(torch.tensor([3.0, 4.0, 12.0]) * clip_factor(norm, 2.0), weight.grad)
    assert clip_factor(0.5, 2.0) == 1.0
    assert clip_factor(100.0, 0.0) == 1.0


def test_norms_and_biases_do_not_decay(model: Path) -> None:
    """With zero gradients only decay moves a weight."""
    _, optimizer = stage_of(model)
    before = [m.detach().clone() for m in optimizer.masters]
    optimizer.step(1e-2, 1.0)
    for tensor, master, old in zip(optimizer.tensors, optimizer.masters, before, strict=True):
        if master.ndim == 1:
            assert torch.equal(master, old), tensor.hf_name
        else:
            torch.testing.assert_close(master.detach(), old * (1 - 1e-2 * 0.1))


def test_bf16_trains_fp32_weights(model: Path) -> None:
    """Steps too small for bf16 add up; the stage always holds the rounded fp32 weights."""
    stage, optimizer = stage_of(model, torch.bfloat16)
    source = ShardStore(model).read_unit(1)
    start = {
        t.name: m.detach().clone() for t, m in zip(optimizer.tensors, optimizer.masters, strict=True) if t.unit == 1
    }
    for name, tensor in source.items():
        assert torch.equal(start[name], tensor)  # not rounded on the way in
    ids = torch.randint(0, 64, (2, 16))
    for _ in range(3):
        optimizer.gradients.zero()
        stage(ids).float().square().mean().backward()
        assert all(t.parameter.grad is None for t in optimizer.tensors)
        assert optimizer.gradients.flat.abs().sum() > 0
        optimizer.step(1e-6, 1.0)
    for tensor, master in zip(optimizer.tensors, optimizer.masters, strict=True):
        assert torch.equal(tensor.parameter, master.to(torch.bfloat16))
    moved = [m for t, m in zip(optimizer.tensors, optimizer.masters, strict=True) if t.unit == 1 and m.ndim > 1]
    assert all(
        not torch.equal(m.detach(), s) for m, s in zip(moved, [v for v in start.values() if v.ndim > 1], strict=True)
    )


def test_adam_couples_its_decay(model: Path) -> None:
    store = ShardStore(model)
    stage = Stage(store.spec, range(store.spec.unit_count), dtype=torch.float32, device=CPU)
    optimizer = Optimizer(stage, Config(optimizer="adam", lr=1e-2, weight_decay=0.1))
    load_weights(store, optimizer)
    old = optimizer.masters[0].detach().clone()
    optimizer.step(1e-2, 1.0)
    # A pure decay gradient, normalised by Adam: a whole step of lr, whatever the weight's size.
    moved = (optimizer.masters[0].detach() - old)[old.abs() > 1e-2]
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 1e-2), rtol=1e-2, atol=0)
