"""Our layers against transformers' models in fp32: logits and the gradient of every parameter, to 1e-5 of its norm."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from farspan.modules.layers import build_layers
from farspan.modules.spec import ACTIVATIONS, ModelSpec, hf_config
from transformers import AutoModelForCausalLM, PreTrainedModel

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 777.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8},
}
Check = Callable[..., None]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"rotary_dim": 8, "n_inner": 40},
        {"activation_function": "gelu"},
    ],
    ids=str,
)
def test_gptj(same_as_hf: Check, changes: dict[str, Any]) -> None:
    same_as_hf("gptj", **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_parallel_residual": False, "attention_bias": False},
        {"tie_word_embeddings": True, "hidden_act": "gelu_fast"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}},
        # 8 · 0.4 = 3.2: three dimensions, which HF rounds up to two pairs
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4}},
    ],
    ids=str,
)
def test_gptneox(same_as_hf: Check, changes: dict[str, Any]) -> None:
    same_as_hf("gpt_neox", **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 2, "tie_word_embeddings": True},
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
        {"head_dim": 16, "num_key_value_heads": 2},
        {"head_dim": 4, "hidden_act": "relu"},
        {"pad_token_id": 5},
    ],
    ids=str,
)
def test_llama(same_as_hf: Check, changes: dict[str, Any]) -> None:
    same_as_hf("llama", **changes)


@pytest.mark.parametrize("rope", ROPES)
def test_llama_rope_types(same_as_hf: Check, rope: str) -> None:
    same_as_hf("llama", tokens=32, rope_parameters=dict(ROPES[rope]))


@pytest.mark.parametrize("rope", [rope for rope in ROPES if rope != "default"])
def test_gptneox_rope_types_turn_a_part_of_the_head(same_as_hf: Check, rope: str) -> None:
    same_as_hf("gpt_neox", tokens=32, rope_parameters={**ROPES[rope], "partial_rotary_factor": 0.5})


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_dynamic_rope_beyond_the_trained_length(same_as_hf: Check, model_type: str) -> None:
    share = {"partial_rotary_factor": 0.5} if model_type == "gpt_neox" else {}
    same_as_hf(model_type, tokens=45, rope_parameters={**ROPES["dynamic"], **share})


def test_dynamic_rope_forgets_a_long_row() -> None:
    """What a row gets must not depend on the rows before it."""
    config = {"model_type": "llama", "max_position_embeddings": 8, "rope_parameters": dict(ROPES["dynamic"])}
    config |= {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 7}
    rotary = build_layers(ModelSpec.from_config(config), [1], device="meta")[0].attn.rotary
    cpu = torch.device("cpu")
    fresh = [table.clone() for table in rotary.tables(6, cpu, torch.float32)]
    rotary.tables(20, cpu, torch.float32)
    for table, again in zip(fresh, rotary.tables(6, cpu, torch.float32), strict=True):
        assert torch.equal(table, again)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
@pytest.mark.parametrize("model_type", ["gpt_neox", "llama"])
def test_stretched_positions(
    tmp_path: Path, tiny_hf: Callable[..., PreTrainedModel], assert_same: Check, model_type: str, kind: str
) -> None:
    """Twice the model's positions: transformers reads from what we write the model that we train."""
    share = {"partial_rotary_factor": 0.5} if model_type == "gpt_neox" else {}
    rope = {"rope_type": "default", "rope_theta": 777.0, **share}
    plain = tiny_hf(model_type, rope_parameters=rope).eval()
    plain.save_pretrained(tmp_path)
    written = hf_config(ModelSpec.from_folder(tmp_path).stretched(kind, 2.0), torch.float32)
    (tmp_path / "config.json").write_text(json.dumps(written))
    scaled = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert_same(scaled, tmp_path, 64)
    ids = torch.arange(60)[None]
    assert not torch.allclose(plain(ids).logits, scaled(ids).logits, atol=1e-3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(same_as_hf: Check, activation: str) -> None:
    same_as_hf("llama", num_hidden_layers=1, hidden_act=activation)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("model_type", ["gptj", "gpt_neox", "llama"])
def test_any_shape(same_as_hf: Check, model_type: str, seed: int) -> None:
    draw = random.Random(f"{model_type} {seed}")
    heads, head_dim = draw.choice([1, 2, 3, 6]), draw.choice([4, 6, 10])
    width, layers, tied = heads * head_dim, draw.randint(1, 4), draw.random() < 0.5
    shape: dict[str, Any] = {"tie_word_embeddings": tied, "vocab_size": draw.randint(5, 90)}
    if model_type == "gptj":
        shape |= {"n_embd": width, "n_head": heads, "n_layer": layers, "rotary_dim": draw.choice([2, 4])}
        shape |= {"n_inner": draw.choice([None, 17])}
    else:
        shape |= {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": layers}
        shape |= {"intermediate_size": draw.randint(3, 50), "attention_bias": draw.random() < 0.5}
    if model_type == "gpt_neox":
        theta, share = draw.choice([100.0, 10000.0]), draw.choice([0.25, 0.5, 1.0])
        shape |= {"use_parallel_residual": draw.random() < 0.5}
        shape |= {"rope_parameters": {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": share}}
    if model_type == "llama":
        shape |= {"num_key_value_heads": draw.choice([k for k in (1, 2, 3, 6) if heads % k == 0])}
        shape |= {"mlp_bias": draw.random() < 0.5, "head_dim": draw.choice([None, 8])}
    same_as_hf(model_type, tokens=draw.randint(1, 32), **shape)
