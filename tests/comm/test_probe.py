"""The two ends of an edge measure it: every figure is there, and both ends agree on what they exchange."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from farspan.comm import probe as room
from farspan.comm.lanes.lane import ThreadLane
from farspan.comm.probe import EdgeFigures, Probe
from peers import Peer, play

MESSAGE = 200_000


def both_directions(me: Peer) -> list[dict[str, Any]]:
    room._MOST, room._REST_S = 1 << 20, 0.0
    names = ("there", "back", "more 0", "more 1", "more 2")
    there, back, *more = (me.group(name) for name in names)
    lanes = [ThreadLane(name) for name in names[2:]]
    found = []
    for source, target in (me.ranks, me.ranks[::-1]):
        ways = (there, back) if source == me.ranks[0] else (back, there)
        for messages in (0, 3):
            figures = Probe(source, target, *ways, more, lanes, 20.0).measure(MESSAGE, messages)
            if figures is not None:
                found.append(asdict(figures))
    for lane in lanes:
        lane.close()
    for group in (there, back, *more):
        group.close()
    return found


def test_the_source_learns_all_of_its_edge(tmp_path: Path) -> None:
    for found in play(both_directions, (2, 5), tmp_path).values():
        plain, burst = (EdgeFigures(**figures) for figures in found)
        for figures in (plain, burst):
            assert figures.round_trip_s > 0
            assert figures.one_rate > 0
            assert figures.many_rate > 0
            assert figures.connections == 3
        assert (plain.message_bytes, plain.burst_s) == (0, ())
        assert burst.message_bytes == MESSAGE
        assert len(burst.burst_s) == 3 + 1
        assert burst.burst_s[3] == pytest.approx(sum(burst.burst_s[1:3]) / 2)
        assert min(burst.burst_s) >= 0
        assert burst.turn_s > 0


def test_one_group_can_be_both_ways(tmp_path: Path) -> None:
    found = play(around_a_ring, (0, 1), tmp_path)
    assert found[0] > 0
    assert found[1] == 0


def around_a_ring(me: Peer) -> float:
    room._MOST = 1 << 17
    ring, more = me.group("ring"), me.group("more")
    lane = ThreadLane("probe")
    figures = Probe(0, 1, ring, ring, [more], [lane], 20.0).measure()
    lane.close()
    ring.close()
    more.close()
    return figures.many_rate if figures is not None else 0.0


def test_a_message_that_would_take_too_long_is_measured_by_a_shorter_one(tmp_path: Path) -> None:
    assert play(with_a_slow_wire, (0, 1), tmp_path)[0] == [True, True]


def with_a_slow_wire(me: Peer) -> list[bool]:
    """10 GB over a wire that is said to carry 1 MB/s: they must not be sent."""
    room.Probe._rate = lambda self, groups, round_trip: 1e6  # type: ignore[method-assign]
    room.Probe._answer = _answer_bursts  # type: ignore[method-assign]
    there, back = me.group("there"), me.group("back")
    lane = ThreadLane("probe")
    figures = Probe(0, 1, there, back, [], [lane], 20.0).measure(10_000_000_000, 8)
    lane.close()
    there.close()
    back.close()
    if figures is None:
        return []
    return [len(figures.burst_s) == 1 + 1, 9_990 < figures.burst_s[0] == figures.burst_s[1] < 10_010]


def _answer_bursts(self: Probe, messages: int) -> None:
    for _ in range(room._ROUNDS):
        self._hear(self.there)
        self._say(self.back, 0.0)
    for _ in range(3):
        self._answer_burst()
