"""One rank's run: from good flags to a checkpoint, and from any failure to one line and a non-zero exit."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType

import psutil
import torch

from ..comm.errors import WireError
from ..comm.interfaces import interface, interface_towards
from ..comm.rendezvous import Rendezvous, parse_url
from ..comm.topology import Topology
from ..modules.shards import ShardError, ShardStore
from ..modules.spec import ModelSpec, SpecError
from ..pipeline.executor import Executor
from ..pipeline.partition import PartitionError, stage_units
from ..pipeline.replicas import Replicas
from ..pipeline.schedule import lower
from ..pipeline.simulate import PlanError
from ..pipeline.stage import Stage
from ..pipeline.timeline import Timeline
from .checkpoint import CheckpointError, Checkpoints, Progress, folder_of
from .config import Config, ConfigError
from .feed import Feed
from .metrics import Metrics
from .open_tasks import open_tasks
from .optim import Optimizer
from .prepare import (
    check_model,
    describe,
    digest,
    fill,
    layer_split,
    make_plan,
    open_vocabulary,
    pick_device,
    share_threads,
    versions,
)
from .tasks import DataError
from .trainer import Diverged, Trainer, Vote
from .wiring import connect

EXPECTED = (
    WireError,
    SpecError,
    ShardError,
    PartitionError,
    PlanError,
    ConfigError,
    CheckpointError,
    DataError,
    Diverged,
)
"""Errors whose message is the whole story."""

log = logging.getLogger("farspan")


class Stopped(RuntimeError):
    """A signal came before the first step."""


class Signals:
    """SIGINT and SIGTERM: once means finish the step, save and leave; before training, leave at once."""

    def __init__(self) -> None:
        self.asked = False
        self.training = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self.training:
            raise Stopped(f"stopped by {name} before the first step")
        if self.asked and number == signal.SIGINT:
            raise Stopped("interrupted twice: leaving without a checkpoint of this step")
        if not self.asked:
            log.info("%s: finishing the step, then saving a checkpoint", name)
        self.asked = True


def run(config: Config) -> int:
    """Run one rank whose flags are good. Returns 0; a rank that fails ends its process here."""
    meeting = None
    try:
        signals = Signals()
        meeting = Rendezvous(
            config.dist_url, config.rank, config.world_size, timeout_s=config.join_timeout, on_hopeless=leave
        )
        train(config, meeting, signals)
        meeting.close()
        return 0
    except Exception as error:
        if config.debug:
            traceback.print_exc()
        if not isinstance(error, (*EXPECTED, Stopped)):
            error = RuntimeError(f"unexpected {type(error).__name__}: {error} (--debug shows the traceback)")
        leave(str(meeting.failed(error)) if meeting is not None else str(error))
        raise AssertionError("unreachable") from error


def tell(error: Exception, config: Config) -> None:
    """Tell the other ranks, which may be waiting for this one, why it will not come."""
    try:
        meeting = Rendezvous(config.dist_url, config.rank, config.world_size, timeout_s=5.0, on_hopeless=leave)
        meeting.failed(error)
    except WireError:
        log.debug("rank %d: nobody to tell", config.rank)


def leave(line: str) -> None:
    """End the process with one line. Threads that are stuck in the wire must not keep it, so nothing is torn down."""
    sys.stderr.write(f"\nfarspan: {line}\n")
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(1)


def train(config: Config, meeting: Rendezvous, signals: Signals) -> None:
    """Everything between the meeting of the ranks and their parting."""
    born = psutil.Process().create_time()
    topology = Topology(config.data_group_size, config.pipeline_group_size)
    place = topology.coord(config.rank)
    host, port = parse_url(config.dist_url)
    wire = interface(config.net_interface) if config.net_interface else interface_towards(host, port)
    store = ShardStore(Path(config.model_name))
    spec = store.spec
    check_model(config, spec)
    split = layer_split(config, spec)
    plan = make_plan(config)
    meeting.agree({**config.agreement(), **versions(), "the model's config.json": digest(spec)})
    device = pick_device(config)
    threads = share_threads(meeting)
    units = stage_units(split, place.stage)
    log.info(
        "rank %d: replica %d, stage %d of %d, %s, on %s%s, interface %s",
        config.rank, place.replica, place.stage, topology.stages, describe(units, spec), device, threads, wire.name,
    )  # fmt: skip

    vocabulary = open_vocabulary(config, spec) if config.rank == 0 else None
    # Only rank 0 has the tokenizer, and every rank must know how many tokens --special-tokens make it.
    spec = spec.grown(meeting.exchange("tokens", vocabulary.size if vocabulary else 0, config.wire_timeout)[0])
    mixture = open_tasks(config, vocabulary) if vocabulary else None
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    stage = Stage(spec, units, dtype=dtype, device=device)
    optimizer = Optimizer(stage, config)
    checkpoints = Checkpoints(config.checkpoints, meeting, topology, config.wire_timeout)
    progress = fill(config, spec, store, stage, optimizer, checkpoints)
    if mixture is not None and progress.data is not None:
        mixture.load_state(progress.data)
    if progress.step >= config.total_steps:
        if config.rank == 0:
            log.info(
                "%s is at --total-steps %d already: nothing to do",
                folder_of(config.checkpoints, progress.step), config.total_steps,
            )  # fmt: skip
        return

    timeline = Timeline() if config.profiling == "tidy_profiling" else None
    record = timeline.record if timeline is not None else None
    # Connecting waits in a call that no news can interrupt: first let everyone get as far as this.
    meeting.exchange("loaded", "", config.wire_timeout)
    wires = connect(config, topology, meeting, wire.name, spec.tied, device, record)
    tied = optimizer.tied_gradient
    metrics = Metrics(config, progress.step) if config.rank == 0 else None
    feed = Feed(config, topology, wires.ends, config.updates - progress.updates, mixture, wires.data)
    tokenizer = Path(config.tokenizer_name or config.model_name)
    if vocabulary is not None and vocabulary.added:
        tokenizer = vocabulary.save(config.checkpoints / "tokenizer")
    trainer = Trainer(
        config,
        topology,
        place,
        Executor(stage, lower(plan)[place.stage], wires.edges, config.micro_batch_size, config.seq_length, record),
        optimizer,
        Replicas(optimizer.gradients, wires.peers, wires.tie, tied, config.wire_timeout),
        Vote(wires.world, wires.collectives, config.wire_timeout),
        wires.collectives,
        feed,
        save=lambda p: _save(p, checkpoints, spec, optimizer, dtype, tokenizer, config.rank),
        stopping=lambda: signals.asked,
        metrics=metrics,
        borrowed=tied if not stage.is_first else None,
        record=record,
    )
    if config.rank == 0:
        log.info("training starts %.1f s after the process", time.time() - born)
    signals.training = True
    progress, stopped = trainer.run(progress)
    feed.close()
    if mixture is not None:
        mixture.close()
    wires.close()
    if metrics is not None:
        metrics.close()
        _summary(progress, stopped, metrics, config)
    if timeline is not None:
        path = config.checkpoints / "traces" / f"rank{config.rank}.json"
        # perf_counter's zero differs from machine to machine; the wall clock is common, as far as clocks agree.
        timeline.write_chrome_trace(path, config.rank, f"rank {config.rank}", time.time() - time.perf_counter())


def _save(
    progress: Progress,
    checkpoints: Checkpoints,
    spec: ModelSpec,
    optimizer: Optimizer,
    dtype: torch.dtype,
    tokenizer: Path,
    rank: int,
) -> None:
    folder = checkpoints.save(progress, spec, optimizer, dtype, tokenizer)
    if rank == 0:
        log.info("saved %s", folder)


def _summary(progress: Progress, stopped: bool, metrics: Metrics, config: Config) -> None:
    if metrics.first_loss is None or metrics.last_loss is None:
        return
    how = "stopped, to be resumed by the same command," if stopped else "done"
    log.info(
        "%s at step %d of %d: loss %.4f at first, %.4f at last; the model is in %s",
        how, progress.step, config.total_steps, metrics.first_loss, metrics.last_loss,
        folder_of(config.checkpoints, progress.step),
    )  # fmt: skip
