"""Spans of work by lane, from a simulation and from a real run alike, and the trace that a browser shows."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Span:
    """One piece of work: `start` and `end` in seconds on the timeline's clock."""

    lane: str
    name: str
    start: float
    end: float


@dataclass
class Timeline:
    """What happened on the lanes of one rank (a run) or of all stages (a simulation)."""

    spans: list[Span] = field(default_factory=list)

    def record(self, lane: str, name: str, start: float, end: float) -> None:
        self.spans.append(Span(lane, name, start, end))

    @property
    def seconds(self) -> float:
        return max((s.end for s in self.spans), default=0.0) - min((s.start for s in self.spans), default=0.0)

    def busy(self, lanes: Iterable[str]) -> float:
        """Seconds of work on `lanes`."""
        wanted = set(lanes)
        return sum(s.end - s.start for s in self.spans if s.lane in wanted)

    def bubble(self, lanes: Iterable[str]) -> float:
        """The share of time, 0 to 1, in which the computing `lanes` had nothing to compute."""
        wanted = list(lanes)
        return 1 - self.busy(wanted) / (len(wanted) * self.seconds) if wanted and self.seconds else 0.0

    def write_chrome_trace(self, path: Path, pid: int, process: str, clock_offset_s: float = 0.0) -> None:
        """Write Chrome/Perfetto JSON, one track a lane. `clock_offset_s` is added to all times."""
        tracks = {lane: tid for tid, lane in enumerate(dict.fromkeys(s.lane for s in self.spans))}
        events: list[dict] = [{"ph": "M", "name": "process_name", "pid": pid, "args": {"name": process}}]
        events += [
            {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": lane}}
            for lane, tid in tracks.items()
        ]
        events += [
            {
                "ph": "X",
                "name": s.name,
                "cat": s.lane,
                "pid": pid,
                "tid": tracks[s.lane],
                "ts": (s.start + clock_offset_s) * 1e6,
                "dur": (s.end - s.start) * 1e6,
            }
            for s in self.spans
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
