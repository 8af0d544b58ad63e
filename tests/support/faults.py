"""What a test may do to a rank before it starts: `Run(…, faults={1: partial(inf_gradient, 3)})`."""

from __future__ import annotations

from farspan.pipeline.replicas import Replicas


def inf_gradient(reductions: int) -> None:
    """After `reductions` sums over replicas, put an inf into this rank's own gradients before the next one."""
    real, seen = Replicas.reduce, []

    def reduce(self: Replicas) -> None:
        if len(seen) == reductions:
            self._gradients.flat[5] = float("inf")
        seen.append(None)
        real(self)

    Replicas.reduce = reduce  # type: ignore[method-assign]
