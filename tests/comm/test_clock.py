"""Clocks of ranks, compared by ping-pong."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from farspan.comm.clock import Clock, ClockReading, read_clock
from peers import Peer, play


def compare(peer: Peer) -> tuple[float, float]:
    shift = 1000.0 * peer.rank
    original = time.perf_counter
    time.perf_counter = lambda: original() + shift  # this process's clock, as on another machine
    group = peer.group("clocks")
    reading = read_clock(group, 20.0)
    group.close()
    return reading.offset_s + shift, reading.uncertainty_s


def test_offsets_are_found_within_their_uncertainty(tmp_path: Path) -> None:
    """Processes of one machine share a clock; each is given a shift, which the comparison must find."""
    for rank, (error_s, uncertainty_s) in play(compare, (0, 1, 2), tmp_path).items():
        assert abs(error_s) <= uncertainty_s + 1e-9
        assert (uncertainty_s > 0) == (rank > 0)
        assert uncertainty_s < 1.0


def test_drift_between_two_readings_is_taken_to_be_even() -> None:
    clock = Clock(ClockReading(100.0, 5.0, 1e-4), ClockReading(200.0, 7.0, 3e-4))
    assert [clock.at_rank0(at) for at in (100.0, 150.0, 200.0)] == [105.0, 156.0, 207.0]
    assert clock.uncertainty_s == 3e-4
    once = ClockReading(100.0, 5.0)
    assert Clock(once, once).at_rank0(90.0) == 95.0


def test_alone_there_is_one_clock() -> None:
    reading = read_clock(None, 1.0)
    assert (reading.offset_s, reading.uncertainty_s) == (0.0, 0.0)
    assert reading.at == pytest.approx(time.perf_counter(), abs=60)
