"""One micro-batch through a stage before any transfer is under way.

CUDA loads a kernel when it is first used, and may wait for everything on the device before it does. One of NCCL's
transfers that is there already may in turn wait for what this stage has yet to compute.
"""

from __future__ import annotations

import torch

from .estimate import alone_row, still_edges
from .executor import Batch, Executor
from .gradients import Gradients
from .schedule import Op
from .stage import Stage


def warm_up(stage: Stage, gradients: Gradients, micro_rows: int, length: int, *, documents: bool) -> None:
    """A step over zeros, [micro_rows, length] tokens, as the executor walks it in training and in evaluation; nothing
    of it remains. `documents`: those of a row do not see one another (--document-mask)."""
    tokens = torch.zeros(micro_rows, length, dtype=torch.int64)
    batch = Batch(tokens, tokens, tokens.numel(), tokens if documents else None)
    training = alone_row(stage, 1)
    evaluating = tuple(action for action in training if action.op in (Op.RECV_F, Op.FORWARD, Op.SEND_F))
    with torch.random.fork_rng([stage.device] if stage.device.type == "cuda" else []):  # dropout seeds
        for row in (training, evaluating):
            Executor(stage, row, still_edges(stage), micro_rows, length).step(batch)
    gradients.zero()
