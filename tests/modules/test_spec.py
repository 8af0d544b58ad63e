"""config.json, in the spellings of transformers 4.x and 5.x, to a ModelSpec and back."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from farspan.modules.families.registry import FAMILIES
from farspan.modules.spec import ModelSpec, SpecError, hf_config
from transformers import AutoConfig

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_mean_what_they_mean_in_transformers(family: str) -> None:
    """Read from a bare model_type, and from all that transformers writes out for it."""
    model_type = FAMILIES[family].model_type
    written = AutoConfig.for_model(model_type).to_dict()
    assert ModelSpec.from_config({"model_type": model_type}) == ModelSpec.from_config(written)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {
                "model_type": "llama",
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0},
            },
        ),
        (
            {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {"model_type": "llama", "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}},
        ),
        (
            {"model_type": "gpt_neox", "rotary_pct": 1.0, "rotary_emb_base": 1000},
            {"model_type": "gpt_neox", "rope_parameters": {"rope_theta": 1000, "partial_rotary_factor": 1.0}},
        ),
    ],
)
def test_both_spellings_are_one_model(old: dict[str, Any], new: dict[str, Any]) -> None:
    spec = ModelSpec.from_config(new)
    assert ModelSpec.from_config(old) == spec
    # transformers agrees with our reading of the old spelling
    assert dict(spec.rope).items() <= AutoConfig.for_model(**old).rope_parameters.items()


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama"},
        {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 123.0}},
        {"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "rope_theta": 123.0, "factor": 2.0}},
        {"model_type": "llama", "rope_parameters": {"rope_type": "yarn", "rope_theta": 123.0, "factor": 2.0}},
        {"model_type": "gpt_neox", "rope_parameters": {"rope_theta": 123.0, "partial_rotary_factor": 0.75}},
        {"model_type": "gptj", "rotary_dim": 32},
    ],
)
def test_written_config_serves_old_and_new_transformers(config: dict[str, Any]) -> None:
    spec = ModelSpec.from_config(config)
    written = json.loads(json.dumps(hf_config(spec, torch.bfloat16)))
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"
    assert ModelSpec.from_config(written) == spec
    as_4x = {key: value for key, value in written.items() if key != "rope_parameters"}
    assert ModelSpec.from_config(as_4x) == spec
    if "rope_parameters" in written:
        loaded, rope = AutoConfig.for_model(**written), dict(spec.rope)
        assert AutoConfig.for_model(**as_4x).rope_parameters == loaded.rope_parameters
        assert rope.items() <= loaded.rope_parameters.items()


def test_written_config_names_the_old_keys() -> None:
    neox = {"model_type": "gpt_neox", "rope_parameters": {"rope_theta": 9.0, "partial_rotary_factor": 0.5}}
    written = hf_config(neox, "float16")
    assert (written["rotary_emb_base"], written["rotary_pct"], written["rope_scaling"]) == (9.0, 0.5, None)
    llama = {"model_type": "llama", "rope_parameters": {"rope_type": "llama3", "rope_theta": 9.0, **LLAMA3}}
    written = hf_config(llama, "float16")
    assert written["rope_theta"] == 9.0
    assert written["rope_scaling"].items() >= {"rope_type": "llama3", **LLAMA3}.items()
    yarn = {"model_type": "llama", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    # Given the old length, 4.57 would take the ratio of the lengths, 1, for the factor.
    assert "original_max_position_embeddings" not in hf_config(yarn, "float16")["rope_scaling"]


def test_units() -> None:
    spec = ModelSpec.from_config({"model_type": "gptj", "n_layer": 3})
    assert spec.unit_count == 5
    assert [spec.unit_name(u) for u in range(5)] == ["embed", "block-00000", "block-00001", "block-00002", "head"]
    for unit in (-1, 5):
        with pytest.raises(IndexError):
            spec.unit_name(unit)


def test_specs_are_values() -> None:
    """Equal and hashable by what the model is, whatever else config.json holds."""
    a = ModelSpec.from_config({"model_type": "llama", "transformers_version": "4.40"})
    assert a == ModelSpec.from_config({"model_type": "llama"})
    assert hash(a) == hash(ModelSpec.from_config({"model_type": "llama"}))
    assert a != ModelSpec.from_config({"model_type": "llama", "rope_theta": 20000.0})


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "mistral"}, "'mistral' is not supported; farspan trains gptj, gpt_neox, llama"),
        ({}, "model_type None"),
        ({"model_type": "llama", "hidden_size": 10, "num_attention_heads": 3}, "10 is not divisible by 3 heads"),
        ({"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 5}, "32 heads cannot share 5"),
        ({"model_type": "llama", "hidden_act": "mish"}, "'mish' is not one of gelu"),
        ({"model_type": "llama", "hidden_size": "4096"}, "hidden_size is '4096'"),
        ({"model_type": "llama", "num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"model_type": "llama", "tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ({"model_type": "gptj", "resid_pdrop": 1.5}, "resid_pdrop is 1.5"),
        ({"model_type": "gptj", "rotary_dim": None}, "rotary_dim is None"),
        ({"model_type": "gptj", "rotary_dim": 512}, "up to the head's 256"),
        ({"model_type": "llama", "rope_scaling": {"type": "longrope"}}, "RoPE type 'longrope' is not supported"),
        ({"model_type": "llama", "rope_scaling": {"type": "linear"}}, "'linear' needs factor"),
        ({"model_type": "llama", "rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2', not a number"),
        ({"model_type": "llama", "partial_rotary_factor": 0.5}, "turns whole heads"),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(config: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError) as caught:
        ModelSpec.from_config(config, where="config.json")
    assert says in str(caught.value)
    assert str(caught.value).startswith("config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: None, "is not a folder"),
        (lambda folder: folder.mkdir(), "has no config.json"),
        (lambda folder: (folder.mkdir(), (folder / "config.json").write_text("{")), "is not JSON"),
        (lambda folder: (folder.mkdir(), (folder / "config.json").write_text("[]")), "not an object"),
    ],
)
def test_folders_without_a_config(tmp_path: Path, make: Callable[[Path], object], says: str) -> None:
    make(tmp_path / "model")
    with pytest.raises(SpecError, match=says):
        ModelSpec.from_folder(tmp_path / "model")


@pytest.mark.parametrize(
    ("kind", "positions", "original"), [("linear", 4096, None), ("dynamic", 2048, None), ("yarn", 4096, 2048)]
)
@pytest.mark.parametrize("model_type", ["gpt_neox", "llama"])
def test_a_stretched_model_is_written_for_both_releases(
    model_type: str, kind: str, positions: int, original: int | None
) -> None:
    plain = ModelSpec.from_config({"model_type": model_type, "rope_scaling": None})
    spec = plain.stretched(kind, 2.0)
    assert (plain.longest, spec.longest, spec.scaling, plain.scaling) == (2048, 4096, f"{kind}:2", "none")
    written = hf_config(spec, torch.float32)
    assert written["max_position_embeddings"] == positions
    for key in ("rope_parameters", "rope_scaling"):  # of 5.x, of 4.x
        assert written[key]["rope_type"] == kind
        assert written[key]["factor"] == 2.0
        assert written[key].get("original_max_position_embeddings") == original
    again = ModelSpec.from_config(json.loads(json.dumps(written)))
    assert repr(again) == repr(spec)
    assert hf_config(again, torch.float32) == written
    assert again.stretched(kind, 2.0) is again


@pytest.mark.parametrize(
    ("config", "kind", "factor", "says"),
    [
        ({"model_type": "gptj"}, "linear", 2.0, "the rotary positions of a gptj cannot be scaled"),
        (
            {"model_type": "gpt_neox", "hidden_size": 32, "num_attention_heads": 4}, "dynamic", 2.0,
            "dynamic scaling needs more than 2 turning dimensions in a head: linear or yarn",
        ),
        ({"model_type": "llama"}, "yarn", 1.3, "1.3 × the model's 2048 positions is no whole number"),
        (
            {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}}, "linear", 2.0,
            "the model's positions are scaled already, by linear:4: leave it out",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_stretched(config: dict[str, Any], kind: str, factor: float, says: str) -> None:
    with pytest.raises(SpecError, match=re.escape(says)):
        ModelSpec.from_config(config).stretched(kind, factor)
