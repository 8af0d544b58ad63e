"""The trace that a browser reads: one process a rank, lanes in order, receives as long as their transfers."""

from __future__ import annotations

import json

import pytest
from farspan.pipeline.timeline import Span
from farspan.pipeline.trace import KINDS, RankSpans, chrome_trace, kind_of, show_transfers

FIRST = [
    Span("optimizer", "update 1", 18.0, 19.0),
    Span("gradients", "reduce", 17.0, 18.0),
    Span("forward", "0F0", 10.0, 11.0),
    Span("forward send", "activations", 11.0, 11.5),
    Span("forward", "0F1", 11.0, 12.0),
    Span("forward send", "activations", 12.0, 12.5),
    Span("backward receive", "gradients", 10.0, 15.0),
    Span("backward", "0B0", 15.0, 16.0),
    Span("tokens→1", "data", 9.0, 9.5),
]
LAST = [
    Span("forward receive", "activations", 9.5, 11.6),
    Span("forward receive", "activations", 11.7, 12.5),
    Span("backward send", "gradients", 14.0, 14.9),
]
RANKS = [RankSpans(0, 0, 0, FIRST), RankSpans(1, 0, 1, LAST, 25e-6)]


@pytest.mark.parametrize(
    ("lane", "kind"),
    [("forward receive", "receive"), ("backward send", "send"), ("backward", "backward"), ("tokens→3", "data")],
)
def test_kinds(lane: str, kind: str) -> None:
    assert kind_of(lane) == kind


def test_receives_start_with_their_transfer_and_not_when_they_were_posted() -> None:
    first, last = show_transfers(RANKS)
    assert [s.start for s in last.spans if s.lane == "forward receive"] == [11.0, 12.0]
    assert [s.start for s in first.spans if s.lane == "backward receive"] == [14.0]
    assert [s.posted for s in last.spans] == [9.5, 11.7, None]
    assert [s.end for s in last.spans] == [s.end for s in LAST]
    assert [s for s in first.spans if "receive" not in s.lane] == [s for s in FIRST if "receive" not in s.lane]


def test_a_recording_that_lacks_its_beginning_is_matched_from_the_end() -> None:
    without = [s for s in FIRST if s.name != "0F0"][:2] + FIRST[4:]
    _, last = show_transfers([RankSpans(0, 0, 0, without), RANKS[1]])
    assert [s.start for s in last.spans if s.lane == "forward receive"] == [9.5, 12.0]


def test_clocks_that_disagree_never_turn_a_span_around() -> None:
    late = [s._replace(start=s.start + 5, end=s.end + 5) for s in FIRST]
    _, last = show_transfers([RankSpans(0, 0, 0, late), RANKS[1]])
    assert all(s.start <= s.end for s in last.spans)


def test_the_chrome_trace() -> None:
    trace = json.loads(json.dumps(chrome_trace(RANKS, {"clock": "rank 0"})))
    assert trace["otherData"] == {"clock": "rank 0"}
    events = trace["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1}
    meta = [event for event in events if event["ph"] == "M"]
    names = {event["pid"]: event["args"]["name"] for event in meta if event["name"] == "process_name"}
    assert names == {0: "rank 0: replica 0, stage 0", 1: "rank 1: replica 0, stage 1"}
    labels = {event["pid"]: event["args"]["labels"] for event in meta if event["name"] == "process_labels"}
    assert labels[1] == "clock ± 25 µs"
    tracks = {(e["pid"], e["args"]["name"]): e["tid"] for e in meta if e["name"] == "thread_name"}
    order = [kind_of(lane) for (pid, lane), _ in sorted(tracks.items(), key=lambda item: item[1]) if pid == 0]
    assert order == sorted(order, key=KINDS.index)
    assert {e["args"]["sort_index"] for e in meta if e["name"] == "thread_sort_index"} == set(tracks.values())

    work = [event for event in events if event["ph"] == "X"]
    assert len(work) == len(FIRST) + len(LAST)
    (forward,) = (e for e in work if e["name"] == "0F0")
    # From the earliest span, in microseconds.
    assert (forward["ts"], forward["dur"], forward["cat"]) == (1e6, 1e6, "forward")
    assert forward["tid"] == tracks[0, "forward"]


def test_an_empty_trace_is_one_too() -> None:
    assert chrome_trace([], {})["traceEvents"] == []
