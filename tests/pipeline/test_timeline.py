"""What a timeline tells about its spans, and the trace that a browser reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from farspan.pipeline.timeline import Timeline


@pytest.fixture
def timeline() -> Timeline:
    made = Timeline()
    made.record("forward", "0F0", 10.0, 11.0)
    made.record("send", "0SEND_F0", 11.0, 11.5)
    made.record("forward", "0F1", 11.0, 12.0)
    made.record("backward", "0B0", 15.0, 18.0)
    return made


def test_busy_seconds_and_bubble(timeline: Timeline) -> None:
    assert timeline.seconds == 8.0
    assert timeline.busy(["forward"]) == 2.0
    assert timeline.busy(["forward", "backward"]) == 5.0
    assert timeline.busy(["nothing"]) == 0.0
    assert timeline.bubble(["forward"]) == 1 - 2 / 8
    assert timeline.bubble(["forward", "backward"]) == 1 - 5 / 16
    assert timeline.bubble(iter(["forward", "backward"])) == 1 - 5 / 16


def test_an_empty_timeline_has_no_seconds_and_no_bubble() -> None:
    empty = Timeline()
    assert empty.seconds == 0.0
    assert empty.busy(["forward"]) == 0.0
    assert empty.bubble(["forward"]) == 0.0


def test_the_chrome_trace(timeline: Timeline, tmp_path: Path) -> None:
    path = tmp_path / "traces" / "rank3.json"
    timeline.write_chrome_trace(path, 3, "rank 3", clock_offset_s=100.0)
    trace = json.loads(path.read_text())
    assert trace["displayTimeUnit"] == "ms"
    events = trace["traceEvents"]
    assert {event["pid"] for event in events} == {3}

    named = [event for event in events if event["ph"] == "M"]
    assert [event["args"]["name"] for event in named if event["name"] == "process_name"] == ["rank 3"]
    tracks = {event["args"]["name"]: event["tid"] for event in named if event["name"] == "thread_name"}
    assert tracks.keys() == {"forward", "send", "backward"}
    assert len(set(tracks.values())) == 3

    work = [event for event in events if event["ph"] == "X"]
    assert len(named) + len(work) == len(events)
    assert [(e["name"], e["cat"], e["tid"]) for e in work] == [
        ("0F0", "forward", tracks["forward"]),
        ("0SEND_F0", "send", tracks["send"]),
        ("0F1", "forward", tracks["forward"]),
        ("0B0", "backward", tracks["backward"]),
    ]
    assert [(e["ts"], e["dur"]) for e in work] == [  # microseconds
        (110e6, 1e6),
        (111e6, 0.5e6),
        (111e6, 1e6),
        (115e6, 3e6),
    ]
