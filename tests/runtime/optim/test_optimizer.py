"""The optimizer against torch's own, the schedule against transformers', and what bf16 keeps in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from farspan.modules.shards import ShardStore
from farspan.pipeline.stage import Stage
from farspan.runtime.checkpoints.checkpoint import load_weights
from farspan.runtime.flags.config import Config, ConfigError
from farspan.runtime.optim.optimizer import Optimizer, clip_factor
from tiny import make_model
from torch import Tensor

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for 8-bit moments: smaller tensors keep theirs in fp32."""
    return make_model(tmp_path_factory.mktemp("wide") / "model", "gptneox", hidden_size=128, layers=1)


def stage_of(
    model: Path,
    dtype: torch.dtype = torch.float32,
    replica: int = 0,
    **told: Any,  # noqa: ANN401 - whatever a flag takes
) -> tuple[Stage, Optimizer]:
    store = ShardStore(model)
    stage = Stage(store.spec, range(store.spec.unit_count), dtype=dtype, device=CPU)
    optimizer = Optimizer(stage, Config(lr=1e-2, weight_decay=0.1, **told), replica)
    load_weights(store, optimizer)
    return stage, optimizer


def masters(optimizer: Optimizer) -> list[Tensor]:
    """The weights that are trained, each in its shape."""
    return [optimizer.state(i).get("master", tensor.parameter.detach()) for i, tensor in enumerate(optimizer.tensors)]


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
    before = [m.clone() for m in masters(optimizer)]
    optimizer.step(1e-2, 1.0)
    for tensor, master, old in zip(optimizer.tensors, masters(optimizer), before, strict=True):
        if master.ndim == 1:
            assert torch.equal(master, old), tensor.hf_name
        else:
            torch.testing.assert_close(master.detach(), old * (1 - 1e-2 * 0.1))


def test_bf16_trains_fp32_weights(model: Path) -> None:
    """Steps too small for bf16 add up; the stage always holds the rounded fp32 weights."""
    stage, optimizer = stage_of(model, torch.bfloat16)
    source = ShardStore(model).read_unit(1)
    start = {t.name: m.clone() for t, m in zip(optimizer.tensors, masters(optimizer), strict=True) if t.unit == 1}
    for name, tensor in source.items():
        assert torch.equal(start[name], tensor)  # not rounded on the way in
    ids = torch.randint(0, 64, (2, 16))
    for _ in range(3):
        optimizer.gradients.zero()
        stage(ids).float().square().mean().backward()
        assert all(t.parameter.grad is None for t in optimizer.tensors)
        assert optimizer.gradients.flat.abs().sum() > 0
        optimizer.step(1e-6, 1.0)
    for tensor, master in zip(optimizer.tensors, masters(optimizer), strict=True):
        assert torch.equal(tensor.parameter, master.to(torch.bfloat16))
    moved = [m for t, m in zip(optimizer.tensors, masters(optimizer), strict=True) if t.unit == 1 and m.ndim > 1]
    assert all(
        not torch.equal(m.detach(), s) for m, s in zip(moved, [v for v in start.values() if v.ndim > 1], strict=True)
    )


def test_adam_leaves_rows_that_no_token_touches(model: Path) -> None:
    """50 updates with zero gradients there: nothing but AdamW's decay moves them, bit for bit torch's."""
    told = {"optimizer": "adam", "max_grad_norm": 0.0}
    stage, optimizer = stage_of(model, **told)
    rows = optimizer.tensors[0].parameter
    assert optimizer.tensors[0].name == "tokens.weight"
    before = rows.detach().clone()
    ids = torch.randint(0, 8, (2, 16))
    for _ in range(50):
        optimizer.gradients.zero()
        stage(ids).square().mean().backward()
        optimizer.step(1e-4, 1.0)
    assert not torch.allclose(rows[:8], before[:8] * (1 - 1e-4 * 0.1) ** 50, atol=1e-4)
    torch.testing.assert_close(rows[8:].detach(), before[8:] * (1 - 1e-4 * 0.1) ** 50)


def test_adam_l2_is_torchs_adam(model: Path) -> None:
    _, optimizer = stage_of(model, optimizer="adam-l2")
    weight = masters(optimizer)[0]
    theirs = torch.nn.Parameter(weight.clone())
    torchs = torch.optim.Adam([theirs], lr=1e-2, eps=Config().adam_eps, weight_decay=0.1, fused=True)
    for seed in range(3):
        gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        theirs.grad = gradient.clone()
        optimizer.gradients.views[0].copy_(gradient)
        optimizer.step(1e-2, 1.0)
        torchs.step()
    assert torch.equal(masters(optimizer)[0], theirs)


def test_adam_l2_couples_its_decay(model: Path) -> None:
    _, optimizer = stage_of(model, optimizer="adam-l2")
    old = masters(optimizer)[0].clone()
    optimizer.step(1e-2, 1.0)
    # A pure decay gradient, normalised by Adam: a whole step of lr, whatever the weight's size.
    moved = (masters(optimizer)[0] - old)[old.abs() > 1e-2]
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 1e-2), rtol=1e-2, atol=0)


def steps(optimizers: list[Optimizer], count: int, seed: int = 0) -> None:
    """`count` updates of each with the same random gradients; shards end up everywhere."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        gradients = [torch.randn(t.parameter.shape, generator=generator) for t in optimizers[0].tensors]
        weights = []
        for optimizer in optimizers:
            for view, gradient in zip(optimizer.gradients.views, gradients, strict=True):
                view.copy_(gradient)
            weights.append(optimizer.step(1e-2, 0.5))
        for optimizer, own in zip(optimizers, weights, strict=True):
            if own is not None:
                for replica, other in enumerate(weights):
                    for start, stop in optimizer.gradients.owned(replica):
                        own[start:stop] = other[start:stop]
        for optimizer, own in zip(optimizers, weights, strict=True):
            if own is not None:
                optimizer.take(own)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["adamw", "adam-l2", "8bit-adam"])
def test_offload_gives_the_same_numbers(wide: Path, kind: str, dtype: torch.dtype) -> None:
    there, here = (stage_of(wide, dtype, optimizer=kind, use_offload=offload)[1] for offload in (True, False))
    steps([there], 3)
    steps([here], 3)
    for i, (a, b) in enumerate(zip(there.tensors, here.tensors, strict=True)):
        assert torch.equal(a.parameter, b.parameter), a.hf_name
        assert there.state(i).keys() == here.state(i).keys()
        assert all(torch.equal(x, y) for x, y in zip(there.state(i).values(), here.state(i).values(), strict=True))
    for piece in there.pieces:  # weights, moments and gradients of the update have memory of their own
        assert piece.master.data_ptr() != piece.weight.data_ptr()
        assert piece.master.grad is not piece.gradient
        assert piece.master.device.type == "cpu"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["adamw", "8bit-adam"])
def test_a_state_goes_on_where_it_was(wide: Path, kind: str, dtype: torch.dtype) -> None:
    """Bit for bit, through the checkpoint's names and shapes."""
    _, whole = stage_of(wide, dtype, optimizer=kind)
    steps([whole], 3)
    _, resumed = stage_of(wide, dtype, optimizer=kind)
    for i, tensor in enumerate(whole.tensors):
        state = whole.state(i)
        assert {name: value.shape for name, value in state.items()} == whole.state_shapes(i)
        resumed.set_weight(i, tensor.parameter.detach())
        resumed.load_state(i, {name: value.clone() for name, value in state.items()}, 3)
    steps([whole], 2, seed=1)
    steps([resumed], 2, seed=1)
    for a, b in zip(whole.tensors, resumed.tensors, strict=True):
        assert torch.equal(a.parameter, b.parameter), a.hf_name


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(("before", "after"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_a_run_may_change_its_precision(model: Path, before: torch.dtype, after: torch.dtype, offload: bool) -> None:
    """The fp32 weights come along, whether a checkpoint has them apart or as the weights themselves."""
    _, old = stage_of(model, before)
    steps([old], 3)
    _, new = stage_of(model, after, use_offload=offload)
    for i, tensor in enumerate(old.tensors):
        new.set_weight(i, tensor.parameter.detach())
        new.load_state(i, old.state(i), 3)
    for trained, master, tensor in zip(masters(old), masters(new), new.tensors, strict=True):
        assert torch.equal(trained, master)
        assert torch.equal(tensor.parameter, trained.to(after))
    for piece in new.pieces:
        assert torch.equal(piece.master.to(after), piece.weight)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("replicas", [2, 3])
def test_shards_give_the_same_bits_from_a_part_of_the_memory(
    model: Path, replicas: int, dtype: torch.dtype, offload: bool
) -> None:
    _, whole = stage_of(model, dtype)
    told = {"dp_mode": "zero1", "data_group_size": replicas, "bucket_mb": 0.02, "use_offload": offload}
    shards = [stage_of(model, dtype, replica, **told)[1] for replica in range(replicas)]
    steps([whole], 3)
    steps(shards, 3)
    for a, *others in zip(*(o.tensors for o in (whole, *shards)), strict=True):
        assert all(torch.equal(a.parameter, b.parameter) for b in others), a.hf_name
    for i in range(len(whole.tensors)):
        for name, value in whole.state(i).items():  # each element is one replica's, and 0 for the others
            assert torch.equal(value, sum(shard.state(i)[name] for shard in shards)), name
    parameters = sum(t.parameter.numel() for t in whole.tensors)
    assert whole.held_bytes() == (8 * parameters, 0 if dtype == torch.float32 else 4 * parameters)
    copies = 4 * parameters if offload or dtype != torch.float32 else 0
    held = [shard.held_bytes() for shard in shards]
    assert [sum(kind) for kind in zip(*held, strict=True)] == [8 * parameters, copies]
    for moments, masters_ in held:
        assert moments == pytest.approx(8 * parameters / replicas, rel=0.05)  # all but padding between tensors
        assert masters_ == pytest.approx(copies / replicas, rel=0.05)
    assert len(shards[0].gradients.buckets) > 3


def test_8bit_moments_take_a_byte_and_stay_close_to_adamw(wide: Path) -> None:
    _, exact = stage_of(wide)
    _, eight = stage_of(wide, optimizer="8bit-adam")
    start = [m.clone() for m in masters(exact)]
    steps([exact], 10)
    steps([eight], 10)
    kinds = {eight.state(i)["state1"].dtype for i, t in enumerate(eight.tensors) if t.parameter.numel() >= 4096}
    assert kinds == {torch.uint8}
    assert eight.held_bytes()[0] < 0.3 * exact.held_bytes()[0]
    for a, b, old in zip(masters(exact), masters(eight), start, strict=True):
        assert (a - b).norm() <= 0.05 * (a - old).norm()


def test_without_bitsandbytes_one_line_says_so(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--optimizer 8bit-adam needs the package: pip install bitsandbytes"):
        stage_of(model, optimizer="8bit-adam")
