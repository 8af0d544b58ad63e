"""What a test may do to a rank before it starts: `Run(…, faults={1: partial(inf_gradient, 3)})`."""

from __future__ import annotations

import time
from typing import Any

from farspan.pipeline.gradients import Gradients
from farspan.pipeline.stage import Stage
from torch import Tensor


def inf_gradient(updates: int) -> None:
    """After `updates` updates, one gradient of this rank is inf for one update."""
    real, seen = Gradients.zero, []

    def zero(self: Gradients) -> None:
        real(self)
        if len(seen) == updates:
            self.flat[5] = float("inf")
        seen.append(None)

    Gradients.zero = zero  # type: ignore[method-assign]


def slow_forward(seconds: float) -> None:
    """The first forward of this rank's stage takes so long."""
    real, seen = Stage.forward, []

    def forward(self: Stage, *args: Any) -> Tensor:  # noqa: ANN401 - whatever it is given
        if not seen:
            seen.append(None)
            time.sleep(seconds)
        return real(self, *args)

    Stage.forward = forward  # type: ignore[method-assign]
