"""What flags are called elsewhere (Hugging Face's Trainer, Megatron, others), for the hint at an unknown one."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

OURS = {
    "--learning-rate": "--lr",
    "--epochs": "--nepochs",
    "--num-epochs": "--nepochs",
    "--num-train-epochs": "--nepochs",
    "--max-steps": "--total-steps",
    "--train-iters": "--total-steps",
    "--per-device-train-batch-size": "--batch-size",
    "--train-batch-size": "--batch-size",
    "--gradient-accumulation-steps": "--gradient-accumulate-step",
    "--max-length": "--seq-length",
    "--max-seq-length": "--seq-length",
    "--block-size": "--seq-length",
    "--lr-scheduler-type": "--scheduler",
    "--lr-decay-style": "--scheduler",
    "--optim": "--optimizer",
    "--num-warmup-steps": "--warmup-steps",
    "--lr-warmup-iters": "--warmup-steps",
    "--clip-grad": "--max-grad-norm",
    "--gradient-checkpointing": "--recompute",
    "--model": "--model-name",
    "--model-name-or-path": "--model-name",
    "--tokenizer": "--tokenizer-name",
    "--train-file": "--task-name",
    "--dataset-name": "--task-name",
    "--data-path": "--task-name",
    "--validation-file": "--evaluation-data",
    "--eval-steps": "--evaluation-steps",
    "--output-dir": "--checkpoint-path",
    "--save": "--checkpoint-path",
    "--save-steps": "--checkpoint-steps",
    "--save-interval": "--checkpoint-steps",
    "--save-total-limit": "--keep-checkpoints",
    "--resume-from-checkpoint": "--load-checkpoint",
    "--logging-steps": "--log-steps",
    "--log-interval": "--log-steps",
    "--report-to": "--train-log-backend",
    "--pipeline-model-parallel-size": "--pipeline-group-size",
}
"""Only what means the same, or nearly: `--help` says the rest."""


def meant(name: str, flags: Sequence[str]) -> str | None:
    """The one of `flags` that the unknown flag `name` may mean; elsewhere flags are written with underscores too."""
    name = name.replace("_", "-")
    return OURS.get(name) or next(iter(get_close_matches(name, flags, 1, 0.75)), None)
