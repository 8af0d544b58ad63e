"""What the tests of a run share: one small model, one task, and the flags of a short run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import make_model, make_task

Flags = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny", "gptneox")


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tasks")
    return f"{make_task(folder / 'a.jsonl')}:0.3,{make_task(folder / 'b.jsonl', seed=1)}:0.7"


@pytest.fixture
def flags(model: Path, tasks: str, tmp_path: Path) -> Flags:
    """`flags(lr=…)`: a run of 6 steps in tmp_path/ck, with changes; None leaves a flag out."""

    def make(**changes: Any) -> dict[str, Any]:  # noqa: ANN401 - whatever a flag takes
        return {
            "model_name": model,
            "task_name": tasks,
            "checkpoint_path": tmp_path / "ck",
            "seq_length": 16,
            "batch_size": 4,
            "micro_batch_size": 2,
            "total_steps": 6,
            "lr": 3e-3,
            "keep_checkpoints": -1,
            **changes,
        }

    return make
