"""Keeping less of a block for its backward: what was not kept is computed again when it is needed.

    none        autograd keeps everything
    block       only a block's input is kept, for one more forward (Chen et al. 2016, arXiv:1604.06174)
    selective   results of matrix products and attention are kept; norms, activations, rotary positions and dropout,
                a small part of the work, are computed again (after Korthikanti et al. 2022, arXiv:2205.05198)

The gradients are those of `none`, bit for bit. Each rank may choose for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

RECOMPUTE = ("none", "block", "selective")

_aten = torch.ops.aten
_PRODUCTS = [_aten.mm.default, _aten.addmm.default]
_ATTENTION = [
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
]


class Recompute:
    """Runs blocks so that autograd keeps what `mode` says. `attn_dropout`: the kernels of attention draw masks."""

    def __init__(self, mode: str, *, attn_dropout: bool) -> None:
        if mode not in RECOMPUTE:
            raise ValueError(f"recompute {mode!r} is none of {', '.join(RECOMPUTE)}")
        self.mode = mode
        # A kernel that is not run again does not move the generator either, and all later masks would be others.
        self._kept = _PRODUCTS if attn_dropout else _PRODUCTS + _ATTENTION

    def __call__(self, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`block(x)`, which must seed the generator itself where it draws from it."""
        if self.mode == "none" or not torch.is_grad_enabled():
            return block(x)
        more: dict[str, Any] = {}
        if self.mode == "selective":
            more["context_fn"] = partial(create_selective_checkpoint_contexts, self._kept)
        y: Tensor = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, **more)
        return y
