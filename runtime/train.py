"""One rank's run: from good flags to a checkpoint, and from any failure to one line and a non-zero exit."""

from __future__ import annotations

import hashlib
import importlib.util
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

from .. import __version__
from ..comm.errors import WireError
from ..comm.interfaces import interface, interface_towards
from ..comm.rendezvous import Rendezvous, parse_url
from ..comm.topology import Topology
from ..modules.layers import init_unit
from ..modules.shards import ShardError, ShardStore
from ..modules.spec import ModelSpec, SpecError
from ..pipeline.executor import Executor
from ..pipeline.partition import PartitionError, even_split, explicit_split, fixed_split, stage_units
from ..pipeline.replicas import Replicas
from ..pipeline.schedule import Plan, gpipe, lower, one_f_one_b
from ..pipeline.simulate import Costs, PlanError, simulate, validate
from ..pipeline.stage import Stage
from ..pipeline.timeline import Timeline
from .checkpoint import CheckpointError, Checkpoints, Progress, folder_of, load_weights
from .config import Config, ConfigError
from .feed import Feed
from .metrics import Metrics
from .optim import Optimizer
from .tasks import DataError, TaskMixture, parse_tasks
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
    _check_model(config, spec)
    split = _split(config, spec)
    plan = _plan(config)
    meeting.agree({**config.agreement(), **_versions(), "the model's config.json": _digest(spec)})
    device = _device(config)
    threads = _share_threads(meeting)
    units = stage_units(split, place.stage)
    log.info(
        "rank %d: replica %d, stage %d of %d, %s, on %s%s, interface %s",
        config.rank, place.replica, place.stage, topology.stages, _describe(units, spec), device, threads, wire.name,
    )  # fmt: skip

    mixture = _mixture(config, spec) if config.rank == 0 else None
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    stage = Stage(spec, units, dtype=dtype, device=device)
    optimizer = Optimizer(stage, config)
    checkpoints = Checkpoints(config.checkpoints, meeting, topology, config.wire_timeout)
    progress = _start(config, spec, store, stage, optimizer, checkpoints)
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
    tied = next(
        (
            v
            for t, v in zip(optimizer.tensors, optimizer.gradients.views, strict=True)
            if t.owner != t.unit or (spec.tied and t.unit == 0)
        ),
        None,
    )
    metrics = Metrics(config, progress.step) if config.rank == 0 else None
    feed = Feed(config, topology, wires.ends, config.updates - progress.updates, mixture, wires.data)
    tokenizer = Path(config.tokenizer_name or config.model_name)
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
    wires.close()
    if metrics is not None:
        metrics.close()
        _summary(progress, stopped, metrics, config)
    if timeline is not None:
        path = config.checkpoints / "traces" / f"rank{config.rank}.json"
        # perf_counter's zero differs from machine to machine; the wall clock is common, as far as clocks agree.
        timeline.write_chrome_trace(path, config.rank, f"rank {config.rank}", time.time() - time.perf_counter())


def _check_model(config: Config, spec: ModelSpec) -> None:
    where = f"{config.model_name}/config.json"
    for flag, told, true in (
        ("model-type", config.model_type, spec.family),
        ("embedding-dim", config.embedding_dim, spec.width),
        ("num-heads", config.num_heads, spec.heads),
    ):
        if told and told != true:
            raise ConfigError(f"--{flag} {told} is not what {where} says: {true}")
    if config.seq_length > spec.max_positions:
        raise ConfigError(
            f"--seq-length {config.seq_length} is more than the model's {spec.max_positions} positions ({where})"
        )


def _split(config: Config, spec: ModelSpec) -> tuple[int, ...]:
    stages = config.pipeline_group_size
    if config.layer_split:
        return explicit_split(spec.layers, stages, [int(count) for count in config.layer_split.split(",") if count])
    if config.num_layers:
        return fixed_split(spec.layers, stages, config.num_layers)
    return even_split(spec.layers, stages)


def _plan(config: Config) -> Plan:
    stages, micro_batches = config.pipeline_group_size, config.micro_batches
    plan = (
        gpipe(stages, micro_batches)
        if config.pp_mode == "gpipe"
        else one_f_one_b(stages, micro_batches, config.pp_ahead)
    )
    validate(plan, micro_batches)
    simulate(lower(plan), Costs.even(stages))
    return plan


def _versions() -> dict[str, str]:
    return {"farspan's version": __version__, "torch's version": torch.__version__.split("+")[0]}


def _digest(spec: ModelSpec) -> str:
    return hashlib.sha256(repr(spec).encode()).hexdigest()[:12]


def _describe(units: range, spec: ModelSpec) -> str:
    blocks = [unit - 1 for unit in units if 0 < unit < spec.unit_count - 1]
    parts = ["embedding"] if units.start == 0 else []
    parts.append(f"layers {blocks[0]}–{blocks[-1]}")
    return " + ".join(parts + (["head"] if units.stop == spec.unit_count else []))


def _device(config: Config) -> torch.device:
    available = torch.cuda.is_available()
    if config.use_cuda == "true" and not available:
        raise ConfigError("--use-cuda true, but torch sees no CUDA device here")
    if config.use_cuda == "false" or not available:
        return torch.device("cpu")
    if config.cuda_id >= torch.cuda.device_count():
        raise ConfigError(f"--cuda-id {config.cuda_id}: this machine has {torch.cuda.device_count()} CUDA devices")
    device = torch.device("cuda", config.cuda_id)
    torch.cuda.set_device(device)
    return device


def _share_threads(meeting: Rendezvous) -> str:
    """Divide this host's cores among its ranks, unless OMP_NUM_THREADS has a say."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    hosts = meeting.exchange("host", boot.read_text() if boot.exists() else os.uname().nodename)
    ranks = hosts.count(hosts[meeting.rank])
    if os.environ.get("OMP_NUM_THREADS"):
        return f", {torch.get_num_threads()} thread(s) (OMP_NUM_THREADS)"
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // ranks))
    return f", {torch.get_num_threads()} thread(s) ({cores} cores, {ranks} ranks)"


def _mixture(config: Config, spec: ModelSpec) -> TaskMixture:
    if config.train_log_backend == "wandb" and importlib.util.find_spec("wandb") is None:
        raise ConfigError("--train-log-backend wandb needs the package: pip install wandb")
    name = config.tokenizer_name or config.model_name
    import transformers  # late: only rank 0 needs it, and it takes seconds

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--tokenizer-name {name}: no tokenizer there: {str(error).splitlines()[0]}") from error
    if len(tokenizer) > spec.vocab:
        raise ConfigError(
            f"--tokenizer-name {name} has {len(tokenizer)} tokens, more than the model's vocabulary of {spec.vocab}"
        )
    tokenizer.model_max_length = sys.maxsize  # documents are cut into sequences later: no warning about long ones

    def encode(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    return TaskMixture(parse_tasks(config.task_name), encode, config.seq_length, config.seed)


def _start(
    config: Config, spec: ModelSpec, store: ShardStore, stage: Stage, optimizer: Optimizer, checkpoints: Checkpoints
) -> Progress:
    """Fill the stage: from the latest checkpoint, or from the pretrained model, or at random."""
    step = checkpoints.find(stage.units, spec) if config.load_checkpoint else None
    if step is not None:
        folder = folder_of(config.checkpoints, step)
        ours, theirs = spec, ShardStore(folder).spec
        if repr(ours) != repr(theirs):
            raise CheckpointError(f"{folder} is of another model than --model-name {config.model_name}")
        progress = checkpoints.load(step, spec, optimizer)
        if config.rank == 0:
            log.info("resuming from %s", folder)
        if progress.step != progress.updates * config.gradient_accumulate_step:
            raise CheckpointError(
                f"{folder} was written with --gradient-accumulate-step {progress.step // progress.updates}; "
                "a run cannot change it halfway"
            )
        return progress
    if config.load_pretrained_model:
        load_weights(store, optimizer)
    else:
        for unit, layer in zip(stage.units, stage.layers, strict=True):
            init_unit(layer, spec, unit, config.seed)
        for master, tensor in zip(optimizer.masters, optimizer.tensors, strict=True):
            with torch.no_grad():
                master.copy_(tensor.parameter)
    return Progress()


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
