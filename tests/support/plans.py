"""What schedules promise, to be compared with what their plans and simulations do."""

from __future__ import annotations

from collections.abc import Sequence

from farspan.pipeline.timeline import Timeline


def live_bound(stages: int, stage: int, micro_batches: int, ahead: int = 1) -> int:
    """The most activations that `one_f_one_b` keeps alive at `stage`."""
    return min(micro_batches, (stages - 1 - stage) * ahead + 1)


def bubble(timeline: Timeline, lanes: Sequence[str]) -> float:
    """The share of time, 0 to 1, in which the computing `lanes` had nothing to compute."""
    return 1 - timeline.busy(lanes) / (len(lanes) * timeline.seconds)
