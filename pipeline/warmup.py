"""One micro-batch through a stage before any transfer is under way.

CUDA loads a kernel when it is first used, and may wait for everything on the device before it does. One of NCCL's
transfers that is there already may in turn wait for what this stage has yet to compute.
"""

from __future__ import annotations

import torch

from .gradients import Gradients
from .stage import Stage


def warm_up(stage: Stage, gradients: Gradients, micro_rows: int, length: int) -> None:
    """Forward and backward over zeros, [micro_rows, length] tokens; nothing of it remains."""
    tokens = torch.zeros(micro_rows, length, dtype=torch.int64, device=stage.device)
    x = tokens
    if not stage.is_first:
        shape = (micro_rows, length, stage.spec.width)
        x = torch.zeros(shape, dtype=stage.dtype, device=stage.device, requires_grad=True)
    stage.train()
    y = stage(x, labels=tokens if stage.is_last else None)
    torch.autograd.backward(y, None if stage.is_last else torch.zeros_like(y))
    gradients.zero()
