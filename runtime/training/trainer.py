"""The training loop: the same on every rank."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...comm.errors import Mismatch
from ...comm.groups.group import Group
from ...comm.lanes.lane import Lane, Recorder
from ...comm.meeting.waiting import NowAndThen
from ...comm.topology import Coord, Topology
from ...modules.layers import mix_seed
from ...pipeline.executor import Executor
from ...pipeline.replicas import Replicas
from ..checkpoints.checkpoint import Progress
from ..flags.config import Config
from ..observe.metrics import Metrics
from ..observe.usage import Usage
from ..optim.lr_schedule import lr_share
from ..optim.optimizer import Optimizer, clip_factor
from ..optim.precision import LossScaler
from .feed import Feed
from .milestones import enough, evaluates, judge, perplexity, saves

TELL_S = 60.0
"""Seconds between two lines of a rank that has no progress bar."""
STOPPED = "stopped, to be resumed by the same command,"

log = logging.getLogger("farspan")


class Diverged(RuntimeError):
    """The loss or the gradient is no longer a finite number."""


@dataclass(frozen=True)
class Verdict:
    """What all ranks found out together about one update. `told`: what each rank had to tell, by rank."""

    norm: float
    loss_sum: float
    stop: bool
    told: list[list[float]]


class Vote:
    """One all-reduce an update: all ranks learn the global gradient norm, the loss, and whether someone must stop."""

    def __init__(self, world: Group | None, lane: Lane, timeout_s: float) -> None:
        self._world, self._lane, self._timeout_s = world, lane, timeout_s

    def cast(
        self,
        step: int,
        square_sum: float,
        loss_sum: float,
        stop: bool,
        scale: float = 1.0,
        tell: Sequence[float] = (),
    ) -> Verdict:
        """`tell`: further numbers of this rank, as many on each.

        Raises `Mismatch` if the ranks are not at the same step, or have not the same loss scale.
        """
        size, place = (self._world.size, self._world.members.index(self._world.rank)) if self._world else (1, 0)
        sums = torch.tensor([square_sum, loss_sum, float(stop), float(step), scale, 1.0], dtype=torch.float64)
        slots = torch.zeros(size, len(tell), dtype=torch.float64)  # each rank fills its own: the sum gathers them
        slots[place] = torch.tensor(tell, dtype=torch.float64)
        votes = torch.cat([sums, slots.flatten()])
        if self._world is not None:
            world = self._world
            self._lane.submit(
                lambda: world.all_reduce(votes, timeout_s=self._timeout_s, operation=f"voting on step {step}"),
                label="vote",
            ).get()
        squares, loss, stops, steps, scales, ranks = votes[: len(sums)].tolist()
        if steps != step * ranks:
            raise Mismatch(f"ranks are at different steps: this one at {step}, the mean is {steps / ranks}")
        if not math.isclose(scales, scale * ranks):
            raise Mismatch(f"ranks have different loss scales: this one {scale}, the mean is {scales / ranks}")
        told = votes[len(sums) :].view(size, len(tell)).tolist()
        return Verdict(math.sqrt(squares) / scale, loss, stops > 0, told)


@dataclass
class Trainer:
    """Runs updates until the last, or until some rank is told to stop.

    `borrowed` is the gradient that another stage counts; `save` writes a checkpoint; `metrics` is rank 0's alone;
    `evaluate` takes the number of updates done and gives the held-out loss; `usage` adds to the metrics how the
    machines are used; `profiled` is told that an update is done.
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
    evaluate: Callable[[int], float] | None = None
    scaler: LossScaler | None = None
    usage: Usage | None = None
    profiled: Callable[[], None] | None = None

    def run(self, progress: Progress) -> tuple[Progress, str]:
        """Train from `progress` on. Returns where the run stands at its end, and why that came before its last update,
        or "". A checkpoint of that point has been written."""
        c = self.config
        per_update = c.gradient_accumulate_step * self.topology.replicas * c.batch_size * c.seq_length
        telling, told = NowAndThen(TELL_S), (progress.step, time.perf_counter())
        for update in range(progress.updates, c.updates):
            start = time.perf_counter()
            batches, cursor = self.feed.next_update()
            self.optimizer.gradients.zero()
            scale = self.scaler.scale if self.scaler is not None else 1.0
            losses: list[Tensor] = []
            for number, batch in enumerate(batches, update * c.gradient_accumulate_step):
                seed = mix_seed(c.seed, number) * self.topology.replicas + self.place.replica
                if number + 1 == (update + 1) * c.gradient_accumulate_step:
                    self.replicas.overlap(self.lane)
                losses.append(self.executor.step(batch, seed, scale))
            self.lane.submit(self.replicas.reduce, label="reduce").get()
            loss_sum = sum(map(float, losses))  # only now may the host wait for the device
            tell = self.usage.take() if self.usage is not None else ()
            verdict = self.vote.cast(update, self._own_squares(), loss_sum, self.stopping(), scale, tell)
            finite = math.isfinite(verdict.norm) and math.isfinite(verdict.loss_sum)
            if self.scaler is not None:
                self.scaler.update(finite)
            if not finite and (self.scaler is None or self.scaler.hopeless):
                raise Diverged(
                    f"update {update + 1}: the gradient norm is {verdict.norm} and the summed loss {verdict.loss_sum}; "
                    "the weights are as after the update before. Try a lower --lr or a longer --warmup-steps, "
                    "from the latest checkpoint on if there is one"
                )
            lr = c.lr * lr_share(c.scheduler, progress.applied, c.updates, c.warmup_steps, c.lr_floor)
            updating = time.perf_counter()
            if finite:
                weights = self.optimizer.step(lr, clip_factor(verdict.norm, c.max_grad_norm) / scale)
                if weights is not None:
                    self.lane.submit(partial(self.replicas.gather, weights), label="weights").get()
                    self.optimizer.take(weights)
            end = time.perf_counter()
            if self.record is not None:
                self.record("optimizer", f"update {update + 1}", updating, end)
            progress = replace(
                progress,
                step=progress.step + c.gradient_accumulate_step,
                updates=update + 1,
                tokens=progress.tokens + per_update,
                data=cursor,
                skipped=progress.skipped + (not finite),
                scaler=self.scaler.state() if self.scaler is not None else None,
            )
            held_out: dict[str, Any] = {}
            reason = STOPPED if verdict.stop else ""
            if self.evaluate is not None and evaluates(c, progress.step):
                loss = self.evaluate(update + 1)
                held_out = {"eval_loss": loss, "eval_perplexity": perplexity(loss)}
                progress = judge(progress, loss)
                reason = reason or enough(c, progress)
            if self.metrics is not None:
                row = _row(progress, verdict, batches[0].valid, lr, per_update, end - start)
                scaling = {"loss_scale": scale, "skipped": progress.skipped} if self.scaler is not None else {}
                used = self.usage.row(verdict.told) if self.usage is not None else {}
                self.metrics.write({**row, "tasks": self.feed.shares, **used, **scaling, **held_out})
            elif telling.due():
                pace = (time.perf_counter() - told[1]) / (progress.step - told[0])
                told = progress.step, time.perf_counter()
                rank = self.topology.rank(self.place)
                log.info("rank %d: step %d of %d, %.2f s a step", rank, progress.step, c.total_steps, pace)
            # The best so far is always saved. What was evaluated and what is saved are the same weights.
            if saves(c, progress.step) or reason or progress.best_step == progress.step:
                if self.metrics is not None:
                    self.metrics.to_disk()
                self.save(progress)
            if self.profiled is not None:
                self.profiled()
            if reason and update + 1 < c.updates:
                return progress, reason
        return progress, ""

    def _own_squares(self) -> float:
        """This rank's part of the global norm: every parameter of the model is counted by exactly one rank."""
        if self.place.replica != 0 and not self.optimizer.sharded:
            return 0.0
        return self.optimizer.square_sum(skip=self.borrowed)


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
