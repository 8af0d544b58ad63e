"""A stage is a slice of the model, and where the cuts are changes neither results nor names."""

from __future__ import annotations

import pytest
import torch
from farspan.modules.layers import init_unit
from farspan.modules.spec import ModelSpec
from farspan.pipeline.partition import stage_units
from farspan.pipeline.stage import Stage
from tiny import VOCAB, config_of
from torch import Tensor


def make(split: tuple[int, ...], family: str = "gptneox", **changes: object) -> list[Stage]:
    spec = ModelSpec.from_config(config_of(family, **changes).to_dict())
    stages = []
    for at in range(len(split)):
        stage = Stage(spec, stage_units(split, at), dtype=torch.float32, device=torch.device("cpu"))
        for unit, layer in zip(stage.units, stage.layers, strict=True):
            init_unit(layer, spec, unit, seed=1)
        stages.append(stage)
    return stages


def forward(stages: list[Stage], tokens: Tensor, seed: int = 0) -> Tensor:
    x = tokens
    for stage in stages:
        x = stage(x, seed)
    return x


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))


def test_first_and_last_follow_from_the_units() -> None:
    assert [(s.is_first, s.is_last) for s in make((2, 2, 1))] == [(True, False), (False, False), (False, True)]
    assert [(s.is_first, s.is_last) for s in make((5,))] == [(True, True)]


@pytest.mark.parametrize("split", [(3, 2), (2, 2, 1), (1, 1, 1, 1, 1)])
def test_cuts_do_not_change_the_result(split: tuple[int, ...], tokens: Tensor) -> None:
    assert torch.equal(forward(make(split), tokens), forward(make((5,)), tokens))


@pytest.mark.parametrize(
    "changes",
    [
        {"family": "gptneox", "hidden_dropout": 0.3},
        {"family": "gptneox", "attention_dropout": 0.3},
        {"family": "gptj", "embd_pdrop": 0.3},
        {"family": "gptj", "attn_pdrop": 0.3, "resid_pdrop": 0.3},
    ],
    ids=str,
)
def test_dropout_is_that_of_the_micro_batch_wherever_the_cuts_are(changes: dict, tokens: Tensor) -> None:
    whole, cut = make((5,), **changes), make((2, 2, 1), **changes)
    masked = forward(whole, tokens, seed=7)
    torch.rand(1)  # whatever else draws from torch's generator
    assert torch.equal(forward(cut, tokens, seed=7), masked)
    assert not torch.equal(forward(whole, tokens, seed=8), masked)
    plain = forward([stage.eval() for stage in whole], tokens)
    assert not torch.equal(plain, masked)
    assert torch.equal(forward([stage.eval() for stage in cut], tokens), plain)


def test_no_two_units_or_micro_batches_share_their_masks(tokens: Tensor) -> None:
    stages = make((2, 2, 1), hidden_dropout=0.3)
    seeds: list[int] = []
    for stage in stages:
        for layer in stage.layers:
            layer.register_forward_pre_hook(lambda *_: seeds.append(torch.initial_seed()))
    for seed in range(20):
        forward(stages, tokens, seed)
    assert len(seeds) == 20 * 7
    assert len(set(seeds)) == len(seeds)


def test_without_dropout_a_stage_leaves_torchs_generator_alone(tokens: Tensor) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    forward(make((5,), hidden_dropout=0.0, attention_dropout=0.0), tokens, seed=3)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("family", ["gptneox", "gptj", "llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_stages_tensors_add_up_to_the_model(family: str, tied: bool) -> None:
    def names(stages: list[Stage]) -> list[str]:
        return [t.hf_name for stage in stages for t in stage.tensors()]

    whole = make((5,), family, tie_word_embeddings=tied)
    cut = make((2, 2, 1), family, tie_word_embeddings=tied)
    assert len(set(names(whole))) == len(names(whole))
    assert set(names(cut)) == set(names(whole))
    shared = [name for name in names(cut) if names(cut).count(name) > 1]
    embedding = next(t.hf_name for t in cut[0].tensors() if t.unit == 0)
    assert shared == [embedding] * 2 * tied
    for stage in (*whole, *cut):
        assert [t.owner for t in stage.tensors()] == [0 if t.hf_name == embedding else t.unit for t in stage.tensors()]
        assert len({t.parameter.data_ptr() for t in stage.tensors()}) == len(list(stage.parameters()))
        for t in stage.tensors():
            assert stage.layers[t.unit - stage.units.start].get_parameter(t.name) is t.parameter


@pytest.mark.parametrize("family", ["gptneox", "llama"])
def test_a_tied_head_in_one_stage_with_its_embedding_is_one_matrix(family: str, tokens: Tensor) -> None:
    (stage,) = make((5,), family, tie_word_embeddings=True)
    embedding = stage.layers[0].get_parameter("tokens.weight")
    assert stage.layers[-1].get_parameter("out.weight") is embedding
    stage(tokens).sum().backward()
    # The head's use gives a gradient to all rows, the embedding's only to those that occur.
    assert embedding.grad is not None
    assert (embedding.grad.norm(dim=1) > 0).all()


def test_it_is_made_in_the_dtype_that_was_asked_for() -> None:
    spec = ModelSpec.from_config(config_of("llama").to_dict())
    stage = Stage(spec, range(1, 3), dtype=torch.bfloat16, device=torch.device("cpu"))
    assert {parameter.dtype for parameter in stage.parameters()} == {torch.bfloat16}
    assert len(stage.layers) == 2
