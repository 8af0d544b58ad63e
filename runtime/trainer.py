"""The training loop: the same on every rank."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..comm.errors import Mismatch
from ..comm.group import Group
from ..comm.lane import Lane, Recorder
from ..comm.topology import Coord, Topology
from ..pipeline.executor import Executor
from ..pipeline.replicas import Replicas
from .checkpoint import Progress
from .config import Config
from .feed import Feed
from .metrics import Metrics
from .optim import Optimizer, clip_factor, linear_schedule


class Diverged(RuntimeError):
    """The loss or the gradient is no longer a finite number."""


@dataclass(frozen=True)
class Verdict:
    """What all ranks found out together about one update."""

    norm: float
    loss_sum: float
    stop: bool


class Vote:
    """One all-reduce an update: all ranks learn the global gradient norm, the loss, and whether someone must stop."""

    def __init__(self, world: Group | None, lane: Lane, timeout_s: float) -> None:
        self._world, self._lane, self._timeout_s = world, lane, timeout_s

    def cast(self, step: int, square_sum: float, loss_sum: float, stop: bool) -> Verdict:
        """Raises `Mismatch` if the ranks are not at the same step."""
        votes = torch.tensor([square_sum, loss_sum, float(stop), float(step), 1.0], dtype=torch.float64)
        if self._world is not None:
            world = self._world
            self._lane.submit(
                lambda: world.all_reduce(votes, timeout_s=self._timeout_s, operation=f"voting on step {step}"),
                label="vote",
            ).get()
        squares, loss, stops, steps, ranks = votes.tolist()
        if steps != step * ranks:
            raise Mismatch(f"ranks are at different steps: this one at {step}, the mean is {steps / ranks}")
        return Verdict(math.sqrt(squares), loss, stops > 0)


@dataclass
class Trainer:
    """Runs updates until the last, or until some rank is told to stop.

    `borrowed` is the gradient that another stage counts; `save` writes a checkpoint; `metrics` is rank 0's alone.
    """

    config: Config
    topology: Topology
    place: Coord
    executor: Executor
    optimizer: Optimizer
    replicas: Replicas
    vote: Vote
    lane: Lane
    feed: Feed
    save: Callable[[Progress], None]
    stopping: Callable[[], bool]
    metrics: Metrics | None = None
    borrowed: Tensor | None = None
    record: Recorder | None = None

    def run(self, progress: Progress) -> tuple[Progress, bool]:
        """Train from `progress` on. Returns where the run stands at its end, and whether it was stopped before its last
        update. A checkpoint of that point has been written."""
        c = self.config
        per_update = c.gradient_accumulate_step * self.topology.replicas * c.batch_size * c.seq_length
        for update in range(progress.updates, c.updates):
            start = time.perf_counter()
            batches, cursor = self.feed.next_update()
            self.optimizer.gradients.zero()
            loss_sum = 0.0
            for number, batch in enumerate(batches, update * c.gradient_accumulate_step):
                seed = (c.seed * 1_000_003 + number) * self.topology.replicas + self.place.replica
                loss_sum += float(self.executor.step(batch, seed))
            self.lane.submit(self.replicas.reduce, label="reduce").get()
            verdict = self.vote.cast(update, self._own_squares(), loss_sum, self.stopping())
            if not math.isfinite(verdict.norm) or not math.isfinite(verdict.loss_sum):
                raise Diverged(
                    f"update {update + 1}: the gradient norm is {verdict.norm} and the summed loss {verdict.loss_sum}; "
                    "the weights are as after the update before. Try a lower --lr or a longer --warmup-steps, "
                    "and go on from the latest checkpoint"
                )
            lr = c.lr * linear_schedule(update, c.updates, c.warmup_steps)
            updating = time.perf_counter()
            self.optimizer.step(lr, clip_factor(verdict.norm, c.max_grad_norm))
            end = time.perf_counter()
            if self.record is not None:
                self.record("optimizer", "update", updating, end)
            progress = Progress(
                step=progress.step + c.gradient_accumulate_step,
                updates=update + 1,
                tokens=progress.tokens + per_update,
                data=cursor,
            )
            if self.metrics is not None:
                row = _row(progress, verdict, batches[0].valid, lr, per_update, end - start)
                self.metrics.write({**row, "tasks": self.feed.shares})
            finished = update + 1 == c.updates
            if finished or verdict.stop or self._due(progress.step):
                self.save(progress)
            if verdict.stop and not finished:
                return progress, True
        return progress, False

    def _own_squares(self) -> float:
        """This rank's part of the global norm: every parameter of the model is counted by exactly one rank."""
        if self.place.replica != 0:
            return 0.0
        return self.optimizer.gradients.square_sum(skip=self.borrowed)

    def _due(self, step: int) -> bool:
        """Whether a multiple of --checkpoint-steps was reached within the last update."""
        every = self.config.checkpoint_steps
        return every > 0 and step // every > (step - self.config.gradient_accumulate_step) // every


def _row(progress: Progress, verdict: Verdict, valid: int, lr: float, tokens: int, seconds: float) -> dict[str, Any]:
    return {
        "step": progress.step,
        "loss": verdict.loss_sum / valid,
        "lr": lr,
        "grad_norm": verdict.norm,
        "tokens": progress.tokens,
        "tokens_per_s": tokens / seconds,
        "step_s": seconds,
    }
