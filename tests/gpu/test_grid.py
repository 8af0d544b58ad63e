"""On a GPU, every grid trains what one process trains on CPU, whichever libraries carry what. All ranks share one GPU:
NCCL then goes through sockets, and its speed says nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gpu
import grids
import pytest
from grids import GRIDS, ROWS, UPDATES
from launch import Run

pytestmark = gpu.with_nccl


class World(grids.World):
    """And what one process on CPU makes of them."""

    def flags(self, model: Path, checkpoints: Path, replicas: int, micro_batches: int, accumulate: int) -> dict:
        return {
            "model_name": model,
            "task_name": self.task_name,
            "checkpoint_path": checkpoints,
            "seq_length": 16,
            "batch_size": ROWS // replicas,
            "micro_batch_size": ROWS // replicas // micro_batches,
            "gradient_accumulate_step": accumulate,
            "total_steps": UPDATES * accumulate,
            "warmup_steps": 1,
            "lr": 3e-3,
            "seed": 7,
            "wire_timeout": 60,
            "join_timeout": 60,
        }

    def reference(self, model: Path, accumulate: int) -> Path:
        folder = self.folder / f"{model.name}-reference-{accumulate}"
        if not (folder / "latest").exists():
            with Run(1, 1, self.flags(model, folder, 1, 1, accumulate)) as run:
                run.succeed()
        return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("grid"))


def check(
    world: World,
    folder: Path,
    model: Path,
    grid: tuple[int, int, int],
    accumulate: int = 1,
    **more: Any,  # noqa: ANN401
) -> None:
    stages, replicas, micro_batches = grid
    flags = world.flags(model, folder, replicas, micro_batches, accumulate)
    with gpu.gpu_run(stages, replicas, {**flags, **more}) as run:
        run.succeed(60)
    gpu.assert_same(folder, world.reference(model, accumulate), 1e-4)


@pytest.mark.parametrize(("dist", "dp"), [("nccl", "nccl"), ("nccl", "gloo"), ("gloo", "nccl"), ("gloo", "gloo")])
def test_libraries(world: World, tmp_path: Path, dist: str, dp: str) -> None:
    check(world, tmp_path, world.model("gptneox"), (2, 2, 2), pp_mode="1f1b", dist_backend=dist, dp_backend=dp)


@pytest.mark.parametrize(("mode", "accumulate"), [("gpipe", 1), ("1f1b", 2)])
@pytest.mark.parametrize(("stages", "replicas", "micro_batches", "split"), GRIDS)
def test_every_grid_equals_one_process(
    world: World, tmp_path: Path, stages: int, replicas: int, micro_batches: int, split: str, mode: str, accumulate: int
) -> None:
    grid, model = (stages, replicas, micro_batches), world.model("gptneox")
    both = {"dist_backend": "nccl", "dp_backend": "nccl"}
    check(world, tmp_path, model, grid, accumulate, pp_mode=mode, layer_split=split, **both)


@pytest.mark.parametrize("family", ["gptj", "llama"])
def test_the_other_families(world: World, tmp_path: Path, family: str) -> None:
    model = world.model(family)
    check(world, tmp_path, model, (2, 1, 4), pp_mode="1f1b", pp_ahead=2, dist_backend="nccl")


@pytest.mark.parametrize(("dist", "dp"), [("nccl", "nccl"), ("gloo", "gloo")])
def test_tied_embeddings_and_shards(world: World, tmp_path: Path, dist: str, dp: str) -> None:
    """Saving compares the two copies bit for bit, and fails if they differ."""
    model = world.model("llama", tie_word_embeddings=True)
    check(world, tmp_path, model, (2, 2, 2), dp_mode="zero1", bucket_mb=0.02, dist_backend=dist, dp_backend=dp)
