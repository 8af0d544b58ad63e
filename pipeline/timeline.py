"""Spans of work by lane, from a simulation and from a real run alike, and counters of the seconds in them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple


class Span(NamedTuple):
    """One piece of work: `start` and `end` in seconds on the timeline's clock.

    `posted`: when a receive began to wait, where that is known apart from its start.
    """

    lane: str
    name: str
    start: float
    end: float
    posted: float | None = None


@dataclass
class Timeline:
    """What happened on the lanes of one rank (a run) or of all stages (a simulation)."""

    spans: deque[Span] | list[Span] = field(default_factory=list)

    def record(self, lane: str, name: str, start: float, end: float) -> None:
        self.spans.append(Span(lane, name, start, end))

    @property
    def seconds(self) -> float:
        return max((s.end for s in self.spans), default=0.0) - min((s.start for s in self.spans), default=0.0)

    def busy(self, lanes: Iterable[str]) -> float:
        """Seconds of work on `lanes`."""
        wanted = set(lanes)
        return sum(s.end - s.start for s in self.spans if s.lane in wanted)


class Meter:
    """Seconds of work by lane, since the start. Cheap enough to be always on; `timeline` keeps each span as well.

    Every lane has one thread that records for it, so none of them needs a lock.
    """

    def __init__(self, timeline: Timeline | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.timeline = timeline

    def record(self, lane: str, name: str, start: float, end: float) -> None:
        """A `Recorder`. Votes are left out of the seconds: what takes time there is waiting for the slowest rank."""
        if name != "vote":
            self.seconds[lane] = self.seconds.get(lane, 0.0) + end - start
        if self.timeline is not None:
            self.timeline.record(lane, name, start, end)
