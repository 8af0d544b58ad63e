"""What a model family is, as facts: how its `config.json` spells what a model is, and its checkpoint our module names.

What is left out of a row of `modules` says something too: a block without `norm2` feeds one norm to both of its
branches, one with `attn.qkv` keeps its three projections in a single matrix (per head: q, k, v), one with `mlp.gate`
is gated.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RotaryKeys:
    """Where a config without `rope_parameters` keeps its rotary facts. None: the family has no such key."""

    theta: str | None = "rope_theta"
    fraction: str | None = None  # the share of a head that turns
    default_fraction: float = 1.0
    dims: str | None = None  # the same as a number of dimensions
    interleaved: bool = False  # pairs are neighbours (GPT-J) and not half a head apart


@dataclass(frozen=True)
class Family:
    name: str
    model_type: str  # in config.json
    architecture: str  # the class that loads it
    keys: Mapping[str, tuple[str, Any]]  # our field → (key in config.json, value when absent or null)
    fixed: Mapping[str, Any]  # our fields that no key of this family changes
    rotary: RotaryKeys
    modules: Mapping[str, str]  # our module → HF's, {} is the layer's number
    buffers: tuple[str, ...]  # endings of tensor names that old checkpoints hold and no one needs

    @property
    def base_prefix(self) -> str:
        """What a checkpoint saved from the bare model, without its head, lacks: "transformer.", "gpt_neox.", …"""
        return self.modules["tokens"].partition(".")[0] + "."
