"""The loss as a sum. Who knows the whole global batch divides, once; a mean of means would weigh rows unevenly."""

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # a label that counts for nothing


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Σ −log p(label) over the valid positions, an fp32 scalar.

    logits [b, T, V] of any float type; labels [b, T] int64, `labels[:, t]` the target of position t (already
    shifted), IGNORED where there is none.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def count_valid(labels: Tensor) -> int:
    """How many of `labels` [b, T] are targets."""
    return int((labels != IGNORED).sum())
