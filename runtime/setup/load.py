"""What a run opens before it connects: data, weights, and the place where it goes on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...modules.checksums import checksum
from ...pipeline.stage import Stage
from ..checkpoints.checkpoint import Checkpoints, Progress
from ..data.mixture import TaskMixture
from ..data.open_tasks import open_tasks
from ..optim.optimizer import Optimizer
from ..training.evaluation import HeldOut, open_held_out
from ..training.milestones import compared_on
from .prepare import fill, same_weights, settle
from .set_up import Setup


@dataclass(frozen=True)
class Loaded:
    """`mixture` and `held_out` are rank 0's alone; `held_out_size`, that of its evaluation set, all ranks know."""

    mixture: TaskMixture | None
    held_out: HeldOut | None
    held_out_size: tuple[int, int] | None
    stage: Stage
    optimizer: Optimizer
    checkpoints: Checkpoints
    progress: Progress


def load(setup: Setup) -> tuple[Setup, Loaded]:
    """`setup` comes back with --nepochs turned into steps. All ranks call it together.

    Raises `DataError`, `CheckpointError`, `ShardError`, `ConfigError` or `Mismatch`."""
    config, meeting, vocabulary = setup.config, setup.meeting, setup.vocabulary
    # Before the weights: mistakes in the data are the most frequent ones, and a large model takes minutes to load.
    mixture = open_tasks(config, vocabulary) if vocabulary is not None else None
    held_out = open_held_out(config, setup.topology, vocabulary) if vocabulary is not None else None
    stage = Stage(setup.spec, setup.units, dtype=setup.dtype, device=setup.device, recompute=config.recompute)
    optimizer = Optimizer(stage, config, setup.place.replica)
    checkpoints = Checkpoints(config.checkpoints, meeting, setup.topology, config.wire_timeout, config.keep_checkpoints)
    progress = fill(config, setup.spec, setup.store, stage, optimizer, checkpoints)
    if mixture is not None and progress.data is not None:
        mixture.load_state(progress.data)
    config, progress = settle(config, progress, mixture, meeting)
    # Connecting waits in a call that no news can interrupt: first let everyone get as far as this.
    facts = (held_out.size, held_out.digest) if held_out is not None else None
    sums = {tensor.hf_name: checksum(tensor.parameter) for tensor in optimizer.tensors}
    ranks = meeting.exchange("loaded", {"held out": facts, "weights": sums}, config.wire_timeout)
    same_weights([rank["weights"] for rank in ranks])
    size = None
    if (facts := ranks[0]["held out"]) is not None:
        size, digest = facts
        progress = compared_on(progress, digest)
    loaded = Loaded(mixture, held_out, size, stage, optimizer, checkpoints, progress)
    return replace(setup, config=config), loaded
