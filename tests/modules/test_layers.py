"""What the oracle does not show: initialisation, weight decay, dropout, causality, shared tables."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from farspan.modules.layers import build_layers, decayed_names, hf_names, init_unit, unit_work
from farspan.modules.loss import count_valid, cross_entropy_sum
from farspan.modules.spec import ModelSpec
from tiny import config_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
LLAMA = ModelSpec.from_config({"model_type": "llama", "vocab_size": 500, **SMALL})
TIED = ModelSpec.from_config({"model_type": "llama", "vocab_size": 500, "tie_word_embeddings": True, **SMALL})
NEOX = ModelSpec.from_config({"model_type": "gpt_neox", "vocab_size": 500, **SMALL})


def initialised(spec: ModelSpec, unit: int, seed: int = 0, **kind: Any) -> dict[str, Tensor]:  # noqa: ANN401
    (layer,) = build_layers(spec, [unit], **kind)
    init_unit(layer, spec, unit, seed)
    return dict(layer.named_parameters())


def test_initialisation_is_that_of_hf() -> None:
    for unit in range(NEOX.unit_count):
        for name, parameter in initialised(NEOX, unit).items():
            if name.endswith("bias"):
                assert (parameter == 0).all()
            elif "norm" in name:
                assert (parameter == 1).all()
            else:
                assert parameter.std().item() == pytest.approx(NEOX.init_std, rel=0.05)
                assert abs(parameter.mean().item()) < 0.002


def test_initialisation_depends_on_seed_and_unit_alone() -> None:
    torch.manual_seed(1)
    first = initialised(LLAMA, 2)
    torch.manual_seed(2)
    again, half = initialised(LLAMA, 2), initialised(LLAMA, 2, dtype=torch.bfloat16)
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name])
        assert torch.equal(parameter.bfloat16(), half[name])
    for other in (initialised(LLAMA, 1), initialised(LLAMA, 2, seed=1)):
        assert not torch.equal(first["attn.q.weight"], other["attn.q.weight"])


def test_a_tied_head_starts_as_the_embedding() -> None:
    embedding, head = initialised(TIED, 0)["tokens.weight"], initialised(TIED, TIED.head_unit)["out.weight"]
    assert torch.equal(embedding, head)
    assert hf_names(TIED, TIED.head_unit)["out.weight"] == hf_names(TIED, 0)["tokens.weight"]
    assert not torch.equal(embedding, initialised(LLAMA, LLAMA.head_unit)["out.weight"])


def test_a_padding_token_starts_at_zero() -> None:
    spec = ModelSpec.from_config({"model_type": "llama", "vocab_size": 500, "pad_token_id": 3, **SMALL})
    embedding = initialised(spec, 0)["tokens.weight"]
    assert (embedding == 0).all(-1).nonzero().flatten().tolist() == [3]


def test_names_on_disk() -> None:
    assert hf_names(NEOX, 2)["attn.qkv.weight"] == "gpt_neox.layers.1.attention.query_key_value.weight"
    assert hf_names(NEOX, 3) == {
        "norm.weight": "gpt_neox.final_layer_norm.weight",
        "norm.bias": "gpt_neox.final_layer_norm.bias",
        "out.weight": "embed_out.weight",
    }


@pytest.mark.parametrize("spec", [LLAMA, NEOX])
def test_weight_decay_spares_norms_and_biases(spec: ModelSpec) -> None:
    for layer in build_layers(spec, range(spec.unit_count), device="meta"):
        names = {name for name, _ in layer.named_parameters()}
        assert decayed_names(layer) == {name for name in names if "norm" not in name and "bias" not in name}
        assert decayed_names(layer)


def test_building_initialises_nothing() -> None:
    """Neither time nor random numbers are spent on weights that a checkpoint replaces."""
    before = torch.get_rng_state()
    layers = build_layers(LLAMA, range(1, 3), dtype=torch.bfloat16)
    assert torch.equal(before, torch.get_rng_state())
    assert {parameter.dtype for layer in layers for parameter in layer.parameters()} == {torch.bfloat16}
    assert layers[0].attn.rotary is layers[1].attn.rotary


@pytest.mark.parametrize("spec", [LLAMA, NEOX])
def test_no_position_sees_a_later_one(spec: ModelSpec) -> None:
    layers = build_layers(spec, range(spec.unit_count))
    for unit, layer in enumerate(layers):
        init_unit(layer, spec, unit, seed=0)
    ids = torch.arange(24).view(2, 12)
    changed = ids.clone()
    changed[:, 7:] += 100
    x, y = ids, changed
    for layer in layers:
        x, y = layer(x), layer(y)
    torch.testing.assert_close(x[:, :7], y[:, :7], rtol=0, atol=1e-6)
    assert (x[:, 7:] != y[:, 7:]).all(-1).all()


def test_evaluation_before_training() -> None:
    """Tables that were made in inference mode serve autograd."""
    (block,) = build_layers(LLAMA, [1])
    init_unit(block, LLAMA, 1, seed=0)
    x = torch.randn(1, 5, 48)
    with torch.inference_mode():
        seen = block(x)
    y = block(x)
    y.sum().backward()
    assert torch.equal(seen, y)
    assert torch.equal(block(x[:, :3]), block(x[:, :3].clone()))


@pytest.mark.parametrize(
    ("model_type", "rates"),
    [
        ("gptj", {"embd_pdrop": 0.1, "attn_pdrop": 0.2, "resid_pdrop": 0.3}),
        ("gpt_neox", {"hidden_dropout": 0.1, "attention_dropout": 0.2}),
        ("gpt_neox", {"hidden_dropout": 0.1, "attention_dropout": 0.2, "use_parallel_residual": False}),
        ("llama", {"attention_dropout": 0.2}),
    ],
)
def test_dropout_acts_where_hf_has_it(
    tiny_hf: Callable[..., PreTrainedModel],
    load: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    rates: dict[str, Any],
) -> None:
    """With a recorder in place of torch's dropout, both models drop with the same rates, in the same order, in training
    alone."""
    hf = tiny_hf(model_type, **rates)
    hf.save_pretrained(tmp_path)
    _, layers = load(tmp_path)
    calls: list[float] = []
    attend = F.scaled_dot_product_attention

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        calls.append(p if training else 0.0)
        return x

    def attention(*args: Any, dropout_p: float = 0.0, **kwargs: Any) -> Tensor:  # noqa: ANN401
        calls.append(dropout_p)
        return attend(*args, **kwargs)

    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)

    def dropped(run: Callable[[Tensor], Any]) -> list[float]:
        calls.clear()
        run(torch.arange(12).view(2, 6))
        return [p for p in calls if p]

    def ours(x: Tensor) -> None:
        for layer in layers:
            x = layer(x)

    assert dropped(ours) == dropped(hf.train()) != []
    for layer in layers:
        layer.eval()
    assert dropped(ours) == dropped(hf.eval()) == []


def test_dropout_drops() -> None:
    spec = ModelSpec.from_config({"model_type": "gpt_neox", "hidden_dropout": 0.25, "vocab_size": 500, **SMALL})
    (embed,) = build_layers(spec, [0])
    torch.nn.init.ones_(embed.tokens.weight)
    ids = torch.zeros(8, 100, dtype=torch.int64)
    torch.manual_seed(0)
    first = embed(ids)
    torch.manual_seed(0)
    assert torch.equal(first, embed(ids))
    assert (first == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert (embed.eval()(ids) == 1).all()


def test_loss_is_a_sum_over_valid_positions() -> None:
    logits, labels = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    labels[0, 1:] = labels[2, 0] = -100
    expected = sum(-logits[b, t].log_softmax(-1)[labels[b, t]] for b in range(3) for t in range(5) if labels[b, t] >= 0)
    torch.testing.assert_close(cross_entropy_sum(logits, labels), expected)
    assert count_valid(labels) == 10
    half = cross_entropy_sum(logits.bfloat16(), labels)
    assert half.dtype == torch.float32
    nothing = torch.full((3, 5), -100)
    assert cross_entropy_sum(logits, nothing) == 0
    assert count_valid(nothing) == 0


def work_that_torch_counts(spec: ModelSpec, unit: int, rows: int, length: int) -> float:
    """Multiply-adds of its matrix products, forward and backward, without those within the attention's kernel."""
    dtype = torch.bfloat16  # a product that adds to an fp32 matrix in place is not counted
    (layer,) = build_layers(spec, [unit], dtype=dtype)
    init_unit(layer, spec, unit, seed=0)
    labels = torch.randint(0, spec.vocab, (rows, length))
    x = labels if unit == 0 else torch.randn(rows, length, spec.width, dtype=dtype, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        (layer.loss(x, labels) if unit == spec.head_unit else layer(x)).sum().backward()
    return sum(n for op, n in counter.get_flop_counts().get("Global", {}).items() if "scaled_dot" not in str(op)) / 2


@pytest.mark.parametrize("family", ["gptj", "gptneox", "llama"])
def test_a_units_work_is_what_torch_counts(family: str) -> None:
    rows, length = 2, 12
    spec = ModelSpec.from_config(config_of(family).to_dict())
    for unit in range(spec.unit_count):
        # Two products, each of every token with half of the row on the mean.
        scores = 3 * rows * length**2 * spec.heads * spec.head_dim if 0 < unit < spec.head_unit else 0
        assert unit_work(spec, unit, rows, length) == work_that_torch_counts(spec, unit, rows, length) + scores


def test_a_large_head_makes_its_logits_twice() -> None:
    spec = ModelSpec.from_config(config_of("gptneox", vocab_size=50432).to_dict())
    for length, times in ((332, 3), (333, 4)):
        assert unit_work(spec, spec.head_unit, 1, length) == times * spec.width * spec.vocab * length
        assert work_that_torch_counts(spec, spec.head_unit, 1, length) == times * spec.width * spec.vocab * length
