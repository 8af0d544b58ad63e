"""One pipeline stage: a consecutive slice of [embedding, block …, head]. First and last are not special kinds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..modules.layers import Block, Head, build_layers, hf_names
from ..modules.parts import Documents
from ..modules.spec import ModelSpec
from .recompute import Recompute


class StageTensor(NamedTuple):
    """A parameter and where it belongs: its unit, its name within the unit's module, its full Hugging Face name.

    `shared`: it is the matrix that embedding and head have in common; `owner`: the unit that saves it.
    """

    unit: int
    name: str
    hf_name: str
    shared: bool
    parameter: nn.Parameter

    @property
    def owner(self) -> int:
        return 0 if self.shared else self.unit


class Stage(nn.Module):
    """A slice of the model: [b, T] tokens or [b, T, C] activations → [b, T, C] activations or [b, T, V] logits.

    `recompute`: what autograd keeps of a block, see `pipeline/recompute.py`.
    """

    def __init__(
        self, spec: ModelSpec, units: range, *, dtype: torch.dtype, device: torch.device, recompute: str = "none"
    ) -> None:
        super().__init__()
        self.spec, self.units, self.dtype, self.device = spec, units, dtype, device
        self.is_first, self.is_last = units.start == 0, units.stop == spec.unit_count
        self.layers = nn.ModuleList(build_layers(spec, units, dtype=dtype, device=device))
        self._rotary = next((layer.attn.rotary for layer in self.layers if isinstance(layer, Block)), None)
        self._dropout = max(spec.embed_dropout, spec.attn_dropout, spec.residual_dropout) > 0
        self._recompute = Recompute(recompute, attn_dropout=spec.attn_dropout > 0)
        if spec.tied and self.is_first and self.is_last:
            self._tie()

    def forward(
        self, x: Tensor, seed: int = 0, labels: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """`seed` names this micro-batch; with each unit's number it fixes the dropout masks, whatever the grid.

        A last stage that is given `labels` [b, T] returns Σ cross-entropy [] instead of the logits. With `positions`
        [b, T], of each token in its document, documents of one row do not see one another.
        """
        documents = None
        if positions is not None and self._rotary is not None:
            documents = self._rotary.documents(positions, self.dtype)
        for unit, layer in zip(self.units, self.layers, strict=True):
            if labels is not None and isinstance(layer, Head):
                return layer.loss(x, labels)
            run = partial(self._seeded, layer, seed * self.spec.unit_count + unit, documents)
            x = self._recompute(run, x) if isinstance(layer, Block) else run(x)
        return x

    def _seeded(self, layer: nn.Module, seed: int, documents: Documents | None, x: Tensor) -> Tensor:
        """Seeds in the very function that may run again in the backward: the masks are then the same."""
        if self._dropout and self.training:
            torch.manual_seed(seed % 2**63)  # the most that it takes
        y: Tensor = layer(x, documents) if isinstance(layer, Block) else layer(x)
        return y

    def tensors(self) -> Iterator[StageTensor]:
        """Every parameter once: a head that shares the embedding of this very stage brings nothing of its own."""
        embedding = hf_names(self.spec, 0).values()
        seen: set[int] = set()
        for unit, layer in zip(self.units, self.layers, strict=True):
            names = hf_names(self.spec, unit)
            for name, parameter in layer.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    shared = self.spec.tied and names[name] in embedding
                    yield StageTensor(unit, name, names[name], shared, parameter)

    def _tie(self) -> None:
        embed, head = self.layers[0], self.layers[-1]
        ((own, embedding),) = hf_names(self.spec, 0).items()
        name = next(n for n, hf in hf_names(self.spec, self.spec.unit_count - 1).items() if hf == embedding)
        module, _, attribute = name.rpartition(".")
        setattr(head.get_submodule(module), attribute, embed.get_parameter(own))
