"""The learning rate of every update is what transformers' own schedules say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from farspan.runtime.optim.lr_schedule import lr_share
from launch import Run, read_metrics
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
)

PEAK, FLOOR = 2.0, 0.5

#         (kind, floor) → their schedule of (optimizer, warm-up, updates)
THEIRS: dict[tuple[str, float], Callable[..., LRScheduler]] = {
    ("linear", 0.0): get_linear_schedule_with_warmup,
    ("linear", FLOOR): lambda o, w, u: get_polynomial_decay_schedule_with_warmup(o, w, u, lr_end=FLOOR, power=1.0),
    ("cosine", 0.0): get_cosine_schedule_with_warmup,
    ("cosine", FLOOR): lambda o, w, u: get_cosine_with_min_lr_schedule_with_warmup(o, w, u, min_lr=FLOOR),
    ("constant", 0.0): lambda o, w, _: get_constant_schedule_with_warmup(o, w),
}


@pytest.mark.parametrize(("updates", "warmup"), [(10, 0), (10, 3), (1, 0), (5, 5)])
@pytest.mark.parametrize(("kind", "floor"), THEIRS)
def test_each_schedule_is_transformers_own(kind: str, floor: float, updates: int, warmup: int) -> None:
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule = THEIRS[kind, floor](sgd, warmup, updates)
    for update in range(updates):
        ours = PEAK * lr_share(kind, update, updates, warmup, floor / PEAK)
        assert ours == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        sgd.step()
        if update + 1 < updates:  # one of theirs divides by zero where no update is left after the warm-up
            schedule.step()
    end = lr_share(kind, updates, updates, warmup, floor / PEAK)
    assert end == pytest.approx({"constant": 1.0}.get(kind, floor / PEAK))


def test_a_run_follows_its_flags(flags: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """By updates: with 2 accumulation steps an update, 8 steps are 4 updates, 1 of them warm-up."""
    told = {"scheduler": "cosine", "lr": 3e-3, "min_lr": 1e-3, "warmup_steps": 1}
    with Run(1, 1, flags(**told, gradient_accumulate_step=2, total_steps=8)) as run:
        run.succeed()
    # 1 + cos of 0, 60 and 120 degrees, halved: 1, 3/4 and 1/4 of the way from 1e-3 to 3e-3.
    assert [row["lr"] for row in read_metrics(tmp_path / "ck")] == pytest.approx([0, 3e-3, 2.5e-3, 1.5e-3])
