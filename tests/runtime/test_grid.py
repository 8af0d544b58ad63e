"""A grid of any shape trains exactly as one process would: a plain transformers loop on the same global batches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from farspan.runtime.data.open_tasks import open_tasks
from farspan.runtime.data.tokenizer import Vocabulary
from farspan.runtime.flags.config import Config
from grids import GRIDS, ROWS, UPDATES, World, train_plainly
from launch import Run, read_metrics
from torch import Tensor
from transformers import AutoModelForCausalLM

LENGTH, WARMUP, LR, SEED = 16, 1, 3e-3, 7


@dataclass
class Reference:
    """What a plain loop saw: loss and gradient norm of each update, weights at the end."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("grid"))


@cache
def plain_loop(folder: Path, task_name: str, accumulate: int) -> Reference:
    """Hugging Face's model, with one backward for the whole batch."""
    told = Config(
        model_name=str(folder), task_name=task_name, seq_length=LENGTH, seed=SEED, data_cache=str(folder / "cache")
    )
    mixture = open_tasks(told, Vocabulary(told))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    drawn = (torch.from_numpy(mixture.draw(accumulate * ROWS).tokens) for _ in range(UPDATES))
    # No padding: the mean is over all rows' T − 1 targets.
    batches = ({"input_ids": ids, "labels": ids} for ids in drawn)
    losses, norms = train_plainly(model, batches, LR, UPDATES, WARMUP)
    return Reference(losses, norms, {name: p.detach() for name, p in model.named_parameters()})


def check_equal(checkpoints: Path, reference: Reference, rtol: float = 1e-5) -> None:
    rows = read_metrics(checkpoints)
    torch.testing.assert_close([row["loss"] for row in rows], reference.losses, rtol=rtol, atol=0)
    torch.testing.assert_close([row["grad_norm"] for row in rows], reference.norms, rtol=rtol, atol=0)
    trained = AutoModelForCausalLM.from_pretrained(checkpoints / f"checkpoint_{rows[-1]['step']}")
    for name, parameter in trained.named_parameters():
        want = reference.weights[name]
        assert (parameter - want).norm() <= rtol * want.norm(), name


def flags(world: World, model: Path, checkpoints: Path, replicas: int, micro_batches: int, accumulate: int) -> dict:
    rows = ROWS // replicas
    return {
        "model_name": model,
        "task_name": world.task_name,
        "checkpoint_path": checkpoints,
        "seq_length": LENGTH,
        "batch_size": rows,
        "micro_batch_size": rows // micro_batches,
        "gradient_accumulate_step": accumulate,
        "total_steps": UPDATES * accumulate,
        "warmup_steps": WARMUP,
        "lr": LR,
        "seed": SEED,
    }


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("mode", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "replicas", "micro_batches", "split"), GRIDS)
def test_every_grid_equals_one_process(
    world: World, tmp_path: Path, stages: int, replicas: int, micro_batches: int, split: str, mode: str, accumulate: int
) -> None:
    model = world.model("gptneox")
    run_flags = flags(world, model, tmp_path, replicas, micro_batches, accumulate)
    with Run(stages, replicas, {**run_flags, "pp_mode": mode, "layer_split": split}) as run:
        run.succeed()
    check_equal(tmp_path, plain_loop(model, world.task_name, accumulate))


@pytest.mark.parametrize("family", ["gptj", "llama"])
def test_the_other_families_on_a_grid(world: World, tmp_path: Path, family: str) -> None:
    model = world.model(family)
    with Run(2, 2, {**flags(world, model, tmp_path, 2, 2, 1), "pp_mode": "1f1b", "pp_ahead": 2}) as run:
        run.succeed()
    check_equal(tmp_path, plain_loop(model, world.task_name, 1))


@pytest.mark.parametrize("family", ["llama", "gptneox"])
@pytest.mark.parametrize(("stages", "replicas", "micro_batches"), [(1, 1, 2), (3, 1, 4), (2, 2, 2)])
def test_tied_embeddings_over_stages(
    world: World, tmp_path: Path, stages: int, replicas: int, micro_batches: int, family: str
) -> None:
    """Saving compares the two copies bit for bit and fails if they differ; here they must also be the right ones."""
    model = world.model(family, tie_word_embeddings=True)
    with Run(stages, replicas, flags(world, model, tmp_path, replicas, micro_batches, 1)) as run:
        run.succeed()
    check_equal(tmp_path, plain_loop(model, world.task_name, 1))
