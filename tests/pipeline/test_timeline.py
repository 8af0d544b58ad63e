"""What a timeline tells about its spans, and the seconds that a meter counts."""

from __future__ import annotations

import pytest
from farspan.pipeline.timeline import Meter, Timeline


@pytest.fixture
def timeline() -> Timeline:
    made = Timeline()
    made.record("forward", "0F0", 10.0, 11.0)
    made.record("send", "0SEND_F0", 11.0, 11.5)
    made.record("forward", "0F1", 11.0, 12.0)
    made.record("backward", "0B0", 15.0, 18.0)
    return made


def test_busy_seconds(timeline: Timeline) -> None:
    assert timeline.seconds == 8.0
    assert timeline.busy(["forward"]) == 2.0
    assert timeline.busy(["forward", "backward"]) == 5.0
    assert timeline.busy(["nothing"]) == 0.0
    assert timeline.busy(iter(["forward", "backward"])) == 5.0


def test_an_empty_timeline_has_no_seconds() -> None:
    empty = Timeline()
    assert empty.seconds == 0.0
    assert empty.busy(["forward"]) == 0.0


def test_a_meter_counts_seconds_by_lane_and_leaves_votes_out() -> None:
    timeline = Timeline()
    for meter in (Meter(), Meter(timeline)):
        meter.record("forward", "0F0", 1.0, 1.5)
        meter.record("forward", "0F1", 2.0, 2.25)
        meter.record("gradients", "reduce", 3.0, 4.0)
        meter.record("gradients", "vote", 4.0, 9.0)
        assert meter.seconds == {"forward": 0.75, "gradients": 1.0}
    assert [span.name for span in timeline.spans] == ["0F0", "0F1", "reduce", "vote"]
