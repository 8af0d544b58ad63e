"""Documents of a packed row do not see one another: each gives the logits that it gives alone."""

from __future__ import annotations

import pytest
import torch
from farspan.modules.layers import init_unit
from farspan.modules.spec import ModelSpec
from farspan.pipeline.partition import stage_units
from farspan.pipeline.stage import Stage
from tiny import VOCAB, config_of
from torch import Tensor
from torch.profiler import profile
from transformers import AutoModelForCausalLM

LENGTHS = [[5, 1, 7, 6], [19], [1, 17, 1]]  # documents of each row


def make(split: tuple[int, ...], family: str, recompute: str = "none", **changes: object) -> list[Stage]:
    spec = ModelSpec.from_config(config_of(family, **changes).to_dict())
    stages = []
    for at in range(len(split)):
        cpu, units = torch.device("cpu"), stage_units(split, at)
        stage = Stage(spec, units, dtype=torch.float32, device=cpu, recompute=recompute)
        for unit, layer in zip(stage.units, stage.layers, strict=True):
            init_unit(layer, spec, unit, seed=1)
        with torch.no_grad():
            for parameter in stage.parameters():
                parameter.mul_(6 if parameter.ndim > 1 else 1)  # so that what attention sees does matter
        stages.append(stage)
    return stages


def forward(stages: list[Stage], x: Tensor, positions: Tensor | None, seed: int = 0) -> Tensor:
    for stage in stages:
        x = stage(x, seed, None, positions)
    return x


def distance(a: Tensor, b: Tensor) -> float:
    """||a − b|| relative to ||b||."""
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (len(LENGTHS), sum(LENGTHS[0])), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def positions() -> Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS])


@pytest.mark.parametrize("family", ["gptj", "gptneox", "llama"])
@pytest.mark.parametrize("split", [(5,), (1, 3, 1)])
def test_each_document_is_as_if_alone(family: str, split: tuple[int, ...], tokens: Tensor, positions: Tensor) -> None:
    stages = make(split, family)
    logits = forward(stages, tokens, positions)
    assert distance(logits, forward(stages, tokens, None)) > 0.1
    for row, lengths, got in zip(tokens, LENGTHS, logits, strict=True):
        for document, own in zip(row.split(lengths), got.split(lengths), strict=True):
            assert distance(own, forward(stages, document[None], None)[0]) < 1e-5


@pytest.mark.parametrize("family", ["gptneox", "llama"])
def test_hugging_face_says_the_same(family: str, tokens: Tensor, positions: Tensor) -> None:
    """Its model with position_ids and a mask of four dimensions."""
    (stage,) = make((5,), family)
    model = AutoModelForCausalLM.from_config(config_of(family), attn_implementation="sdpa").eval()
    model.load_state_dict({t.hf_name.replace("embed_out", "lm_head"): t.parameter for t in stage.tensors()})
    document = (positions == 0).cumsum(1)
    mask = (document[:, :, None] == document[:, None, :]).tril()[:, None]
    want = model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert distance(forward([stage], tokens, positions), want) < 1e-5


def test_positions_begin_anew(positions: Tensor) -> None:
    """Rotary positions are relative, so beside the mask this shows in rounding alone: it is looked up here."""
    (stage,) = make((5,), "gptneox")
    rotary = stage.layers[1].attn.rotary
    cos, sin = rotary.tables(positions.shape[1], torch.device("cpu"), torch.float32)
    documents = rotary.documents(positions, torch.float32)
    for row, own in enumerate(positions.tolist()):
        assert torch.equal(documents.cos[row], cos[own])
        assert torch.equal(documents.sin[row], sin[own])


@pytest.mark.parametrize("changes", [{}, {"attention_dropout": 0.3}], ids=str)
@pytest.mark.parametrize("family", ["gptneox", "llama"])
@pytest.mark.parametrize("recompute", ["block", "selective"])
def test_recomputing_changes_no_gradient(
    family: str, recompute: str, changes: dict, tokens: Tensor, positions: Tensor
) -> None:
    gradients = []
    for mode in ("none", recompute):
        (stage,) = make((5,), family, mode, **changes)
        forward([stage], tokens, positions, seed=3).square().mean().backward()
        gradients.append([parameter.grad for parameter in stage.parameters()])
    for want, got in zip(*gradients, strict=True):
        assert want is not None
        assert got is not None
        assert torch.equal(got, want)


def test_selective_recomputation_keeps_attention(tokens: Tensor, positions: Tensor) -> None:
    """The mask does not drive attention to a kernel that would be run again."""

    def attentions(given: Tensor | None) -> int:
        (stage,) = make((5,), "llama", "selective")
        with profile() as ran:
            forward([stage], tokens, given).sum().backward()
        counts = {event.key: event.count for event in ran.key_averages()}
        return counts["aten::_scaled_dot_product_flash_attention_for_cpu"]

    assert attentions(positions) == attentions(None)


def test_bfloat16(tokens: Tensor, positions: Tensor) -> None:
    (stage,) = make((5,), "llama")
    want = forward([stage], tokens, positions)
    stage.to(torch.bfloat16).dtype = torch.bfloat16
    got = forward([stage], tokens, positions)
    assert distance(got.float(), want) < 0.05
