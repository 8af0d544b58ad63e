"""What a model is, as data, read from the `config.json` of a Hugging Face checkpoint.

The file is read by hand: importing transformers costs more than a second, and its 4.x and 5.x releases spell the
rotary facts differently. Both spellings are understood, and `hf_config` writes both.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

import torch

from .families.family import Family
from .families.registry import FAMILIES
from .json_file import read_json, short

ACTIVATIONS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "silu", "swish", "relu")
ROPE_TYPES = {  # type → the keys it cannot do without
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


class SpecError(ValueError):
    """A config that is missing, broken or not supported. One line: what, where, what to do."""


@dataclass(frozen=True)
class ModelSpec:
    """A model's shape. It is cut into `unit_count` units: 0 the embedding, 1…layers the blocks, the last the head."""

    family: str  # a key of FAMILIES
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocab: int
    max_positions: int
    norm: str  # "layer" or "rms"
    norm_eps: float
    activation: str  # one of ACTIVATIONS
    parallel: bool  # attention and MLP side by side, both added to the block's input
    attn_bias: bool
    mlp_bias: bool
    head_bias: bool
    tied: bool  # the head's weight is the embedding's
    init_std: float
    rotary_dim: int  # dimensions of a head that turn
    rotary_interleaved: bool
    rope: tuple[tuple[str, Any], ...]  # `rope_parameters`, sorted; `rope_type` and `rope_theta` are always there
    embed_dropout: float = 0.0
    attn_dropout: float = 0.0
    residual_dropout: float = 0.0
    pad_token: int | None = None  # its embedding gets no gradient, as in HF's Llama
    config: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)  # config.json as it was read

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read `folder/config.json`. Raises SpecError."""
        path = Path(folder) / "config.json"
        if not Path(folder).is_dir():
            raise SpecError(f"{folder} is not a folder: name a folder that holds a model (config.json, *.safetensors)")
        if not path.is_file():
            raise SpecError(f"{folder} has no config.json: name a folder that holds a Hugging Face model")
        config = read_json(path, {}, SpecError, "copy it again from where the model is from")
        return cls.from_config(config, where=str(path))

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str = "the config") -> Self:
        """Understand a parsed config.json; absent keys get the family's defaults in transformers. Raises SpecError."""
        if not isinstance(config, dict):
            raise SpecError(f"{where} is not a JSON object but a {type(config).__name__}")
        family = _family_of(config, where)
        if config.get("quantization_config"):
            raise SpecError(f"{where} has a quantization_config: farspan trains plain weights, name the original model")
        values: dict[str, Any] = dict(family.fixed)
        for name, (key, default) in family.keys.items():
            values[name] = default if config.get(key) is None else config[key]
            _check_type(name, values[name], key, where)

        width, heads = values["width"], values["heads"]
        if values.get("head_dim") is None:
            if width % heads:
                raise SpecError(f"{where}: width {width} is not divisible by {heads} heads")
            values["head_dim"] = width // heads
        if values.get("kv_heads") is None:
            values["kv_heads"] = heads
        if heads % values["kv_heads"]:
            raise SpecError(f"{where}: {heads} heads cannot share {values['kv_heads']} key-value heads evenly")
        if values["mlp_width"] is None:
            values["mlp_width"] = 4 * width
        if values["activation"] not in ACTIVATIONS:
            raise SpecError(
                f"{where}: activation {short(repr(values['activation']))} is not one of {', '.join(ACTIVATIONS)}"
            )
        rope, rotary_dim = _rope_of(config, family, values["head_dim"], values["max_positions"], where)
        return cls(
            family=family.name,
            rope=tuple(sorted(rope.items())),
            rotary_dim=rotary_dim,
            rotary_interleaved=family.rotary.interleaved,
            config=config,
            **values,
        )

    def grown(self, vocab: int) -> Self:
        """The same model with `vocab` tokens; itself where it has as many already."""
        if vocab <= self.vocab:
            return self
        return replace(self, vocab=vocab, config={**self.config, self.facts.keys["vocab"][0]: vocab})

    def stretched(self, kind: str, factor: float) -> Self:
        """The same model with its rotary positions scaled, for rows up to `factor` times as long.

        `kind`: linear, dynamic or yarn. A model that is scaled so already is given back. Raises SpecError.
        """
        rope = dict(self.rope)
        if self.facts.rotary.theta is None:
            raise SpecError(f"the rotary positions of a {self.family} cannot be scaled")
        if (rope["rope_type"], rope.get("factor")) == (kind, factor):
            return self
        if rope["rope_type"] != "default":
            raise SpecError(f"the model's positions are scaled already, by {self.scaling}: leave it out")
        if kind not in self.stretches:
            raise SpecError(
                f"dynamic scaling needs more than {self.rotary_dim} turning dimensions in a head: linear or yarn"
            )
        longest = factor * self.max_positions
        if not longest.is_integer():
            raise SpecError(f"{factor:g} × the model's {self.max_positions} positions is no whole number")
        rope |= {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = self.max_positions
        # Dynamic scaling begins beyond the positions of the config, so there they stay what was trained.
        positions = self.max_positions if kind == "dynamic" else int(longest)
        beside = ("rope_scaling", "rope_parameters", "original_max_position_embeddings")  # `rope` says all of it
        config = {key: value for key, value in self.config.items() if key not in beside}
        config[self.facts.keys["max_positions"][0]] = positions
        return replace(self, max_positions=positions, rope=tuple(sorted(rope.items())), config=config)

    @property
    def stretches(self) -> tuple[str, ...]:
        """The kinds of scaling that `stretched` can give the rotary positions."""
        if self.facts.rotary.theta is None or self.scaling != "none":
            return ()
        return ("linear", "dynamic", "yarn") if self.rotary_dim > 2 else ("linear", "yarn")

    @property
    def scaling(self) -> str:
        """How the rotary positions are scaled: "linear:2", …, or "none"."""
        rope = dict(self.rope)
        return "none" if rope["rope_type"] == "default" else f"{rope['rope_type']}:{rope['factor']:g}"

    @property
    def longest(self) -> int:
        """The most tokens of a row."""
        rope = dict(self.rope)
        return int(rope["factor"] * self.max_positions) if rope["rope_type"] == "dynamic" else self.max_positions

    @property
    def facts(self) -> Family:
        return FAMILIES[self.family]

    @property
    def unit_count(self) -> int:
        return self.layers + 2

    @property
    def embed_unit(self) -> int:
        return 0

    @property
    def head_unit(self) -> int:
        return self.layers + 1

    def unit_name(self, unit: int) -> str:
        """ "embed", "block-00000" (numbered as HF numbers its layers) or "head"."""
        if not 0 <= unit < self.unit_count:
            raise IndexError(f"unit {unit} of a model with {self.unit_count} units")
        return {0: "embed", self.head_unit: "head"}.get(unit, f"block-{unit - 1:05d}")


def hf_config(spec_or_config: ModelSpec | dict[str, Any], dtype: torch.dtype | str) -> dict[str, Any]:
    """A config.json that transformers 4.57 and 5.x load alike.

    5.x writes `rope_parameters` alone and 4.x passes over it: a model with another θ or rotary share would load
    without a word and compute something else. So the old keys stand beside the new one, here and in every folder
    that farspan writes. `dtype` is that of the weights (torch.bfloat16 or "bfloat16").
    """
    spec = spec_or_config if isinstance(spec_or_config, ModelSpec) else ModelSpec.from_config(spec_or_config)
    family, keys = spec.facts, spec.facts.rotary
    config = dict(spec.config)
    config.setdefault("architectures", [family.architecture])
    config["tie_word_embeddings"] = spec.tied
    config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")
    if keys.theta is None:
        return config
    rope = dict(spec.rope)
    config["rope_parameters"] = dict(rope)
    config[keys.theta] = rope["rope_theta"]
    if keys.fraction and keys.fraction != "partial_rotary_factor":
        config[keys.fraction] = rope["partial_rotary_factor"]
    config["rope_scaling"] = None
    if rope["rope_type"] != "default":
        # 4.57's YaRN divides the two context lengths when it is given the old one, and so would lose the factor here.
        if rope["rope_type"] == "yarn" and rope["original_max_position_embeddings"] == spec.max_positions:
            del rope["original_max_position_embeddings"]
        beside = ("rope_theta", "partial_rotary_factor")  # 4.x has these at the top, and warns of strangers here
        config["rope_scaling"] = {key: value for key, value in rope.items() if key not in beside}
    return config


def _family_of(config: Mapping[str, Any], where: str) -> Family:
    found = config.get("model_type")
    for family in FAMILIES.values():
        if family.model_type == found:
            return family
    known = ", ".join(family.model_type for family in FAMILIES.values())
    raise SpecError(f"{where}: model_type {short(repr(found))} is not supported; farspan trains {known}")


def _check_type(name: str, value: object, key: str, where: str) -> None:
    """Refuse what would fail much later, or worse, would not."""
    kind = {f.name: f.type for f in fields(ModelSpec)}[name]
    if value is None:
        good = True  # the row allows it: worked out from other keys
    elif kind is bool:
        good = isinstance(value, bool)
    elif kind is int:
        good = isinstance(value, int) and not isinstance(value, bool) and value > 0
    elif kind is float:
        top = 1 if name.endswith("dropout") else math.inf
        good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= top
    else:
        good = isinstance(value, str | int)
    if not good:
        raise SpecError(f"{where}: {key} is {short(repr(value))}, which cannot be")


def _rope_of(
    config: Mapping[str, Any], family: Family, head_dim: int, max_positions: int, where: str
) -> tuple[dict[str, Any], int]:
    """The standardised `rope_parameters` and how many dimensions of a head turn."""
    keys = family.rotary
    if keys.dims:
        dims = config.get(keys.dims, 64)
        if not isinstance(dims, int) or dims % 2 or not 0 < dims <= head_dim:
            raise SpecError(
                f"{where}: {keys.dims} is {short(repr(dims))}, not an even number up to the head's {head_dim}"
            )
        return {"rope_type": "default", "rope_theta": 10000.0}, dims

    told = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(told, dict):
        raise SpecError(f"{where}: the RoPE parameters are {short(repr(told))}, not an object")
    rope = dict(told)
    kind = rope["rope_type"] = rope.pop("type", "default") if rope.get("rope_type") is None else rope["rope_type"]
    rope.pop("type", None)
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise SpecError(
            f"{where}: RoPE type {short(repr(kind))} is not supported; farspan knows {', '.join(ROPE_TYPES)}"
        )
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = config.get(keys.theta or "", 10000.0)
    fraction = rope.get("partial_rotary_factor")
    if fraction is None:
        fraction = config.get(keys.fraction or "")
    if fraction is None:
        fraction = keys.default_fraction
    for key, value in {**rope, "rope_theta": rope["rope_theta"], "partial_rotary_factor": fraction}.items():
        number = isinstance(value, int | float) and math.isfinite(value)
        if key != "rope_type" and not (number or value is None or isinstance(value, bool)):
            raise SpecError(f"{where}: RoPE parameter {short(key)} is {short(repr(value))}, not a number")
    missing = [key for key in ROPE_TYPES[kind] if rope.get(key) is None]
    if missing:
        raise SpecError(f"{where}: RoPE type {kind!r} needs {', '.join(missing)}")
    if rope["rope_theta"] <= 0 or not 0 <= fraction <= 1:
        raise SpecError(f"{where}: rope_theta {rope['rope_theta']} or rotary share {fraction} cannot be")
    if family.name == "llama" and fraction != 1:
        raise SpecError(f"{where}: a Llama turns whole heads, partial_rotary_factor {fraction} is not supported")
    if family.name != "llama":
        rope["partial_rotary_factor"] = fraction
    if kind in ("llama3", "yarn"):
        original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = original or max_positions
    return rope, int(head_dim * fraction)
