"""Rank 0's clock as other ranks see it, by ping-pong (Cristian 1989, Probabilistic clock synchronization)."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from .groups.group import Group


@dataclass(frozen=True)
class ClockReading:
    """At `at` of this rank's `time.perf_counter`, rank 0's was `at + offset_s`, up to `± uncertainty_s`."""

    at: float
    offset_s: float = 0.0
    uncertainty_s: float = 0.0


@dataclass(frozen=True)
class Clock:
    """Between two readings the offset is taken to have drifted evenly: quartz is off by up to 50 µs each second."""

    first: ClockReading
    last: ClockReading

    @property
    def uncertainty_s(self) -> float:
        return max(self.first.uncertainty_s, self.last.uncertainty_s)

    def at_rank0(self, at: float) -> float:
        """A moment of this rank's clock, on rank 0's."""
        past = self.last.at - self.first.at
        share = (at - self.first.at) / past if past > 0 else 0.0
        return at + self.first.offset_s + share * (self.last.offset_s - self.first.offset_s)


def read_clock(group: Group | None, timeout_s: float, rounds: int = 8) -> ClockReading:
    """Compare this rank's clock with that of the group's first member; all members call it together.

    Of several rounds the quickest counts: its answer was given at some time within the round trip, so half of that is
    the uncertainty.
    """
    if group is None:
        return ClockReading(time.perf_counter())
    if group.rank == group.members[0]:
        for peer in group.members[1:]:
            for _ in range(rounds):
                _receive(group, peer, timeout_s)
                _send(group, peer, timeout_s)
        return ClockReading(time.perf_counter())
    master, best = group.members[0], None
    for _ in range(rounds):
        start = time.perf_counter()
        _send(group, master, timeout_s)
        there = _receive(group, master, timeout_s)
        end = time.perf_counter()
        reading = ClockReading((start + end) / 2, there - (start + end) / 2, (end - start) / 2)
        if best is None or reading.uncertainty_s < best.uncertainty_s:
            best = reading
    assert best is not None
    return best


def _send(group: Group, to: int, timeout_s: float) -> None:
    now = torch.tensor([time.perf_counter()], dtype=torch.float64)
    group.send(now, to, timeout_s=timeout_s, operation="comparing clocks")


def _receive(group: Group, source: int, timeout_s: float) -> float:
    there = torch.empty(1, dtype=torch.float64)
    group.recv(there, source, timeout_s=timeout_s, operation="comparing clocks")
    return there.item()
