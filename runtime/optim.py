"""The optimizer of one stage: fp32 weights and moments, whatever the stage computes in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..modules.layers import decayed_names
from ..pipeline.gradients import Gradients
from ..pipeline.stage import Stage
from .config import Config

MOMENTS = ("exp_avg", "exp_avg_sq")


def clip_factor(norm: float, longest: float) -> float:
    """What to multiply gradients with so that their global norm is at most `longest` (0: no limit)."""
    return min(1.0, longest / (norm + 1e-6)) if longest > 0 else 1.0


class Optimizer:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) or Adam over `stage`, fed by `gradients`.

    Where the stage computes in bf16, an fp32 copy of each weight is what is trained; the stage gets it rounded.
    """

    def __init__(self, stage: Stage, config: Config) -> None:
        self.tensors = list(stage.tensors())
        parameters = [t.parameter for t in self.tensors]
        self.gradients = Gradients(parameters)
        self.masters = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in parameters]
        self._mixed = stage.dtype != torch.float32
        decayed = {
            (unit, name) for unit, layer in zip(stage.units, stage.layers, strict=True) for name in decayed_names(layer)
        }
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for tensor, master, view in zip(self.tensors, self.masters, self.gradients.views, strict=True):
            master.grad = view
            groups[(tensor.unit, tensor.name) in decayed].append(master)
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.optimizer]
        self._torch = kind(
            [
                {"params": members, "weight_decay": config.weight_decay if decay else 0.0}
                for decay, members in groups.items()
                if members
            ],
            lr=config.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            fused=True,
        )
        for master in self.masters:  # from the start, so that a checkpoint before the first update is like any other
            self._torch.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                **{name: torch.zeros_like(master) for name in MOMENTS},
            }

    @property
    def tied_gradient(self) -> Tensor | None:
        """The gradient of this stage's copy of a tied embedding, as embedding or as head."""
        views = zip(self.tensors, self.gradients.views, strict=True)
        return next((view for t, view in views if t.shared), None)

    def step(self, lr: float, factor: float) -> None:
        """One update with `factor` × the gradients."""
        if factor != 1.0:
            self.gradients.flat.mul_(factor)
        for group in self._torch.param_groups:
            group["lr"] = lr
        self._torch.step()
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Give the stage its weights anew, after the fp32 ones have changed."""
        if self._mixed:
            for tensor, master in zip(self.tensors, self.masters, strict=True):
                tensor.parameter.copy_(master)

    def state(self, index: int) -> dict[str, Tensor]:
        """What a checkpoint must hold of `tensors[index]` besides its weight."""
        master = self.masters[index]
        state = {name: self._torch.state[master][name] for name in MOMENTS}
        return {**state, "master": master.detach()} if self._mixed else state

    def load_state(self, index: int, state: dict[str, Tensor], updates: int) -> None:
        """Take back what `state` gave after `updates` updates; the stage's own weights are there already."""
        master = self.masters[index]
        if "master" in state:
            with torch.no_grad():
                master.copy_(state["master"])
        self._torch.state[master] = {
            "step": torch.tensor(float(updates), dtype=torch.float32, device=master.device),
            **{name: state[name].to(master.device, torch.float32, copy=True) for name in MOMENTS},
        }
