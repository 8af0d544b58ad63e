"""What is likely not meant and yet can be: rank 0 says it once, and the run goes on."""

from __future__ import annotations

from ..checkpoints.checkpoint import Progress
from ..flags.config import Config

HIGH_LR = 1e-3
"""Beyond it, fine-tuning tends to undo what pretrained weights know."""


def notices(config: Config, device: str) -> list[str]:
    """Of the flags, for a run that computes on a `device` of this type."""
    lines = []
    if config.load_pretrained_model and config.lr > HIGH_LR:
        lines.append(
            f"--lr {config.lr:g} is likely to ruin pretrained weights: 1e-5 is usual, {HIGH_LR:g} already much"
        )
    if device == "cuda" and config.pp_mode == "gpipe" and not (config.bf16 or config.fp16):
        lines.append(
            "fp32 and --pp-mode gpipe on a GPU: --bf16 computes faster and halves the memory of activations, and "
            "--pp-mode 1f1b keeps fewer of them"
        )
    return lines


def other_batch(config: Config, progress: Progress) -> str | None:
    """What it means that a run goes on from `progress` with another number of sequences in a step, if it does."""
    then, now = progress.global_batch, config.global_batch
    if then in (None, now):
        return None
    length = "--nepochs is counted as if all steps had taken so many" if config.nepochs else "--total-steps stays"
    keep, rest = divmod(then, config.data_group_size)
    advice = "" if rest or keep % config.micro_batch_size else f"; --batch-size {keep} keeps {then}"
    return (
        f"a step takes {now} sequences now (--batch-size {config.batch_size} × --data-group-size "
        f"{config.data_group_size}) and took {then} before: the data goes on with the very next sequence, {length}, "
        f"and the learning rate goes by steps, so the run reads another amount of text{advice}"
    )
