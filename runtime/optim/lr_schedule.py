"""How the learning rate moves over a run, counted in updates."""

from __future__ import annotations

import math


def lr_share(kind: str, update: int, updates: int, warmup: int, floor: float = 0.0) -> float:
    """The share of the peak learning rate at `update` (from 0): up over `warmup` updates, then what `kind` says.

    `linear` and `cosine` fall to `floor` (a share of the peak) at `updates`, `constant` stays. They are transformers'
    `get_polynomial_decay_schedule_with_warmup` of power 1 (without a floor `get_linear_schedule_with_warmup`),
    `get_cosine_with_min_lr_schedule_with_warmup` (Loshchilov & Hutter, arXiv:1608.03983, without restarts) and
    `get_constant_schedule_with_warmup`.
    """
    if update < warmup:
        return update / warmup
    if kind == "constant":
        return 1.0
    left = (updates - update) / max(1, updates - warmup)
    if kind == "cosine":
        left = 0.5 * (1.0 + math.cos(math.pi * (1.0 - left)))
    return floor + (1.0 - floor) * left
