"""What a stage computes in, and the loss scale that keeps fp16 gradients within fp16's range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..flags.config import Config

_IN_VAIN = 20
"""Overflows in a row at the lowest scale after which no further one is skipped."""


def compute_dtype(config: Config) -> torch.dtype:
    """What weights, activations and gradients of a stage are in; masters, moments and gradient sums are fp32."""
    return torch.float16 if config.fp16 else torch.bfloat16 if config.bf16 else torch.float32


@dataclass
class LossScaler:
    """The loss is multiplied with `scale` before the backward pass, so that small fp16 gradients do not become 0.

    After `window` updates without an overflow the scale doubles. An overflow skips its update and starts the window
    anew; the `hysteresis`-th one since the last doubling, and each further one, halves the scale, down to `lowest`. A
    static scale never changes. (Micikevicius et al., arXiv:1710.03740; the counting is Megatron's.)

    Every rank feeds its own copy with the same verdicts, so all copies are the same.
    """

    scale: float
    lowest: float
    window: int
    hysteresis: int
    dynamic: bool
    clean: int = 0
    left: int = 0
    in_vain: int = 0

    def __post_init__(self) -> None:
        self.left = self.left or self.hysteresis

    @classmethod
    def of(cls, config: Config, state: dict[str, Any] | None = None) -> LossScaler | None:
        """What the flags ask for, with the `state` of a checkpoint; None where nothing is scaled."""
        if not config.fp16:
            return None
        dynamic = config.loss_scale == 0
        made = cls(
            config.initial_loss_scale if dynamic else config.loss_scale,
            config.min_loss_scale,
            config.loss_scale_window,
            config.hysteresis,
            dynamic,
        )
        if state is not None and dynamic:
            made.scale, made.clean = float(state["scale"]), int(state["clean"])
            made.left, made.in_vain = min(int(state["left"]), made.hysteresis), int(state["in_vain"])
        return made

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {"scale": self.scale, "clean": self.clean, "left": self.left, "in_vain": self.in_vain}

    def update(self, finite: bool) -> None:
        """Take note of one update: `finite` says whether no rank saw an overflow."""
        if finite:
            self.in_vain = 0
            self.clean += 1
            if self.clean >= self.window and self.dynamic:
                self.clean, self.left = 0, self.hysteresis
                self.scale *= 2.0
            return
        self.clean, self.left = 0, max(self.left - 1, 0)
        if not self.dynamic or (self.left == 0 and self.scale <= self.lowest):
            self.in_vain += 1
        elif self.left == 0:
            self.scale = max(self.scale / 2.0, self.lowest)

    @property
    def hopeless(self) -> bool:
        """Whether overflows go on though the scale can fall no further: the fault is not the scale's."""
        return self.in_vain >= _IN_VAIN
