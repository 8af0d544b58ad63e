"""One rank's run: from good flags to a checkpoint, and from any failure to one line and a non-zero exit."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from torch import Tensor

from ..comm.errors import InterfaceError, Occupied, Stopped, WireError, line_of
from ..comm.meeting.rendezvous import Rendezvous
from ..modules.shards import ShardError
from ..modules.spec import SpecError
from ..pipeline.executor import Executor
from ..pipeline.partition import PartitionError, stage_units
from ..pipeline.replicas import Replicas
from ..pipeline.schedule import Plan, lower
from ..pipeline.simulate import PlanError
from ..pipeline.timeline import Meter, Timeline
from ..pipeline.warmup import warm_up
from .checkpoints.checkpoint import Checkpoints, Complete, Progress
from .checkpoints.lineage import CheckpointError, folder_of
from .checkpoints.retention import ALL
from .data.mixture import DataError
from .data.workers import WorkerLost
from .flags.config import Config
from .flags.errors import ConfigError
from .flags.launcher import port_advice
from .observe.metrics import Metrics
from .observe.profiling import Profile
from .observe.torch_profile import TorchProfile
from .observe.usage import Usage
from .optim.precision import LossScaler
from .preflight.check import CheckFailed, check
from .setup.load import Loaded, load
from .setup.network import Network, find_network
from .setup.prepare import allow_descriptors, describe, make_evaluation_plan
from .setup.set_up import Setup, set_up
from .setup.wiring import Wires, connect
from .training.as_test import export
from .training.evaluation import Evaluation
from .training.feed import Feed
from .training.milestones import enough, perplexity
from .training.show_data import ShowData
from .training.trainer import STOPPED, Diverged, Trainer, Vote

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
    CheckFailed,
)
"""Errors whose message is the whole story."""

RESUMABLE = os.EX_TEMPFAIL
"""The exit status of a run that a signal ended before its last step: the same command goes on with it."""

log = logging.getLogger("farspan")


class Signals:
    """SIGINT and SIGTERM: once means finish the step, save and leave; before training, leave at once.

    Only the main thread can have a say in signals: where a run is in another (Ray Train has it there), the program
    around it keeps its own.
    """

    def __init__(self) -> None:
        self.asked = False
        self.training = False
        self._before: dict[signal.Signals, Any] = {}

    def take(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)

    def ignore(self) -> None:
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def restore(self) -> None:
        """Leave them as they were: a notebook goes on when the run has ended."""
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

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
    """Run one rank whose flags are good. Returns 0, or `RESUMABLE` where a signal ended the training; a rank that fails
    ends its process here: threads that are stuck in the wire must not keep it, so nothing is torn down."""
    meeting, status = None, 0
    allow_descriptors()
    signals = Signals()
    try:
        signals.take()
        try:
            network = find_network(config)
        except InterfaceError as error:
            tell(error, config)
            raise
        meeting = meet(config, config.join_timeout, network)
        if config.check:
            check(config, meeting, network)
        else:
            status = train(config, meeting, signals, network)
        meeting.close()
        signals.restore()
        return status
    except Exception as error:
        signals.ignore()  # it ends, once the others know why
        status = RESUMABLE if isinstance(error, Stopped) else 1
        if config.debug:
            traceback.print_exc()
        if isinstance(error, OSError) and error.filename:
            error = RuntimeError(f"{error.filename}: {error.strerror}")  # full, read-only, gone: that is all of it
        elif not isinstance(error, (*EXPECTED, Stopped)):
            error = RuntimeError(f"unexpected {type(error).__name__}: {error} (--debug shows the traceback)")
        try:
            if meeting is None:
                say(line_of(config.rank, error))
            else:
                if isinstance(error, WorkerLost):
                    meeting.liveness.await_news()
                meeting.failed(error, say)
                status = RESUMABLE if meeting.liveness.stopped else 1
        finally:
            os._exit(status)


def meet(config: Config, timeout_s: float, network: Network | None = None) -> Rendezvous:
    """Join the other ranks. Raises `WireError`, or `ConfigError` for a secret that cannot be read."""
    secret = b""
    if config.secret_file:
        try:
            secret = Path(config.secret_file).read_bytes().strip()
        except OSError as error:
            raise ConfigError(f"--secret-file {config.secret_file}: {error.strerror}") from error
        if not secret:
            raise ConfigError(f"--secret-file {config.secret_file} is empty")
    try:
        return Rendezvous(
            config.dist_url,
            config.rank,
            config.world_size,
            timeout_s=timeout_s,
            on_hopeless=leave,
            secret=secret,
            via=network.wire if network is not None else None,
            leave_by=network.wire if network is not None and network.named else None,
            heartbeat_s=(config.heartbeat_period, config.heartbeat_patience),
        )
    except Occupied as error:
        raise Occupied(f"{error}{port_advice(config.dist_url, os.environ)}") from error


def tell(error: Exception, config: Config) -> None:
    """Tell the other ranks, which may be waiting for this one, why it will not come."""
    try:
        meet(config, 5.0).failed(error)
    except (WireError, ConfigError):
        log.debug("rank %d: nobody to tell", config.rank)


def say(line: str) -> None:
    """The one line of a rank that fails."""
    sys.stderr.write(f"\nfarspan: {line}\n")
    sys.stderr.flush()
    sys.stdout.flush()


def leave(line: str) -> None:
    """End the process with one line, from any thread."""
    try:
        say(line)
    finally:
        os._exit(1)


def train(config: Config, meeting: Rendezvous, signals: Signals, network: Network) -> int:
    """Everything between the meeting of the ranks and their parting. Returns the exit status."""
    born = psutil.Process().create_time()
    setup, loaded = load(set_up(config, meeting, network))
    config, progress = setup.config, loaded.progress
    if line := _nothing_to_do(config, progress):
        if config.rank == 0:
            log.info("%s", line)
        return 0

    if "nccl" in (config.pp_library, config.dp_library):
        rows, length = config.micro_batch_size, config.seq_length
        warm_up(loaded.stage, loaded.optimizer.gradients, rows, length, documents=config.document_mask)
    meter = Meter(Timeline() if config.profiling == "tidy_profiling" else None)
    wires = connect(config, setup.topology, meeting, network, setup.spec.tied, setup.device, meter.record)
    trace = _trace(setup, wires, meter)
    torch_profile = None
    if config.profiling == "pytorch_profiling" and config.rank == 0:
        updates = config.updates - progress.updates
        torch_profile = TorchProfile(config.checkpoints / "traces", setup.device, updates)
    trainer = assemble(setup, loaded, wires, meter, signals, torch_profile)

    if config.rank == 0:
        if config.keep_checkpoints != ALL:
            log.info(
                "of this run's checkpoints the newest %d and the best stay, and older ones are deleted "
                "(--keep-checkpoints; -1 keeps all)",
                config.keep_checkpoints,
            )
        log.info("training starts %.1f s after the process was started", time.time() - born)
    signals.training = True
    progress, early = trainer.run(progress)
    if progress.applied == 0 and not early:
        raise Diverged(
            f"all {progress.updates} updates overflowed and were skipped: the weights are what they were. Try a lower "
            "--initial-loss-scale (or --loss-scale)"
        )

    trainer.feed.close()
    if torch_profile is not None:
        torch_profile.close()
    if trace is not None:
        trainer.executor.watch.settle()
        trace.write(config.checkpoints / "traces")
    if loaded.mixture is not None:
        loaded.mixture.close()
    wires.close()
    parts = _parts(setup, loaded.checkpoints)
    if trainer.metrics is not None:
        trainer.metrics.close()
        _summary(progress, early, trainer.metrics, config, parts)
    if config.as_test and not early:
        _end_test(progress, config, meeting, parts)
    return RESUMABLE if early == STOPPED else 0


def _nothing_to_do(config: Config, progress: Progress) -> str:
    """Why the run is over before it begins, or ""."""
    folder = folder_of(config.checkpoints, progress.step)
    if reason := enough(config, progress):
        return f"{folder}: nothing to do: {reason}"
    if progress.step >= config.total_steps:
        return f"{folder} is at or past --total-steps {config.total_steps}: nothing to do"
    return ""


def _trace(setup: Setup, wires: Wires, meter: Meter) -> Profile | None:
    """--profiling tidy_profiling: all ranks compare their clocks here."""
    if meter.timeline is None:
        return None
    config, topology = setup.config, setup.topology
    world, collectives, lanes = wires.world, wires.collectives, wires.lanes
    return Profile(meter.timeline, world, collectives, lanes, topology, config.rank, config.wire_timeout)


def assemble(
    setup: Setup, loaded: Loaded, wires: Wires, meter: Meter, signals: Signals, torch_profile: TorchProfile | None
) -> Trainer:
    """The trainer of a rank that has loaded and connected all."""
    config, topology, place, vocabulary = setup.config, setup.topology, setup.place, setup.vocabulary
    stage, optimizer, progress = loaded.stage, loaded.optimizer, loaded.progress
    tied, sharded = optimizer.tied_gradient, optimizer.sharded
    replicas = Replicas(optimizer.gradients, wires.peers, wires.tie, tied, config.wire_timeout, sharded=sharded)
    vote = Vote(wires.world, wires.collectives, config.wire_timeout)

    def executor(plan: Plan) -> Executor:
        row, rows, length = lower(plan)[place.stage], config.micro_batch_size, config.seq_length
        return Executor(stage, row, wires.edges, rows, length, meter.record)

    def complete(index: int, x: Tensor) -> None:
        wires.collectives.submit(lambda: replicas.complete(index, x)).get()

    metrics = Metrics(config, progress.step) if config.rank == 0 else None
    show = ShowData(vocabulary.decode, config.show_data) if vocabulary is not None else None
    evaluation = None
    if (size := loaded.held_out_size) is not None:
        walk = executor(make_evaluation_plan(config))
        evaluation = Evaluation(config, topology, wires.ends, wires.data, walk, vote, size, loaded.held_out)
    tokenizer, generation = Path(config.tokenizer_name or config.model_name), Path(config.model_name)
    if vocabulary is not None:
        tokenizer = vocabulary.files(config.checkpoints / "tokenizer")
        generation = vocabulary.generation(generation, tokenizer)
    return Trainer(
        config,
        topology,
        place,
        executor(setup.plan),
        optimizer,
        replicas,
        vote,
        wires.collectives,
        Feed(config, topology, wires.ends, config.updates - progress.updates, loaded.mixture, wires.data, show),
        save=partial(_save, setup, loaded, generation, tokenizer, complete if sharded else None),
        stopping=lambda: signals.asked,
        metrics=metrics,
        borrowed=tied if not stage.is_first else None,
        record=meter.record,
        evaluate=evaluation.loss if evaluation is not None else None,
        scaler=LossScaler.of(config, progress.scaler),
        usage=Usage(meter, setup.device, topology),
        profiled=torch_profile.step if torch_profile is not None else None,
    )


def _save(
    setup: Setup, loaded: Loaded, generation: Path, tokenizer: Path, complete: Complete | None, progress: Progress
) -> None:
    optimizer = loaded.optimizer
    if (bad := optimizer.not_finite()) is not None:
        raise Diverged(
            f"after update {progress.updates} the weights are no longer finite ({bad}), and are not saved: try a lower "
            "--lr, from the latest checkpoint on if there is one"
        )
    folder = loaded.checkpoints.save(progress, setup.spec, optimizer, setup.dtype, generation, tokenizer, complete)
    if setup.config.rank == 0:
        log.info("saved %s", folder)


def _parts(setup: Setup, checkpoints: Checkpoints) -> str:
    """Where ranks do not share a file system: what this site's folder holds, who has the rest, what brings it together
    ("STEP" stands for a step); else ""."""
    elsewhere = checkpoints.elsewhere()
    if not elsewhere:
        return ""
    topology = setup.topology

    def held(stage: int) -> str:
        return describe(stage_units(setup.split, stage), setup.spec)

    own = ", ".join(map(held, sorted({topology.coord(rank).stage for rank in checkpoints.site})))
    rest = "; ".join(f"rank {rank}, {place}: {held(topology.coord(rank).stage)}" for rank, place in elsewhere.items())
    folders = " ".join(f"{place}/checkpoint_STEP" for place in dict.fromkeys(elsewhere.values()))
    return (
        f"that folder holds {own} alone. The rest: {rest}. To bring them together: python converters/assemble.py "
        f"{checkpoints.root}/checkpoint_STEP {folders} --save-path {checkpoints.root}/whole/checkpoint_STEP"
    )


def _end_test(progress: Progress, config: Config, meeting: Rendezvous, parts: str) -> None:
    folder = folder_of(config.checkpoints, progress.step)
    exported = export(folder) if config.rank == 0 else None
    meeting.exchange("as-test", "", config.wire_timeout)  # a failure is everyone's
    if config.rank == 0:
        log.info(
            "--as-test: all worked: one update, %scheckpoint in %s, %s. The folder %s may be deleted",
            "evaluation, " if progress.best_loss is not None else "", folder,
            f"export to {exported}" if exported else f"no export: {parts.replace('STEP', str(progress.step))}",
            config.checkpoints,
        )  # fmt: skip


def _summary(progress: Progress, early: str, metrics: Metrics, config: Config, parts: str) -> None:
    if metrics.first_loss is None or metrics.last_loss is None:
        return
    how = early if early in ("", STOPPED) else f"ended early: {early};"
    log.info(
        "%s at step %d of %d: loss %.4f at first, %.4f at last; the model is in %s",
        how or "done", progress.step, config.total_steps, metrics.first_loss, metrics.last_loss,
        folder_of(config.checkpoints, progress.step),
    )  # fmt: skip
    if parts and not config.as_test:
        log.info("%s", parts.replace("STEP", str(progress.step)))
    if progress.skipped:
        log.info("%d of %d updates overflowed and were skipped", progress.skipped, progress.updates)
    if progress.best_loss is not None and progress.best_step is not None:
        log.info(
            "the best evaluation: loss %.4f, perplexity %.2f; that model is in %s",
            progress.best_loss, perplexity(progress.best_loss), folder_of(config.checkpoints, progress.best_step),
        )  # fmt: skip
