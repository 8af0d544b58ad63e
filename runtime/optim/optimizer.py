"""The optimizer of one stage: fp32 weights and moments, whatever the stage computes in."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ...modules.layers import decayed_names
from ...pipeline.gradients import Gradients, square_sum
from ...pipeline.stage import Stage
from ..flags.config import Config
from ..flags.errors import ConfigError

_BYTES_PER_MB = 1_000_000


def clip_factor(norm: float, longest: float) -> float:
    """What to multiply gradients with so that their global norm is at most `longest` (0: no limit)."""
    return min(1.0, longest / (norm + 1e-6)) if longest > 0 else 1.0


@dataclass
class Piece:
    """Consecutive elements [start, stop) of tensor `index`, flat, that this rank updates: a whole tensor, or a shard.

    `weight` and `gradient` are views of the stage's weight and of the flat gradients. `master` is what is trained, in
    fp32: `weight` itself, or a copy in higher precision or in host memory.
    """

    index: int
    start: int
    stop: int
    weight: Tensor
    gradient: Tensor
    master: nn.Parameter


class Optimizer:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101), AdamW with 8-bit moments (Dettmers et al., arXiv:2110.02861), or
    Adam with an L2 penalty, over `stage`, fed by `gradients`.

    Where the stage computes in 16 bits, fp32 copies of the weights are what is trained; the stage gets them rounded.
    With `--use-offload` these and the moments are in host memory, and are updated there. With `--dp-mode zero1` (ZeRO
    stage 1, Rajbhandari et al., arXiv:1910.02054) each replica has them for its shard of every bucket only.
    Raises `ConfigError` where a package is missing.
    """

    def __init__(self, stage: Stage, config: Config, replica: int = 0) -> None:
        self.tensors = list(stage.tensors())
        parameters = [t.parameter for t in self.tensors]
        self.sharded = config.dp_mode == "zero1" and config.data_group_size > 1
        self.gradients = Gradients(
            parameters,
            shards=config.data_group_size if self.sharded else 1,
            bucket_elements=int(config.bucket_mb * _BYTES_PER_MB / 4),
        )
        self._dtype, self._offload = stage.dtype, config.use_offload
        self._mixed = stage.dtype != torch.float32
        self._apart = self._mixed or self._offload
        owned = self.gradients.owned(replica) if self.sharded else [(0, self.gradients.flat.numel())]
        self.pieces = [p for i in range(len(self.tensors)) for p in self._pieces(i, owned)]
        decayed = {
            (unit, name) for unit, layer in zip(stage.units, stage.layers, strict=True) for name in decayed_names(layer)
        }
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for piece in self.pieces:
            tensor = self.tensors[piece.index]
            groups[(tensor.unit, tensor.name) in decayed].append(piece.master)
        self._torch, self._moments = _make(
            [
                {"params": members, "weight_decay": config.weight_decay if decay else 0.0}
                for decay, members in groups.items()
                if members or decay  # torch refuses to have nothing at all to do, as a small shard may have
            ],
            config,
        )

    @property
    def tied_gradient(self) -> Tensor | None:
        """The gradient of this stage's copy of a tied embedding, as embedding or as head."""
        views = zip(self.tensors, self.gradients.views, strict=True)
        return next((view for t, view in views if t.shared), None)

    def square_sum(self, skip: Tensor | None = None) -> float:
        """Σ g² over what this rank updates, without the gradient `skip`; of summed gradients."""
        views = self.gradients.views
        if not self.sharded:
            return self.gradients.square_sum(skip)
        return square_sum([p.gradient for p in self.pieces if views[p.index] is not skip])

    def step(self, lr: float, factor: float) -> Tensor | None:
        """One update with `factor` × the gradients.

        With shards it returns the stage's weights, laid out as the flat gradients (and in their memory), where this
        replica's shard is new: once the other replicas' are there too, they go to `take`.
        """
        if factor != 1.0 and not self.sharded:
            self.gradients.flat.mul_(factor)
        elif factor != 1.0 and self.pieces:
            torch._foreach_mul_([p.gradient for p in self.pieces], factor)
        for piece in self.pieces:
            if piece.master.grad is not piece.gradient:
                assert piece.master.grad is not None
                piece.master.grad.copy_(piece.gradient)
        for group in self._torch.param_groups:
            group["lr"] = lr
        self._torch.step()
        if self._apart:
            for piece in self.pieces:
                piece.weight.copy_(piece.master.detach())
        if not self.sharded:
            return None
        weights = self.gradients.flat.view(self._dtype)[: self.gradients.flat.numel()]
        for piece in self.pieces:
            offset = self.gradients.offsets[piece.index]
            weights[offset + piece.start : offset + piece.stop] = piece.weight
        return weights

    def take(self, weights: Tensor) -> None:
        """Give the stage its weights, from all shards."""
        for tensor, offset in zip(self.tensors, self.gradients.offsets, strict=True):
            flat = tensor.parameter.detach().view(-1)
            flat.copy_(weights[offset : offset + flat.numel()])

    def not_finite(self) -> str | None:
        """A tensor of the stage that holds an infinity or a NaN, by its name on disk."""
        return next((t.hf_name for t in self.tensors if not t.parameter.detach().isfinite().all()), None)

    @torch.no_grad()
    def set_weight(self, index: int, weight: Tensor) -> None:
        """Make `weight`, of the shape of `tensors[index]`, the one that is trained, and give it to the stage."""
        self.tensors[index].parameter.copy_(weight)
        for piece in self._of(index) if self._apart else ():
            piece.master.copy_(weight.reshape(-1)[piece.start : piece.stop])

    def adopt(self) -> None:
        """Train the weights that the stage has."""
        for index, tensor in enumerate(self.tensors):
            self.set_weight(index, tensor.parameter.detach())

    def state(self, index: int) -> dict[str, Tensor]:
        """What a checkpoint must hold of `tensors[index]` besides its weight.

        With shards, in host memory, and 0 where the other replicas have it.
        """
        shapes = self.state_shapes(index)
        if not self.sharded:
            (piece,) = self._of(index)
            return {name: value.view(shapes[name]) for name, value in self._own(piece).items()}
        full = {name: torch.zeros(shape) for name, shape in shapes.items()}
        for piece in self._of(index):
            for name, value in self._own(piece).items():
                full[name].view(-1)[piece.start : piece.stop] = value
        return full

    def state_shapes(self, index: int) -> dict[str, torch.Size]:
        """Name → shape of what `state` gives."""
        shape = self.tensors[index].parameter.shape
        names = {name: shape for name in self._moments}
        if self._moments == _EIGHT_BIT and shape.numel() >= _SMALLEST_8BIT:
            blocks = torch.Size([-(-shape.numel() // _BLOCK)])
            names |= {"absmax1": blocks, "absmax2": blocks}
        return names | ({"master": shape} if self._mixed else {})

    @torch.no_grad()
    def load_state(self, index: int, state: dict[str, Tensor], updates: int) -> None:
        """Take back what `state` gave after `updates` updates; the stage's own weights are there already.

        A `master` may be there or not: a run may go on in another precision.
        """
        if "master" in state:
            self.set_weight(index, state["master"])
        for piece in self._of(index):
            moments = self._torch.state[piece.master]
            for name in moments.keys() & state.keys():
                flat = state[name].reshape(-1)
                moments[name].copy_(flat[piece.start : piece.stop] if self.sharded else flat)
            moments["step"] = torch.full_like(step, updates) if isinstance(step := moments["step"], Tensor) else updates

    def held_bytes(self) -> tuple[int, int]:
        """Bytes of moments, and of fp32 weights beside the stage's own, that this process holds."""
        moments = [v for p in self.pieces for name, v in self._own(p).items() if name != "master"]
        masters = [p.master for p in self.pieces if self._apart]
        return sum(x.nbytes for x in moments), sum(x.nbytes for x in masters)

    def _pieces(self, index: int, owned: list[tuple[int, int]]) -> list[Piece]:
        """The parts of one tensor that lie in the `owned` ranges of the flat gradients."""
        offset, size = self.gradients.offsets[index], prod(self.tensors[index].parameter.shape)
        weights = self.tensors[index].parameter.detach().view(-1)
        made = []
        for first, last in owned:
            start, stop = max(first - offset, 0), min(last - offset, size)
            if start >= stop:
                continue
            weight, gradient = weights[start:stop], self.gradients.flat[offset + start : offset + stop]
            if self._apart:
                device = torch.device("cpu") if self._offload else weight.device
                master = nn.Parameter(torch.empty(weight.shape, dtype=torch.float32, device=device))
            else:
                master = nn.Parameter(weight)
            master.grad = torch.empty_like(master) if self._offload else gradient
            made.append(Piece(index, start, stop, weight, gradient, master))
        return made

    def _of(self, index: int) -> list[Piece]:
        return [piece for piece in self.pieces if piece.index == index]

    def _own(self, piece: Piece) -> dict[str, Tensor]:
        moments = self._torch.state[piece.master]
        own = {name: moments[name] for name in (*self._moments, "absmax1", "absmax2") if name in moments}
        return {**own, "master": piece.master.detach()} if self._mixed else own


_ADAM = ("exp_avg", "exp_avg_sq")
_EIGHT_BIT = ("state1", "state2")
_SMALLEST_8BIT = 4096  # elements: bitsandbytes keeps the moments of smaller tensors in fp32
_BLOCK = 256  # elements that share a scale


def _make(groups: list[dict[str, Any]], config: Config) -> tuple[torch.optim.Optimizer, tuple[str, ...]]:
    """The optimizer with its state in place, so that a checkpoint before the first update is like any other; and the
    names of its moments."""
    common = {"lr": config.lr, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps}
    if config.optimizer == "8bit-adam":
        eight = _bitsandbytes().optim.AdamW8bit(groups, **common, min_8bit_size=_SMALLEST_8BIT)
        for g, group in enumerate(eight.param_groups):
            for p, parameter in enumerate(group["params"]):
                eight.init_state(group, parameter, g, p)
        return eight, _EIGHT_BIT
    kind = {"adamw": torch.optim.AdamW, "adam-l2": torch.optim.Adam}[config.optimizer_kind]
    made = kind(groups, **common, fused=True)
    for group in made.param_groups:
        for parameter in group["params"]:
            made.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                **{name: torch.zeros_like(parameter) for name in _ADAM},
            }
    return made, _ADAM


def _bitsandbytes() -> Any:  # noqa: ANN401 - a module, imported only where it is used
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("--optimizer 8bit-adam needs the package: pip install bitsandbytes")
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of kernels for 4-bit matrices, which nothing here has
    import bitsandbytes

    logger.setLevel(level)
    return bitsandbytes
