"""The grids on which every run must train alike, and a plain transformers loop to compare them with."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tiny import make_model, make_task
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

ROWS, UPDATES = 8, 4
#      stages replicas micro-batches  layers of each stage
GRIDS = [
    (1, 1, 1, None),
    (2, 1, 4, None),
    (3, 1, 4, "1,3,1"),
    (2, 2, 2, None),
    (1, 2, 2, None),
    (4, 1, 8, None),
]


class World:
    """Models and tasks in one folder, made when they are first wanted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.task_name = f"{make_task(folder / 'a.jsonl')}:0.3,{make_task(folder / 'b.jsonl', seed=1)}:0.7"

    def model(self, family: str, **changes: object) -> Path:
        folder = self.folder / "-".join([family, *(f"{k}{v}" for k, v in changes.items())])
        return folder if folder.exists() else make_model(folder, family, **changes)


def train_plainly(
    model: PreTrainedModel, batches: Iterable[dict[str, Any]], lr: float, updates: int, warmup: int = 0
) -> tuple[list[float], list[float]]:
    """torch's AdamW and clipping, transformers' schedule, one backward for each of `batches`, which are what `model` is
    called with. Returns the losses and the gradient norms."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},  # norms and biases
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, eps=1e-6)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, updates)
    losses, norms = [], []
    for batch in batches:
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses, norms
