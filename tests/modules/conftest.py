"""The oracle of this room: transformers' own models, with weights in which every term of the formula counts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from farspan.modules.layers import build_layers, hf_names
from farspan.modules.loss import cross_entropy_sum
from farspan.modules.shards import ShardStore
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

TINY: dict[str, dict[str, Any]] = {
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": 61, "n_positions": 32},
    "gpt_neox": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": 61,
        "max_position_embeddings": 32,
    },
    "llama": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": 61,
        "max_position_embeddings": 32,
    },
}


def make_hf(model_type: str, **changes: Any) -> PreTrainedModel:  # noqa: ANN401
    """A tiny HF model in fp32. Biases are not 0 and norms not 1, so that a forgotten one shows."""
    facts = {"bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2}
    config = AutoConfig.for_model(model_type, **{**facts, **TINY[model_type], **changes})
    torch.manual_seed(0)
    attention = "eager" if model_type == "gptj" else "sdpa"  # HF's GPT-J has no sdpa
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def load_ours(folder: Path) -> tuple[ShardStore, list[nn.Module]]:
    store = ShardStore(folder)
    layers = build_layers(store.spec, range(store.spec.unit_count))
    for unit, layer in enumerate(layers):
        layer.load_state_dict(store.read_unit(unit), strict=True)
    if store.spec.tied:
        layers[-1].out.weight = layers[0].tokens.weight
    return store, layers


def run_ours(layers: list[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def distance(a: Tensor, b: Tensor) -> float:
    """||a − b|| relative to ||b||."""
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()


def assert_same_model(hf: PreTrainedModel, folder: Path, tokens: int, tolerance: float = 1e-5) -> None:
    """Logits and every parameter's gradient, of HF in memory and of ours read from `folder`."""
    store, layers = load_ours(folder)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, store.spec.vocab, (2, tokens), generator=generator)
    labels = torch.randint(0, store.spec.vocab, (2, tokens), generator=generator)
    labels[0, :3] = -100

    expected = hf(ids, use_cache=False).logits
    cross_entropy_sum(expected, labels).backward()
    logits = run_ours(layers, ids)
    cross_entropy_sum(logits, labels).backward()
    assert distance(logits, expected) <= tolerance

    gradients = {name: parameter.grad for name, parameter in hf.named_parameters()}
    compared = set()
    for unit, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            hf_name = hf_names(store.spec, unit)[name].replace("embed_out", "lm_head")
            assert parameter.grad is not None
            assert distance(parameter.grad, gradients[hf_name]) <= tolerance, hf_name
            compared.add(hf_name)
    assert compared == gradients.keys()


@pytest.fixture
def same_as_hf(tmp_path: Path) -> Callable[..., None]:
    """Make a tiny model, save it as HF does, and compare."""

    def check(model_type: str, *, tokens: int = 19, **changes: Any) -> None:  # noqa: ANN401
        hf = make_hf(model_type, **changes).eval()
        hf.save_pretrained(tmp_path)
        assert_same_model(hf, tmp_path, tokens)

    return check


@pytest.fixture
def tiny_hf() -> Callable[..., PreTrainedModel]:
    return make_hf


@pytest.fixture
def load() -> Callable[[Path], tuple[ShardStore, list[nn.Module]]]:
    return load_ours


@pytest.fixture
def assert_same() -> Callable[..., None]:
    return assert_same_model
