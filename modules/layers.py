"""A model as a list of units, `[Embed, Block, …, Block, Head]`, of which a pipeline stage holds a slice.

Every unit maps one tensor to one tensor, so a stage is a plain loop. Inside a unit the parameter names are ours and
the same for all families; `hf_names` gives their names on disk.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .loss import CHUNK_LOGITS, linear_cross_entropy_sum
from .parts import Attention, Documents, Mlp, Rotary, make_norm
from .spec import ModelSpec


class Embed(nn.Module):
    """Token ids [b, T] int64 → [b, T, C]."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.tokens = nn.Embedding(spec.vocab, spec.width, padding_idx=spec.pad_token)
        self.dropout = spec.embed_dropout

    def forward(self, ids: Tensor) -> Tensor:
        return _dropped(self.tokens(ids), self.dropout, self.training)


class Block(nn.Module):
    """[b, T, C] → [b, T, C]: attention and MLP, one after the other or side by side."""

    def __init__(self, spec: ModelSpec, rotary: Rotary) -> None:
        super().__init__()
        self.norm1 = make_norm(spec)
        self.attn = Attention(spec, rotary)
        self.norm2 = make_norm(spec) if "norm2" in spec.facts.modules else None
        self.mlp = Mlp(spec)
        self.parallel = spec.parallel
        self.dropout = spec.residual_dropout

    def forward(self, x: Tensor, documents: Documents | None = None) -> Tensor:
        normed = self.norm1(x)
        attended = _dropped(self.attn(normed, documents), self.dropout, self.training)
        if not self.parallel:
            x = x + attended
        if self.norm2 is not None:
            normed = self.norm2(x)
        y = _dropped(self.mlp(normed), self.dropout, self.training)
        return y + attended + x if self.parallel else y + x


class Head(nn.Module):
    """[b, T, C] → logits [b, T, V]."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.norm = make_norm(spec)
        self.out = nn.Linear(spec.width, spec.vocab, bias=spec.head_bias)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(self.norm(x))
        return logits

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Σ cross-entropy [] over `labels` [b, T] (see `cross_entropy_sum`), without all logits at once."""
        return linear_cross_entropy_sum(self.norm(x), self.out.weight, self.out.bias, labels)


def build_layers(
    spec: ModelSpec, units: Sequence[int], *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> list[nn.Module]:
    """The modules of `units`, in order, with uninitialised parameters: load or `init_unit` them. One Rotary for all."""
    rotary = Rotary(spec)
    layers: list[nn.Module] = []
    for unit in units:
        spec.unit_name(unit)  # refuses a unit that is not there
        with torch.device("meta"):  # no time spent on torch's own initialisation
            layer = Embed(spec) if unit == 0 else Head(spec) if unit == spec.head_unit else Block(spec, rotary)
            layers.append(layer.to(dtype).to_empty(device=device))
    return layers


@lru_cache(maxsize=64)
def _shapes(spec: ModelSpec, unit: int) -> dict[str, torch.Size]:
    (layer,) = build_layers(spec, [unit], device="meta")
    return {name: parameter.shape for name, parameter in layer.named_parameters()}


def unit_shapes(spec: ModelSpec, unit: int) -> dict[str, torch.Size]:
    """Parameter name → shape, of one unit's module."""
    return dict(_shapes(spec, unit if unit in (0, spec.head_unit) else 1))


def unit_elements(spec: ModelSpec, unit: int) -> int:
    """How many parameters one unit's module has."""
    return sum(shape.numel() for shape in unit_shapes(spec, unit).values())


def unit_work(spec: ModelSpec, unit: int, rows: int, length: int) -> float:
    """Multiply-adds of one unit's matrix products, forward and backward, for a micro-batch [rows, length].

    None for an embedding, which looks up; in the head's backward its logits are made again where they do not all fit.
    """
    if unit == spec.embed_unit:
        return 0.0
    for_a_token = sum(shape.numel() for shape in unit_shapes(spec, unit).values() if len(shape) == 2)
    if unit != spec.head_unit:
        # Scores with the tokens up to it, which are half of the row on the mean, and the sum of their values.
        for_a_token += length * spec.heads * spec.head_dim
    again = unit == spec.head_unit and rows * length * spec.vocab > CHUNK_LOGITS
    return float((4 if again else 3) * for_a_token * rows * length)


def hf_names(spec: ModelSpec, unit: int) -> dict[str, str]:
    """Parameter name in the unit's module → full tensor name in an HF checkpoint.

    A tied head's weight maps to the embedding's name: there is no other tensor.
    """
    spec.unit_name(unit)
    modules = dict(spec.facts.modules)
    if spec.tied:
        modules["out"] = modules["tokens"]
    names = {}
    for name in unit_shapes(spec, unit):
        module, _, leaf = name.rpartition(".")
        hf = f"{modules[module].format(unit - 1)}.{leaf}"
        # The bias of a tied head is its own.
        names[name] = f"{spec.facts.modules['out']}.bias" if name == "out.bias" else hf
    return names


def mix_seed(seed: int, number: int) -> int:
    """One number for both, another for each pair (`number` from 0 to 1,000,002). Checkpoints and runs depend on it."""
    return seed * 1_000_003 + number


@torch.no_grad()
def init_unit(module: nn.Module, spec: ModelSpec, unit: int, seed: int) -> None:
    """Initialise as HF does: N(0, init_std) for matrices, 1 for norms, 0 for biases (and a padding token's row).

    Drawn on the CPU in fp32 from (seed, unit), so that a model does not depend on how its units are spread. A tied
    head draws what the embedding draws.
    """
    drawn_as = 0 if spec.tied and unit == spec.head_unit else unit
    generator = torch.Generator().manual_seed(mix_seed(seed, drawn_as) % 2**63)
    for name, parameter in module.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        weight = torch.empty(parameter.shape).normal_(0.0, spec.init_std, generator=generator)
        if spec.pad_token is not None and drawn_as == 0:
            weight[spec.pad_token] = 0.0
        parameter.copy_(weight)


def decayed_names(module: nn.Module) -> set[str]:
    """The parameters that weight decay acts on: matrices. Norms and biases are vectors."""
    return {name for name, parameter in module.named_parameters() if parameter.ndim >= 2}


def _dropped(x: Tensor, p: float, training: bool) -> Tensor:
    return F.dropout(x, p) if training and p > 0 else x
