"""farspan over a link with rate and delay."""

from __future__ import annotations

from pathlib import Path

import pytest
from lab import lab, why_not
from launch import Run, read_metrics
from tiny import make_model, make_task


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_a_slow_link_changes_no_loss(tmp_path: Path) -> None:
    flags = {
        "model_name": make_model(tmp_path / "model"),
        "task_name": make_task(tmp_path / "a.jsonl"),
        "seq_length": 16,
        "batch_size": 4,
        "micro_batch_size": 2,
        "total_steps": 3,
        "lr": 3e-3,
    }
    with Run(2, 1, {**flags, "checkpoint_path": tmp_path / "near"}) as run:
        run.succeed()
    with (
        lab({"hosts": 2, "rate_mbit": 50, "delay_ms": 20}) as hosts,
        Run(2, 1, {**flags, "checkpoint_path": tmp_path / "far"}, hosts=hosts) as run,
    ):
        run.succeed()
    assert "interface wan0" in run.err(1)
    near, far = (read_metrics(tmp_path / name) for name in ("near", "far"))
    assert [row["loss"] for row in near] == [row["loss"] for row in far]
    assert len(far) == 3
