"""Gradients over replicas, and over the two stages that hold a tied embedding."""

from __future__ import annotations

from torch import Tensor

from ..comm.group import Group
from .gradients import Gradients


class Replicas:
    """Sums a stage's gradients over all replicas, then the tied matrix's over its two stages.

    The order matters: each sum leaves the same bits on all who took part, so doing the pair last leaves the two copies
    of the tied matrix with the same gradient bit for bit, which a sum over replicas after it would not.
    """

    def __init__(
        self, gradients: Gradients, peers: Group | None, tie: Group | None, tied: Tensor | None, timeout_s: float
    ) -> None:
        self._gradients, self._peers, self._tie, self._tied, self._timeout_s = gradients, peers, tie, tied, timeout_s

    def reduce(self) -> None:
        if self._peers is not None:
            _all_reduce(self._peers, self._gradients.flat, self._timeout_s, "summing gradients over replicas")
        if self._tie is not None and self._tied is not None:
            _all_reduce(self._tie, self._tied, self._timeout_s, "summing the tied embedding's gradient")


def _all_reduce(group: Group, x: Tensor, timeout_s: float, operation: str) -> None:
    host = x.cpu()  # the very tensor where it is in host memory already
    group.all_reduce(host, timeout_s=timeout_s, operation=operation)
    if host is not x:
        x.copy_(host)
