"""What flags must be, as far as that can be said without looking at a file."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from math import isfinite

from ...modules.urls import url_fault
from .config import LOG_BACKENDS, Config, dash
from .errors import ConfigError

PATHS = (
    "checkpoint_path", "model_name", "tokenizer_name", "task_config", "data_cache", "special_tokens", "chat_template",
    "secret_file",
)  # fmt: skip
"""Flags that take a path on this machine."""


def validate(config: Config) -> None:
    """Raises `ConfigError` with all `problems_of` it."""
    if problems := problems_of(config):
        raise ConfigError(*problems)


def problems_of(config: Config) -> list[str]:
    """Whatever is wrong with the flags, each named."""
    c = config
    problems: list[str] = []

    def refuse(bad: object, message: str) -> None:
        if bad:
            problems.append(message)

    for name in PATHS:
        refuse(fault := url_fault(f"--{dash(name)}", getattr(c, name)), fault)
    for path in (*c.task_name.split(","), c.evaluation_data):
        flag = "--evaluation-data" if path == c.evaluation_data else "--task-name"
        refuse(fault := url_fault(flag, path, "hf"), fault)
    for f in fields(c):
        value = getattr(c, f.name)
        refuse(isinstance(value, float) and not isfinite(value), f"--{dash(f.name)} {value} must be a finite number")
    refuse(not c.model_name, "--model-name is needed: a folder of layer shards, or a Hugging Face folder")
    refuse(not c.dist_url, "--dist-url is needed: tcp://host:port of rank 0 (or start with torchrun, srun or mpirun)")
    refuse(c.rank < 0, "--rank is needed: 0 … world-size − 1 (or start with torchrun, srun or mpirun)")
    for name in (
        "pipeline_group_size", "data_group_size", "batch_size", "micro_batch_size",
        "gradient_accumulate_step", "pp_ahead", "loss_scale_window", "hysteresis",
    ):  # fmt: skip
        refuse(getattr(c, name) < 1, f"--{dash(name)} {getattr(c, name)} must be at least 1")
    for name in (
        "lr", "weight_decay", "warmup_steps", "max_grad_norm", "checkpoint_steps", "log_steps", "num_layers", "min_lr",
        "loss_scale", "data_workers", "show_data",
    ):  # fmt: skip
        refuse(getattr(c, name) < 0, f"--{dash(name)} {getattr(c, name)} must not be negative")
    refuse(c.cuda_id < -1, f"--cuda-id {c.cuda_id} must not be negative")
    _validate_grid(c, refuse)
    _validate_data(c, refuse)
    if c.total_steps > 0 and c.gradient_accumulate_step > 0:
        problems.extend(_problems_of_length(c))
    _validate_optimizer(c, refuse)
    factor = re.fullmatch(r"(?:linear|dynamic|yarn):(\d+(?:\.\d+)?)", c.rope_scaling, re.ASCII)
    refuse(
        c.rope_scaling and not (factor and float(factor[1]) > 1),
        f"--rope-scaling {c.rope_scaling} must be linear, dynamic or yarn, with a factor of more than 1: yarn:4",
    )
    refuse(c.num_layers and c.layer_split, "--num-layers and --layer-split say the same thing: give one")
    split = c.layer_split.replace(",", "")
    refuse(
        c.layer_split not in ("", "even") and not (split.isascii() and split.isdigit()),
        f"--layer-split {c.layer_split} must be numbers, e.g. 3,2, or even",
    )
    _validate_checkpoints(c, refuse)
    _validate_evaluation(c, refuse)
    for name in c.log_backends:
        refuse(name not in LOG_BACKENDS, f"--train-log-backend {name!r} is none of {', '.join(LOG_BACKENDS)}")
    refuse(not 0 <= c.seed < 2**32, f"--seed {c.seed} must be from 0 to 2³² − 1")
    return problems


def validate_length(c: Config) -> None:
    """What can be said once the run's length is known: with --nepochs, after counting. Raises `ConfigError`."""
    if problems := _problems_of_length(c):
        raise ConfigError(*problems)


def _problems_of_length(c: Config) -> list[str]:
    of = "(--total-steps ÷ --gradient-accumulate-step)"
    return [
        f"--{dash(name)} {getattr(c, name)} is more than the run's {c.updates} updates {of}"
        for name in ("warmup_steps", "num_checkpoints")
        if getattr(c, name) > c.updates
    ]


def _validate_grid(c: Config, refuse: Callable[[object, str], None]) -> None:
    """The grid of ranks, and what connects it."""
    grid = c.pipeline_group_size * c.data_group_size
    refuse(
        c.world_size != grid,
        f"--world-size {c.world_size} is not --pipeline-group-size {c.pipeline_group_size} × "
        f"--data-group-size {c.data_group_size} = {grid}",
    )
    refuse(c.rank >= c.world_size == grid > 0, f"--rank {c.rank} is not below --world-size {c.world_size}")
    refuse(
        c.dp_net_interface not in ("", c.net_interface) and c.pp_library == c.dp_library == "nccl",
        f"--dp-net-interface {c.dp_net_interface}: NCCL has one interface a process, so with --dist-backend "
        f"{c.dist_backend} and --dp-backend {c.dp_backend} both must take --net-interface "
        f"{c.net_interface or '[the one that reaches rank 0]'}; or let gloo carry one of the two",
    )
    for name, library in (("dist_backend", c.pp_library), ("dp_backend", c.dp_library)):
        refuse(
            library == "nccl" and c.use_cuda == "false",
            f"--{dash(name)} {getattr(c, name)} works on CUDA devices alone, and --use-cuda is false: use gloo",
        )
    for name in ("join_timeout", "wire_timeout", "heartbeat_period"):
        refuse(not getattr(c, name) > 0, f"--{dash(name)} {getattr(c, name)} must be more than 0 seconds")
    least = max(3 * c.heartbeat_period, 2.0)  # TCP's own probes come once a second at most
    refuse(
        not c.heartbeat_patience >= least,
        f"--heartbeat-patience {c.heartbeat_patience} must be at least {least}: 2 seconds, and 3 × --heartbeat-period",
    )


def _validate_data(c: Config, refuse: Callable[[object, str], None]) -> None:
    """Data, and the run's length in it."""
    refuse(
        c.micro_batch_size > 0 and c.batch_size % c.micro_batch_size,
        f"--batch-size {c.batch_size} is not a multiple of --micro-batch-size {c.micro_batch_size}",
    )
    refuse(c.seq_length < 2, f"--seq-length {c.seq_length} must be at least 2: a token and the one to predict")
    told = bool(c.task_name) + bool(c.task_config)
    refuse(not told and c.rank == 0, "--task-name (or --task-config) is needed on rank 0: a.jsonl:0.2,b.jsonl:0.8")
    refuse(told > 1, "--task-name and --task-config say the same thing: give one")
    refuse(
        c.document_mask and c.rows == "padded",
        "--document-mask means nothing to --rows padded, where each row holds one document: leave it out",
    )
    refuse(not c.checkpoint_path, "--checkpoint-path is needed: the folder where the trained model is saved")
    refuse(c.nepochs < 0, f"--nepochs {c.nepochs} must not be negative")
    refuse(
        c.total_steps < 1 and not c.nepochs,
        "--total-steps is needed: accumulation steps of the whole run (or --nepochs)",
    )
    refuse(
        c.gradient_accumulate_step > 0 and c.total_steps % c.gradient_accumulate_step,
        f"--total-steps {c.total_steps} is not a multiple of --gradient-accumulate-step {c.gradient_accumulate_step}, "
        "so the last steps would never reach the weights",
    )


def _validate_optimizer(c: Config, refuse: Callable[[object, str], None]) -> None:
    """Precision, loss scale, optimizer and learning rate."""
    refuse(c.fp16 and c.bf16, "--fp16 and --bf16 exclude each other: give one")
    for name in ("initial_loss_scale", "min_loss_scale"):
        refuse(not getattr(c, name) > 0, f"--{dash(name)} {getattr(c, name)} must be a positive number")
    refuse(
        c.initial_loss_scale < c.min_loss_scale,
        f"--initial-loss-scale {c.initial_loss_scale} is below --min-loss-scale {c.min_loss_scale}",
    )
    refuse(c.bucket_mb < 1e-3, f"--bucket-mb {c.bucket_mb} must be at least 0.001")
    refuse(
        c.optimizer == "8bit-adam" and c.dp_mode == "zero1",
        "--optimizer 8bit-adam has one scale for 256 elements, which the shards of --dp-mode zero1 would cut: "
        "use adamw, or --dp-mode allreduce",
    )
    refuse(c.min_lr > c.lr >= 0, f"--min-lr {c.min_lr} is more than --lr {c.lr}")
    refuse(c.min_lr and c.scheduler == "constant", "--min-lr means nothing to --scheduler constant: leave it out")
    for name in ("adam_beta1", "adam_beta2"):
        refuse(not 0 <= getattr(c, name) < 1, f"--{dash(name)} {getattr(c, name)} must be in [0, 1)")
    refuse(
        not c.adam_eps > 0, f"--adam-eps {c.adam_eps} must be more than 0: what never had a gradient is divided by it"
    )


def _validate_checkpoints(c: Config, refuse: Callable[[object, str], None]) -> None:
    for name in ("num_checkpoints", "load_step"):
        refuse(getattr(c, name) < 0, f"--{dash(name)} {getattr(c, name)} must not be negative")
    refuse(
        c.keep_checkpoints < 1 and c.keep_checkpoints != -1,
        f"--keep-checkpoints {c.keep_checkpoints} must be at least 1, or -1 to keep all",
    )
    refuse(c.load_step and not c.load_checkpoint, "--load-step and --load-checkpoint false: give one")


def _validate_evaluation(c: Config, refuse: Callable[[object, str], None]) -> None:
    names = ("evaluation_steps", "evaluation_num_batch", "stop_perplexity", "patience")
    for name in names:
        refuse(not getattr(c, name) >= 0, f"--{dash(name)} {getattr(c, name)} must not be negative")
        refuse(
            c.rank == 0 and getattr(c, name) and not c.evaluation_data,
            f"--{dash(name)} needs --evaluation-data on rank 0: the path of held-out data",
        )
    for name in ("stop_perplexity", "patience"):
        refuse(getattr(c, name) and not c.evaluation_steps, f"--{dash(name)} needs --evaluation-steps")
