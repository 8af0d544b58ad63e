"""--recompute, from the flag to the trained weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from launch import Run, read_metrics
from safetensors.torch import load_file
from tiny import make_model

Flags = Callable[..., dict[str, Any]]


def test_ranks_choose_for_themselves_and_train_the_same_bits(flags: Flags, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "gptneox", hidden_dropout=0.2, attention_dropout=0.2)
    results = []
    for name, by_rank in {"plain": {}, "mixed": {0: {"recompute": "block"}, 1: {"recompute": "selective"}}}.items():
        told = flags(model_name=model, checkpoint_path=tmp_path / name, pp_mode="1f1b", total_steps=3)
        with Run(2, 1, told, by_rank=by_rank) as run:
            run.succeed()
        losses = [row["loss"] for row in read_metrics(tmp_path / name)]
        folder = tmp_path / name / "checkpoint_3"
        weights = {k: v for file in sorted(folder.rglob("*.safetensors")) for k, v in load_file(file).items()}
        results.append((losses, weights))
    (losses, weights), (mixed_losses, mixed_weights) = results
    assert mixed_losses == losses
    assert mixed_weights.keys() == weights.keys()
    assert all(torch.equal(mixed_weights[name], weights[name]) for name in weights)
