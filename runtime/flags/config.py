"""Everything a run can be told, as frozen dataclasses; flags, `--help` and JSON are made from their fields."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from ...modules.families.registry import FAMILIES
from .errors import ConfigError
from .launcher import from_launcher
from .old_flags import INERT, INSTEAD, REFUSED
from .other_flags import meant


def _flag(default: Any, help: str, *, choices: Sequence[str] = (), agree: bool = True) -> Any:  # noqa: ANN401
    """A field that becomes a flag. `agree`: every rank must be started with the same value."""
    return field(default=default, metadata={"help": help, "choices": tuple(choices), "agree": agree})


@dataclass(frozen=True)
class ModelFlags:
    """model"""

    model_name: str = _flag("", "folder of layer shards, or any Hugging Face folder with safetensors", agree=False)
    tokenizer_name: str = _flag(
        "", "folder, file (tokenizer.json, tokenizer.model) or hub name; rank 0 needs it [--model-name]", agree=False
    )
    model_type: str = _flag("", "checked against config.json [read from it]", choices=tuple(FAMILIES))
    num_layers: int = _flag(0, "transformer layers on each stage, the last stage takes the rest [by their work]")
    layer_split: str = _flag(
        "", "layers on each stage, e.g. 3,2; even: as many on each [by their work, with the head's]"
    )
    embedding_dim: int = _flag(0, "checked against config.json [read from it]")
    num_heads: int = _flag(0, "checked against config.json [read from it]")
    load_pretrained_model: bool = _flag(True, "start from the model's weights; false: random ones from --seed")
    rope_scaling: str = _flag(
        "",
        "scale the model's positions, for a longer --seq-length: linear:2, dynamic:2 or yarn:4 [as config.json says]",
    )
    bf16: bool = _flag(False, "compute in bfloat16; weights, moments and gradient sums stay in fp32 beside it")
    fp16: bool = _flag(False, "compute in float16 with a scaled loss; the rest as with --bf16")
    loss_scale: float = _flag(0.0, "with --fp16: a fixed loss scale; 0: a dynamic one")
    initial_loss_scale: float = _flag(32768.0, "dynamic loss scale at the start")
    min_loss_scale: float = _flag(1.0, "lowest dynamic loss scale")
    loss_scale_window: int = _flag(1000, "updates without an overflow after which the loss scale doubles")
    hysteresis: int = _flag(2, "overflows since the last doubling; this one and each further one halves the loss scale")


@dataclass(frozen=True)
class GridFlags:
    """processes and network"""

    dist_url: str = _flag(
        "",
        "tcp://host:port of rank 0, the same for all ranks [MASTER_ADDR and MASTER_PORT, or Slurm's first host]",
        agree=False,
    )
    rank: int = _flag(
        -1, "this process's number, 0 … world-size − 1 [the launcher's, or 0 for a run of one]", agree=False
    )
    world_size: int = _flag(0, "processes of all pipelines [the launcher's, else P × D]")
    pipeline_group_size: int = _flag(1, "P: stages of each pipeline")
    data_group_size: int = _flag(1, "D: pipelines (replicas) side by side")
    net_interface: str = _flag(
        "", "network interface for all traffic [the one whose route reaches rank 0]", agree=False
    )
    use_cuda: str = _flag(
        "", "compute on the CUDA device [true where there is one]", choices=("true", "false"), agree=False
    )
    cuda_id: int = _flag(
        -1, "number of the CUDA device [the launcher's local rank; 0 where one is visible]", agree=False
    )
    dist_backend: str = _flag(
        "gloo", "what carries activations between stages; cupy_nccl is nccl", choices=("gloo", "nccl", "cupy_nccl")
    )
    dp_backend: str = _flag(
        "gloo", "what carries gradients between replicas; cupy_nccl is nccl", choices=("gloo", "nccl", "cupy_nccl")
    )
    join_timeout: float = _flag(300.0, "seconds to wait for the master and for all ranks at the start")
    secret_file: str = _flag("", "file with a secret that every rank must prove to share [none]", agree=False)
    wire_timeout: float = _flag(1800.0, "seconds that any one wait for a peer may take during the run")
    dp_net_interface: str = _flag(
        "", "network interface for the gradients that replicas sum [--net-interface]", agree=False
    )
    heartbeat_period: float = _flag(1.0, "seconds between two signs of life, in the store and on every connection")
    heartbeat_patience: float = _flag(10.0, "seconds of silence after which a rank or a connection is given up")
    check: bool = _flag(
        False, "measure network, memory, weights and layers, say what a step will take, and stop without training"
    )


@dataclass(frozen=True)
class DataFlags:
    """data"""

    task_name: str = _flag("", "tasks and their weights: a.jsonl:0.2,b.jsonl.zst:0.5,hf://org/data:0.3", agree=False)
    seq_length: int = _flag(1024, "tokens of a sequence")
    batch_size: int = _flag(32, "sequences of each replica in one accumulation step")
    micro_batch_size: int = _flag(8, "sequences that travel through the pipeline together")
    gradient_accumulate_step: int = _flag(1, "accumulation steps of one update")
    seed: int = _flag(1, "seed of the data's order, of random weights and of dropout")
    task_config: str = _flag(
        "", "JSON list of tasks: path, weight, text | template | messages, loss_on, repeats", agree=False
    )
    data_cache: str = _flag(
        "", "folder for line indexes and what had to be decompressed [--checkpoint-path/data-cache]", agree=False
    )
    document_separator: str = _flag(r"\n", r"text before each document; \n and \t are understood")
    bos: str = _flag(
        "auto", "a token at each document's beginning; auto: as the tokenizer does", choices=("auto", "yes", "no")
    )
    eos: str = _flag(
        "auto",
        "a token at each document's end; auto: as the tokenizer does, and after each template",
        choices=("auto", "yes", "no"),
    )
    rows: str = _flag(
        "packed",
        "packed: documents follow one another; padded: each in a sequence of its own",
        choices=("packed", "padded"),
    )
    special_tokens: str = _flag(
        "", 'JSON file of tokens to add to tokenizer and model: {"tokens": ["<START_Q>", …]}', agree=False
    )
    chat_template: str = _flag(
        "", "chatml, llama2, llama3, alpaca, vicuna, zephyr, or a file (Jinja): how messages are rendered "
        "[the tokenizer's own]", agree=False,
    )  # fmt: skip
    bad_lines: str = _flag("error", "what a line that cannot be used does", choices=("error", "skip"))
    data_workers: int = _flag(
        0, "processes that tokenise ahead of the run; 0: rank 0 does it beside its stage", agree=False
    )
    document_mask: bool = _flag(
        False, "documents of a packed row do not see one another: attention and positions begin anew with each"
    )


@dataclass(frozen=True)
class OptimizerFlags:
    """optimizer"""

    optimizer: str = _flag(
        "adamw",
        "adamw and adam are AdamW, which decays weights apart from the gradient; 8bit-adam: the same, 8-bit moments; "
        "adam-l2: Adam, with the decay added to the gradient",
        choices=("adamw", "adam", "8bit-adam", "adam-l2"),
    )
    lr: float = _flag(1e-5, "peak learning rate")
    total_steps: int = _flag(0, "accumulation steps of the whole run: updates × --gradient-accumulate-step")
    warmup_steps: int = _flag(0, "updates over which the learning rate rises; then --scheduler says")
    weight_decay: float = _flag(0.01, "on all weights but norms and biases")
    adam_beta1: float = _flag(0.9, "decay of the first moment")
    adam_beta2: float = _flag(0.999, "decay of the second moment")
    adam_eps: float = _flag(1e-6, "added to the root of the second moment")
    max_grad_norm: float = _flag(1.0, "longest global gradient; longer ones are scaled down; 0: no clipping")
    nepochs: int = _flag(0, "draw as many sequences as all tasks hold, this many times, instead of --total-steps")
    as_test: bool = _flag(
        False, "one update, evaluation, checkpoint and export in --checkpoint-path/as-test, and stop: does all work?"
    )
    scheduler: str = _flag(
        "linear", "how the learning rate falls after the warm-up", choices=("linear", "cosine", "constant")
    )
    use_offload: bool = _flag(False, "keep fp32 weights and moments in host memory, and update them there")
    min_lr: float = _flag(0.0, "learning rate that linear and cosine fall to at the end of the run")


@dataclass(frozen=True)
class ScheduleFlags:
    """schedule"""

    pp_mode: str = _flag("gpipe", "pipeline schedule", choices=("gpipe", "1f1b"))
    pp_ahead: int = _flag(1, "1f1b: forwards in flight for each hop to the last stage; more hide a slow link")
    dp_mode: str = _flag(
        "allreduce",
        "how replicas sum their gradients; zero1: each keeps moments and fp32 weights of its share alone",
        choices=("allreduce", "zero1"),
    )
    bucket_mb: float = _flag(32.0, "MB of gradients that replicas sum at once, while others are being computed")
    recompute: str = _flag(
        "none",
        "compute again in the backward, to hold less: whole blocks, or all of them but matrix products and attention "
        "(selective); gradients are the same, and each rank may choose for itself",
        choices=("none", "block", "selective"),
        agree=False,
    )


@dataclass(frozen=True)
class CheckpointFlags:
    """checkpoints"""

    checkpoint_path: str = _flag("", "folder for checkpoints, metrics and traces", agree=False)
    checkpoint_steps: int = _flag(0, "save each time this many accumulation steps are done; 0: only at the end")
    load_checkpoint: bool = _flag(True, "go on from the latest checkpoint in --checkpoint-path, if there is one")
    num_checkpoints: int = _flag(0, "save this many checkpoints, evenly over the run, instead of --checkpoint-steps")
    keep_checkpoints: int = _flag(2, "keep this many of the newest, and the best, and delete the others; -1: keep all")
    load_step: int = _flag(0, "go on from exactly this step's checkpoint [the latest]")


@dataclass(frozen=True)
class WatchFlags:
    """watching"""

    train_log_backend: str = _flag(
        "print", "where rank 0 sends metrics besides metrics.jsonl: print, wandb, tensorboard, or several by commas"
    )
    project_name: str = _flag("farspan", "wandb project; WANDB_NAME names the run")
    log_steps: int = _flag(
        0,
        "print a line each time this many updates are done; 0: only the progress bar, or without a terminal a line a "
        "minute",
        agree=False,
    )
    show_data: int = _flag(
        0,
        "show a row of the data, its targets marked, each time this many updates are done; 0: only at the start",
        agree=False,
    )
    profiling: str = _flag(
        "no-profiling",
        "tidy_profiling writes one Chrome/Perfetto trace of all ranks and a picture of one step; pytorch_profiling "
        "torch's own, of rank 0 over a few updates",
        choices=("no-profiling", "tidy_profiling", "pytorch_profiling"),
    )
    debug: bool = _flag(False, "show tracebacks", agree=False)


@dataclass(frozen=True)
class EvaluationFlags:
    """evaluation"""

    evaluation_data: str = _flag(
        "",
        "held-out data, evaluated at the end of the run at least: a task's path, or a .json file as of --task-config; "
        "rank 0 needs it",
        agree=False,
    )
    evaluation_steps: int = _flag(0, "evaluate each time this many accumulation steps are done; 0: only at the end")
    evaluation_num_batch: int = _flag(0, "global batches of one evaluation; 0: all of it")
    stop_perplexity: float = _flag(0.0, "end the run when an evaluation's perplexity is at most this; 0: never")
    patience: int = _flag(0, "end the run after this many evaluations in a row that are no improvement; 0: never")


GROUPS = (
    ModelFlags, GridFlags, DataFlags, OptimizerFlags, ScheduleFlags, CheckpointFlags, EvaluationFlags, WatchFlags,
)  # fmt: skip
LOG_BACKENDS = ("print", "wandb", "tensorboard")
SWITCHES = {"bf16", "fp16", "use_offload", "debug", "as_test", "document_mask", "check"}
"""Flags that stand alone; other booleans take true or false, as scripts have always passed them."""


@dataclass(frozen=True)
class Config(
    ModelFlags, GridFlags, DataFlags, OptimizerFlags, ScheduleFlags, CheckpointFlags, EvaluationFlags, WatchFlags
):
    """One run, as one rank was told."""

    @property
    def micro_batches(self) -> int:
        return self.batch_size // self.micro_batch_size

    @property
    def updates(self) -> int:
        return self.total_steps // self.gradient_accumulate_step

    @property
    def pp_library(self) -> str:
        """--dist-backend, by its present name."""
        return self.dist_backend.removeprefix("cupy_")

    @property
    def dp_library(self) -> str:
        """--dp-backend, by its present name."""
        return self.dp_backend.removeprefix("cupy_")

    @property
    def global_batch(self) -> int:
        """Sequences of one accumulation step, of all replicas."""
        return self.batch_size * self.data_group_size

    @property
    def optimizer_kind(self) -> str:
        """--optimizer, by the one name of each kind."""
        return "adamw" if self.optimizer == "adam" else self.optimizer

    @property
    def stretch(self) -> tuple[str, float] | None:
        """--rope-scaling: its kind and its factor."""
        kind, _, factor = self.rope_scaling.partition(":")
        return (kind, float(factor)) if kind else None

    @property
    def lr_floor(self) -> float:
        """--min-lr as a share of the peak."""
        return self.min_lr / self.lr if self.lr else 0.0

    @property
    def log_backends(self) -> list[str]:
        names = (name.strip() for name in self.train_log_backend.split(","))
        return list(dict.fromkeys("print" if name == "loguru" else name for name in names))

    @property
    def checkpoints(self) -> Path:
        return Path(self.checkpoint_path)

    def agreement(self) -> dict[str, str]:
        """What every rank must have been told alike: flag → value."""
        return {f"--{dash(f.name)}": str(getattr(self, f.name)) for f in fields(self) if f.metadata["agree"]}

    def public(self) -> dict[str, Any]:
        """All values, for logs. Nothing here is a secret."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


_METAVARS = {int: "N", float: "X", bool: "BOOL", str: "S"}


def dash(name: str) -> str:
    return name.replace("_", "-")


def _bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")
    return text.lower() == "true"


def _int(text: str) -> int:
    """A whole number; 1000.0 is one, as scripts of flags that were floats have it."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number.is_integer():
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}")
    return int(number)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:  # noqa: ANN401 - never returns
        raise ConfigError(message)


def flag_options(f: Field[Any], kind: type | None = None) -> dict[str, Any]:
    """What argparse needs to know of a field's flag."""
    kind = kind or get_type_hints(Config)[f.name]
    help = f.metadata["help"]
    options: dict[str, Any] = {"default": f.default}
    if f.name in SWITCHES:
        options["action"] = "store_true"
    else:
        options["choices"] = f.metadata["choices"] or None
        options["type"] = str.lower if options["choices"] else {bool: _bool, int: _int}.get(kind, kind)
        options["metavar"] = None if options["choices"] else _METAVARS[kind]
        if "[" not in help and f.default != "":
            help += f" [{str(f.default).lower() if kind is bool else f.default}]"
    return {**options, "help": help.replace("%", "%%")}


def parser() -> argparse.ArgumentParser:
    made = _Parser(
        prog="dist_train.py",
        usage="dist_train.py --model-name DIR --task-name a.jsonl --checkpoint-path DIR --total-steps N\n"
        "                     --dist-url tcp://HOST:PORT --rank R [flags]",
        description="Fine-tune a GPT-J, GPT-NeoX or Llama model. Start one process a GPU, each with its own --rank.",
        epilog="Defaults stand in brackets. What torchrun, srun or mpirun says in the environment need not be said. "
        "docs/first-run.md and docs/training.md have examples.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    for group in GROUPS:
        section = made.add_argument_group(group.__doc__)
        types = get_type_hints(group)
        for f in fields(group):
            section.add_argument(f"--{dash(f.name)}", **flag_options(f, types[f.name]))
    for name in INERT:
        made.add_argument(name, nargs="*", help=argparse.SUPPRESS)
    return made


def parse(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> tuple[Config, list[str]]:
    """As `read`. Raises `ConfigError` for unknown flags and unreadable values."""
    made, notices, problems = read(argv, environ)
    if problems:
        raise ConfigError(*problems)
    return made, notices


def read(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> tuple[Config, list[str], list[str]]:
    """Flags (and the launcher's environment) → the config, not yet checked; notices; and what could not be read, which
    the config is without. Raises `ConfigError` for an environment that says nothing useful."""
    known, rest, problems = _known(list(argv))
    problems += [_unknown(word) for word in dict.fromkeys([word for word in rest if word.startswith("-")] or rest[:1])]
    values = vars(known)
    notices = []
    for name in INERT:
        if values.pop(name.removeprefix("--").replace("-", "_")) is not None:
            notices.append(f"{name} has no effect and is ignored")
    for stays, goes in INSTEAD:
        if values[stays] and values[goes] > 0:
            notices.append(f"--{dash(stays)} {values[stays]} is given: --{dash(goes)} {values[goes]} has no effect")
            values[goes] = 0
    values.update(from_launcher(known, os.environ if environ is None else environ))
    return Config(**values), notices, problems


def _known(words: list[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
    """The flags that can be read, words that are none, and why other flags cannot be read."""
    reader = parser()
    problems: list[str] = []
    while True:
        try:
            return *reader.parse_known_args(words), problems
        except argparse.ArgumentError as error:
            problems.append(str(error))
            left = _without(words, str(error.argument_name).split("/"))
            if left == words:
                raise ConfigError(*problems) from error
            words = left


def _without(words: list[str], names: list[str]) -> list[str]:
    """Without those flags and their values."""
    left, dropping = [], False
    for word in words:
        if word.startswith("--"):
            dropping = word.split("=")[0] in names
        if not dropping:
            left.append(word)
    return left


def _unknown(word: str) -> str:
    name = word.split("=")[0]
    if name in REFUSED:
        return f"{name}: {REFUSED[name]}"
    near = meant(name, [f"--{dash(f.name)}" for f in fields(Config)])
    hint = f": is it {near}?" if near else ""
    return f"unknown flag {word}{hint}; dist_train.py --help lists all of them"
