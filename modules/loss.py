"""The loss as a sum. Who knows the whole global batch divides, once; a mean of means would weigh rows unevenly."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # a label that counts for nothing
CHUNK_LOGITS = 1 << 24
"""The most logits that `linear_cross_entropy_sum` holds at once: 64 MiB in fp32."""


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Σ −log p(label) over the valid positions, an fp32 scalar.

    logits [b, T, V] of any float type; labels [b, T] int64, `labels[:, t]` the target of position t (already
    shifted), IGNORED where there is none.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def linear_cross_entropy_sum(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, most: int = CHUNK_LOGITS
) -> Tensor:
    """`cross_entropy_sum(hidden @ weightᵀ + bias, labels)`, holding at most `most` logits at once.

    hidden [b, T, C]; weight [V, C] and bias [V] of the same type; labels [b, T]. Logits are made a chunk of positions
    at a time, and once more in the backward (four matrix products instead of three), where their gradient replaces
    them; the softmax is computed in fp32. Where all logits fit into one chunk, nothing is made twice.
    """
    rows = most // weight.shape[0]
    if labels.numel() <= rows:
        return cross_entropy_sum(F.linear(hidden, weight, bias), labels)
    total: Tensor = _ChunkedLoss.apply(  # type: ignore[no-untyped-call] # untyped in torch
        hidden.flatten(0, 1), weight, bias, labels.flatten(), max(1, rows)
    )
    return total


class _ChunkedLoss(torch.autograd.Function):
    """Of hidden [N, C] and labels [N], `rows` positions at a time. The backward needs log Σ exp [N] of the logits."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        rows: int,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        log_sums = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        for x, y, log_sum in zip(hidden.split(rows), labels.split(rows), log_sums.split(rows), strict=True):
            logits = F.linear(x, weight, bias).float()
            torch.logsumexp(logits, -1, out=log_sum)
            valid = y != IGNORED
            own = logits.gather(-1, y.clamp(min=0)[:, None]).squeeze(-1)
            total += torch.where(valid, log_sum - own, 0.0).sum()
        ctx.save_for_backward(hidden, weight, bias, labels, log_sums)
        ctx.rows = rows
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:  # noqa: ANN401
        hidden, weight, bias, labels, log_sums = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        # Sums over chunks stay in fp32, whatever the weights are in.
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        grad_bias = None if bias is None else torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
        chunks = (t.split(ctx.rows) for t in (hidden, labels, log_sums, grad_hidden))
        for x, y, log_sum, grad_x in zip(*chunks, strict=True):
            # ∂/∂logits of −log p(y) is softmax − onehot(y).
            g = F.linear(x, weight, bias).float().sub_(log_sum[:, None]).exp_()
            valid = y != IGNORED
            g.scatter_add_(-1, y.clamp(min=0)[:, None], torch.full_like(g[:, :1], -1.0))
            g *= torch.where(valid, grad, 0.0)[:, None]
            if grad_bias is not None:
                grad_bias += g.sum(0)
            g = g.to(weight.dtype)
            torch.mm(g, weight, out=grad_x)
            if weight.dtype == torch.float32:
                grad_weight.addmm_(g.T, x)
            else:
                grad_weight += g.T @ x
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), grad_bias, None, None


def count_valid(labels: Tensor) -> int:
    """How many of `labels` [b, T] are targets."""
    return int((labels != IGNORED).sum())
