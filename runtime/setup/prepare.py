"""What a run needs before its first step: a model that fits its flags, a plan, a device, data, weights."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import math
import os
import re
import resource
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ... import __version__
from ...comm.errors import Mismatch
from ...comm.meeting.rendezvous import Rendezvous
from ...comm.meeting.verify import host_here
from ...comm.transport import prepare
from ...modules.layers import init_unit
from ...modules.shards import ShardStore
from ...modules.spec import ModelSpec, SpecError
from ...pipeline.schedule import Plan, forward_only, gpipe, lower, one_f_one_b
from ...pipeline.simulate import Costs, simulate, validate
from ...pipeline.stage import Stage
from ..checkpoints.checkpoint import Checkpoints, Progress, load_weights, read_progress
from ..checkpoints.lineage import CheckpointError, folder_of
from ..checkpoints.retention import checkpoint_steps
from ..data.continuity import flag_of_tokens
from ..data.mixture import TaskMixture
from ..data.tokenizer import Vocabulary
from ..flags.config import Config
from ..flags.errors import ConfigError
from ..flags.launcher import local_rank
from ..flags.validation import validate_length
from ..optim.optimizer import Optimizer
from ..training.milestones import mean_epoch, steps_of_epochs
from .network import Network
from .notices import other_batch

_DESCRIPTORS = 2**16
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h

log = logging.getLogger("farspan")


def open_model(config: Config) -> tuple[ShardStore | None, ModelSpec]:
    """Where the pretrained weights lie, unless --load-pretrained-model false wants none, and what model it is.

    Raises `ConfigError`, `SpecError` or `ShardError`."""
    folder = Path(config.model_name)
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", config.model_name):
        raise ConfigError(_on_the_hub(config))
    store = ShardStore(folder) if config.load_pretrained_model else None
    spec = store.spec if store is not None else ModelSpec.from_folder(folder)
    if config.stretch is not None:
        try:
            spec = spec.stretched(*config.stretch)
        except SpecError as error:
            raise ConfigError(f"--rope-scaling {config.rope_scaling}: {error} ({folder}/config.json)") from error
    return store, spec


def _on_the_hub(config: Config) -> str:
    """What to do where --model-name is a model's name on the hub."""
    name, parts = config.model_name, {"gpt-j": "gptj", "neox": "gptneox", "pythia": "gptneox", "llama": "llama"}
    guessed = next((family for part, family in parts.items() if part in name.lower()), "…")
    return (
        f"--model-name {name}: no such folder here. If it is a model on the Hugging Face hub, fetch it: "
        f"python converters/convert_from_hf_{config.model_type or guessed}.py --model-name {name} --save-dir "
        f"pretrained_models, and then train with --model-name pretrained_models/{name.replace('/', '_')}"
    )


def check_model(config: Config, spec: ModelSpec) -> None:
    """Raises `ConfigError` where a flag says something else of the model than its config.json."""
    where = f"{config.model_name}/config.json"
    for flag, told, true in (
        ("model-type", config.model_type, spec.family),
        ("embedding-dim", config.embedding_dim, spec.width),
        ("num-heads", config.num_heads, spec.heads),
    ):
        if told and told != true:
            raise ConfigError(f"--{flag} {told} is not what {where} says: {true}")
    if config.seq_length > spec.longest:
        given = f" with --rope-scaling {config.rope_scaling}" if config.rope_scaling else ""
        raise ConfigError(
            f"--seq-length {config.seq_length} is more than the model's {spec.longest} positions{given} ({where})"
            + _stretching(config, spec)
        )


def _stretching(config: Config, spec: ModelSpec) -> str:
    """What lets the model take --seq-length."""
    kind, factor = config.stretch or ("", 1.0)
    kinds = [kind] if kind else spec.stretches
    if not kinds:
        return ""
    enough = math.ceil(factor * config.seq_length / spec.longest)
    *others, last = (f"{kind}:{enough}" for kind in kinds)
    offered = f"{', '.join(others)} or {last}" if others else last
    return f"; --rope-scaling {offered} lets it take them"


def make_plan(config: Config) -> Plan:
    """The training schedule, proved on paper to run to its end."""
    stages, micro_batches = config.pipeline_group_size, config.micro_batches
    plan = (
        gpipe(stages, micro_batches)
        if config.pp_mode == "gpipe"
        else one_f_one_b(stages, micro_batches, config.pp_ahead)
    )
    validate(plan, micro_batches)
    simulate(lower(plan), Costs.even(stages))
    return plan


def make_evaluation_plan(config: Config) -> Plan:
    """The same for evaluation."""
    stages, micro_batches = config.pipeline_group_size, config.micro_batches
    plan = forward_only(stages, micro_batches)
    validate(plan, micro_batches, backward=False)
    simulate(lower(plan), Costs.even(stages))
    return plan


def shake_hands(meeting: Rendezvous, config: Config, spec: ModelSpec) -> None:
    """Raises `Mismatch` unless flags, versions and the model's facts are the same on all ranks."""
    facts = hashlib.sha256(repr(spec).encode()).hexdigest()[:12]
    versions = {"farspan's version": __version__, "torch's version": torch.__version__.split("+")[0]}
    meeting.agree({**config.agreement(), **versions, "the model's config.json": facts})


def describe(units: range, spec: ModelSpec) -> str:
    """A stage's units in words."""
    blocks = [unit - 1 for unit in units if 0 < unit < spec.unit_count - 1]
    parts = ["embedding"] if units.start == 0 else []
    parts.append(f"layers {blocks[0]}–{blocks[-1]}")
    return " + ".join(parts + (["head"] if units.stop == spec.unit_count else []))


def pick_device(config: Config, network: Network) -> torch.device:
    """What --use-cuda and --cuda-id say, or a CUDA device where there is one; ready for what the backends need.

    Raises `ConfigError` or `InterfaceError`."""
    for library, interface in {(config.pp_library, network.wire), (config.dp_library, network.gradients)}:
        prepare(library, interface.name)
    available = torch.cuda.is_available()
    if config.use_cuda == "true" and not available:
        raise ConfigError("--use-cuda true, but torch sees no CUDA device here")
    if config.use_cuda == "false" or not available:
        return torch.device("cpu")
    count, number = torch.cuda.device_count(), config.cuda_id
    if number < 0:  # a launcher that binds one device to each process shows it that one, as device 0
        number = local_rank(os.environ) if count > 1 else 0
    if number >= count:
        raise ConfigError(
            f"--cuda-id {number}: this process sees {count} CUDA device{'s' if count > 1 else ''}, from 0 on"
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def share_threads(meeting: Rendezvous) -> str:
    """Divide this host's cores among its ranks, unless OMP_NUM_THREADS has a say."""
    hosts = meeting.exchange("host", host_here())
    ranks = hosts.count(hosts[meeting.rank])
    if os.environ.get("OMP_NUM_THREADS"):
        return f", {torch.get_num_threads()} thread(s) (OMP_NUM_THREADS)"
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // ranks))
    return f", {torch.get_num_threads()} thread(s) ({cores} cores, {ranks} ranks)"


def allow_descriptors() -> None:
    """Raise this process's own limit on open files as far as its hard limit lets it, and a run could need.

    Each connection between two ranks takes one, and so does each stranger at a port."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (OSError, ValueError) as error:  # a limit beside the hard one, as macOS has it
        log.debug("the limit on open files stays %d: %s", soft, error)


def keep_freed_memory() -> None:
    """Tell glibc's malloc not to give the activations of one step back to the kernel, only to fault them in again.

    4 % of a step's time on CPU (`benchmarks/loopback.py`). Freed blocks stay with the process, for the next step.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that it takes


def open_vocabulary(config: Config, spec: ModelSpec) -> Vocabulary:
    """Rank 0's tokenizer. Raises `ConfigError`."""
    vocabulary = Vocabulary(config)
    if vocabulary.known > spec.vocab:
        raise ConfigError(
            f"--tokenizer-name {vocabulary.name} has {vocabulary.known} tokens, more than the model's vocabulary of "
            f"{spec.vocab}"
        )
    return vocabulary


def settle(
    config: Config, progress: Progress, mixture: TaskMixture | None, meeting: Rendezvous
) -> tuple[Config, Progress]:
    """Turn --nepochs into steps: rank 0 counts, once for a run (again where its epochs have become longer or shorter),
    and tells the others. Raises `ConfigError`."""
    if not config.nepochs:
        return config, progress
    count, most = progress.epoch_sequences, None
    if mixture is not None and (count is None or mixture.resized):
        now = mixture.sequences()
        count = now if count is None else mean_epoch(config.nepochs, mixture.drawn, count, now)
    if mixture is not None:
        most = mixture.most()
    count, most = meeting.exchange("sequences of an epoch", (count, most), config.wire_timeout)[0]
    steps = steps_of_epochs(config, count, most)
    if config.rank == 0:
        if most is not None and most < config.nepochs * count:
            log.info("no more than %d sequences: so often may the tasks be read by their repeats", most)
        log.info("--nepochs %d: %d sequences an epoch, %d steps", config.nepochs, count, steps)
    config = replace(config, total_steps=steps)
    validate_length(config)
    return config, replace(progress, epoch_sequences=count)


def fill(
    config: Config,
    spec: ModelSpec,
    store: ShardStore | None,
    stage: Stage,
    optimizer: Optimizer,
    checkpoints: Checkpoints,
) -> Progress:
    """Fill the stage: from the latest checkpoint or --load-step's, or from the pretrained model, or at random."""
    step = checkpoints.find(stage.units, spec, (config.load_step or None) if config.load_checkpoint else 0)
    if step is not None:
        folder = folder_of(config.checkpoints, step)
        same_model(config, spec, folder)
        progress = checkpoints.load(step, spec, optimizer)
        if config.rank == 0:
            log.info("resuming from %s", folder)
        if progress.step != progress.updates * config.gradient_accumulate_step:
            raise CheckpointError(
                f"{folder} was written with --gradient-accumulate-step {progress.step // progress.updates}; "
                "a run cannot change it halfway"
            )
        for notice in (same_optimizer(config, progress, folder), other_batch(config, progress)):
            if notice and config.rank == 0:
                log.warning("%s", notice)
        checkpoints.go_on(progress, taken_back=config.load_step > 0)
        return replace(progress, optimizer=config.optimizer_kind, global_batch=config.global_batch)
    if not config.load_checkpoint and config.rank == 0 and (steps := checkpoint_steps(config.checkpoints)):
        log.warning(
            "--load-checkpoint false: starting over; those in %s (up to step %d) are replaced by new ones",
            config.checkpoints, steps[-1],
        )  # fmt: skip
    if store is not None:
        load_weights(store, optimizer)
    else:
        for unit, layer in zip(stage.units, stage.layers, strict=True):
            init_unit(layer, spec, unit, config.seed)
        optimizer.adopt()
    return Progress(optimizer=config.optimizer_kind, global_batch=config.global_batch)


def same_model(config: Config, ours: ModelSpec, folder: Path) -> None:
    """Raises `CheckpointError` where the checkpoint in `folder` is of another model than `ours`."""
    theirs = ShardStore(folder).spec
    if repr(theirs) == repr(ours):
        return
    if repr(replace(theirs, rope=ours.rope, max_positions=ours.max_positions)) == repr(ours):
        raise CheckpointError(
            f"{folder} was trained with --rope-scaling {theirs.scaling}, and now it is {ours.scaling}, which makes "
            f"another model of it: put it back, or begin a run of its own from it (--model-name {folder}, and "
            "another --checkpoint-path)"
        )
    if repr(replace(theirs, vocab=ours.vocab)) == repr(ours) and theirs.vocab > ours.vocab:
        made = (read_progress(folder).data or {}).get("made", {})
        if flag := flag_of_tokens(made):
            raise CheckpointError(
                f"{folder} was trained with {theirs.vocab} tokens, and now there are {ours.vocab}: give rank 0 the "
                f"{flag} of before again"
            )
    raise CheckpointError(f"{folder} is of another model than --model-name {config.model_name}")


def same_optimizer(config: Config, progress: Progress, folder: Path) -> str | None:
    """What is to be said of going on with --optimizer from the checkpoint in `folder`. Raises `CheckpointError`."""
    then, now = progress.optimizer, config.optimizer_kind
    if then not in (None, now):
        raise CheckpointError(f"{folder} was written with --optimizer {then}, which a run cannot change halfway")
    if then is None and config.optimizer == "adam":
        return (
            f"{folder} was written by a version whose --optimizer adam added the decay to the gradient. adam is AdamW "
            "now, and the run goes on with it; to go on as it was, stop it and give --optimizer adam-l2"
        )
    return None


def same_weights(ranks: Sequence[Mapping[str, int]]) -> None:
    """`ranks`: what each has loaded, name → checksum. Replicas and the copies of a tied matrix must begin alike: later
    they only ever exchange gradients, and would train two models to neither. Raises `Mismatch`."""
    if (differ := first_difference(ranks)) is not None:
        raise Mismatch(f"the weights differ: {differ}; give all ranks the same files (--check names those that differ)")


def first_difference(ranks: Sequence[Mapping[str, object]]) -> str | None:
    """The first name under which two of the ranks have something else, in words."""
    first: dict[str, tuple[int, object]] = {}
    for rank, things in enumerate(ranks):
        for name, found in things.items():
            other, seen = first.setdefault(name, (rank, found))
            if found != seen:
                return f"{name} is not the same on rank {other} and rank {rank}"
    return None
