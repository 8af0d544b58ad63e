"""What a test may do to a rank before it starts: `Run(…, faults={1: partial(inf_gradient, 3)})`."""

from __future__ import annotations

from farspan.pipeline.gradients import Gradients


def inf_gradient(updates: int) -> None:
    """After `updates` updates, one gradient of this rank is inf for one update."""
    real, seen = Gradients.zero, []

    def zero(self: Gradients) -> None:
        real(self)
        if len(seen) == updates:
            self.flat[5] = float("inf")
        seen.append(None)

    Gradients.zero = zero  # type: ignore[method-assign]
