"""Recomputing keeps less and changes no bit of losses and gradients, dropout included, in every family."""

from __future__ import annotations

import pytest
import torch
from farspan.modules.layers import init_unit
from farspan.modules.spec import ModelSpec
from farspan.pipeline.recompute import RECOMPUTE, Recompute
from farspan.pipeline.stage import Stage
from tiny import VOCAB, config_of
from torch import Tensor

DROPPING = [
    {"family": "gptneox", "hidden_dropout": 0.3, "attention_dropout": 0.2},
    {"family": "gptj", "embd_pdrop": 0.2, "attn_pdrop": 0.3, "resid_pdrop": 0.3},
    {"family": "llama"},
]


def make(recompute: str, dtype: torch.dtype = torch.float32, **changes: object) -> Stage:
    spec = ModelSpec.from_config(config_of(layers=3, **changes).to_dict())
    stage = Stage(spec, range(spec.unit_count), dtype=dtype, device=torch.device("cpu"), recompute=recompute)
    for unit, layer in zip(stage.units, stage.layers, strict=True):
        init_unit(layer, spec, unit, seed=1)
    return stage


@pytest.fixture
def rows() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, VOCAB, (2, 3, 16), generator=torch.Generator().manual_seed(0))
    return tokens[0], tokens[1]


def trained(stage: Stage, rows: tuple[Tensor, Tensor]) -> tuple[list[float], list[Tensor], int]:
    """Losses and gradients of two micro-batches that are both alive, as 1F1B has them, and the bytes that were kept."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if not isinstance(x, torch.nn.Parameter):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        losses = [stage(rows[0], seed, rows[1]) for seed in (5, 6)]
    torch.rand(7)  # whatever else draws from torch's generator
    for loss in losses:
        loss.backward()
    return [loss.item() for loss in losses], [t.parameter.grad for t in stage.tensors()], sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", DROPPING, ids=lambda changes: changes["family"])
@pytest.mark.parametrize("mode", RECOMPUTE[1:])
def test_the_same_bits(mode: str, changes: dict, dtype: torch.dtype, rows: tuple[Tensor, Tensor]) -> None:
    losses, gradients, _ = trained(make("none", dtype, **changes), rows)
    again_losses, again_gradients, _ = trained(make(mode, dtype, **changes), rows)
    assert again_losses == losses
    assert len(set(losses)) == (1 if changes["family"] == "llama" else 2)  # the masks are the micro-batch's own
    for want, found in zip(gradients, again_gradients, strict=True):
        assert torch.equal(found, want)


@pytest.mark.parametrize("family", ["gptneox", "gptj", "llama"])
def test_the_backward_repeats_blocks_or_all_but_their_products(family: str, rows: tuple[Tensor, Tensor]) -> None:
    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.products = self.norms = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # noqa: ANN001, ANN204 - as torch calls it
            name = op.overloadpacket.__name__
            self.products += name in ("mm", "addmm")
            self.norms += name in ("native_layer_norm", "_fused_rms_norm", "rsqrt")
            return op(*args, **(kwargs or {}))

    counts = {}
    for mode in RECOMPUTE:
        loss = make(mode, family=family)(rows[0], 0, rows[1])
        with Counting() as counting:
            loss.backward()
        counts[mode] = counting.products, counting.norms
    (products, norms), block, selective = (counts[mode] for mode in RECOMPUTE)
    assert block[0] > products
    assert selective[0] == products
    assert block[1] > norms
    assert selective[1] > norms


def test_less_is_kept(rows: tuple[Tensor, Tensor]) -> None:
    none, block = (trained(make(mode, family="gptneox"), rows)[2] for mode in ("none", "block"))
    assert block < none / 4


def test_an_evaluation_recomputes_nothing() -> None:
    calls = []
    with torch.no_grad():
        Recompute("block", attn_dropout=False)(lambda x: calls.append(x) or x, torch.ones(1))
    assert len(calls) == 1
    with pytest.raises(ValueError, match="recompute 'blocks' is none of none, block, selective"):
        Recompute("blocks", attn_dropout=False)
