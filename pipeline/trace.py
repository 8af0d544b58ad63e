"""All ranks' spans on one clock, as a Chrome/Perfetto trace (Trace Event Format, JSON object)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .timeline import Span

KINDS = ("receive", "forward", "send", "backward", "gradients", "optimizer", "data")
"""In the order in which a rank's lanes are shown; anything else is "data"."""


@dataclass(frozen=True)
class RankSpans:
    """What one rank did, in seconds of rank 0's clock, exact up to `± uncertainty_s`."""

    rank: int
    replica: int
    stage: int
    spans: list[Span]
    uncertainty_s: float = 0.0


def kind_of(lane: str) -> str:
    """ "forward receive" → "receive", "tokens→3" → "data"."""
    last = lane.rpartition(" ")[2]
    return last if last in KINDS else "data"


def show_transfers(ranks: Sequence[RankSpans]) -> list[RankSpans]:
    """Let each receive start when its sender did. As recorded, it starts when it was posted, long before.

    The messages of an edge arrive in the order in which they were sent, and none is under way at the end.
    """
    by_place = {(r.replica, r.stage): r for r in ranks}
    shown = []
    for r in ranks:
        sent_at: dict[int, float] = {}  # position in r.spans → start at the sender
        for lane, sender in (("forward", r.stage - 1), ("backward", r.stage + 1)):
            if (r.replica, sender) in by_place:
                sends = [s for s in by_place[r.replica, sender].spans if s.lane == f"{lane} send"]
                receives = [i for i, s in enumerate(r.spans) if s.lane == f"{lane} receive"]
                # From the end, since a recording may lack its beginning.
                pairs = zip(reversed(receives), reversed(sends), strict=False)
                sent_at |= {i: send.start for i, send in pairs}
        spans = list(r.spans)
        for i, sent in sent_at.items():
            s = spans[i]
            spans[i] = s._replace(start=min(max(s.start, sent), s.end), posted=s.start)
        shown.append(replace(r, spans=spans))
    return shown


def chrome_trace(ranks: Sequence[RankSpans], metadata: dict[str, Any]) -> dict[str, Any]:
    """A process a rank, a track a lane, times from the first span on. `metadata` goes to "otherData"."""
    zero = min((s.start for r in ranks for s in r.spans), default=0.0)
    events = [event for r in ranks for event in _events(r, zero)]
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": metadata}


def _events(r: RankSpans, zero: float) -> Iterator[dict[str, Any]]:
    def meta(what: str, tid: int = 0, **args: object) -> dict[str, Any]:
        return {"ph": "M", "name": what, "pid": r.rank, "tid": tid, "args": args}

    yield meta("process_name", name=f"rank {r.rank}: replica {r.replica}, stage {r.stage}")
    yield meta("process_labels", labels=f"clock ± {r.uncertainty_s * 1e6:.0f} µs")
    yield meta("process_sort_index", sort_index=r.rank)
    lanes = sorted({s.lane for s in r.spans}, key=lambda lane: (KINDS.index(kind_of(lane)), lane != "data", lane))
    tracks = {lane: tid for tid, lane in enumerate(lanes)}
    for lane, tid in tracks.items():
        yield meta("thread_name", tid, name=lane)
        yield meta("thread_sort_index", tid, sort_index=tid)
    for s in r.spans:
        yield {
            "ph": "X",
            "name": s.name,
            "cat": kind_of(s.lane),
            "pid": r.rank,
            "tid": tracks[s.lane],
            "ts": round((s.start - zero) * 1e6, 3),
            "dur": round((s.end - s.start) * 1e6, 3),
            **({"args": {"posted": round((s.posted - zero) * 1e6, 3)}} if s.posted is not None else {}),
        }
