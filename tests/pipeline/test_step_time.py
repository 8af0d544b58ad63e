"""Simulated steps against times worked out by hand, and edges with TCP's ways."""

from __future__ import annotations

import pytest
from farspan.pipeline.schedule import gpipe, lower, one_f_one_b
from farspan.pipeline.simulate import Costs, Wire, simulate
from farspan.pipeline.step_time import Sum, repeated, step_time


def arrivals(wire: Wire, micro_batches: int, forward: float) -> list[float]:
    """When stage 1 starts each forward, which takes it no time."""
    costs = Costs((forward, 0.0), (0.0, 0.0), wires={(0, 1): wire, (1, 0): Wire((0.0,))})
    spans = simulate(lower(gpipe(2, micro_batches)), costs).spans
    return [span.start for span in spans if span.lane == "stage 1" and "F" in span.name]


def test_messages_in_a_row_take_what_their_place_says() -> None:
    assert arrivals(Wire((5.0, 2.0, 1.0), delay=10.0), 4, 0.0) == [15.0, 17.0, 18.0, 19.0]


def test_the_next_message_waits_for_its_turn() -> None:
    assert arrivals(Wire((1.0,), delay=3.0, turn=6.0), 3, 0.0) == [4.0, 11.0, 18.0]


def test_after_a_rest_the_row_begins_anew() -> None:
    wire = Wire((5.0, 1.0), rest=2.0)
    assert arrivals(wire, 3, 4.0) == [9.0, 10.0, 13.0]  # ready at 4, 8, 12: the wire rests from 10 to 12
    assert arrivals(wire, 3, 8.5) == [13.5, 22.0, 30.5]  # … from 13.5 to 17, and so on


def test_each_direction_has_its_own_edge() -> None:
    costs = Costs((1.0, 1.0), (2.0, 2.0), wires={(0, 1): Wire((10.0,), 1.0), (1, 0): Wire((100.0,), 2.0)})
    assert step_time(gpipe(2, 1), [costs]).pipeline == 1 + 11 + 1 + 2 + 102 + 2


def test_a_step_is_its_parts() -> None:
    costs = Costs.even(1, forward=1.0, backward=2.0)
    step = step_time(gpipe(1, 4), [costs], accumulate=2, vote=0.5, optimizer=[0.25], feed=3.0)
    assert (step.pipeline, step.sums, step.vote, step.optimizer) == (24.0, 0.0, 0.5, 0.25)
    assert step.seconds == 24.75
    assert step.bubble == pytest.approx(1 - 24.25 / 24.75)
    assert step_time(gpipe(1, 4), [costs], feed=100.0).seconds == 100.0


def test_buckets_are_summed_behind_the_last_backward() -> None:
    costs = Costs.even(1, forward=1.0, backward=4.0)  # ends at 5; four buckets are full at 2, 3, 4 and 5
    assert step_time(gpipe(1, 1), [costs] * 2, sums=[Sum((0.5,) * 4)]).sums == 0.5
    assert step_time(gpipe(1, 1), [costs] * 2, sums=[Sum((2.0,) * 4)]).sums == 5.0
    assert step_time(gpipe(1, 1), [costs] * 2, sums=[Sum((1.0,), spread=3.0)], optimizer=[0.5]).seconds == 5 + 1 + 3.5


def test_the_slowest_replica_holds_up_the_others_and_the_tied_pair_waits_for_both_ends() -> None:
    fast, slow = Costs.even(2, forward=1.0, backward=2.0), Costs.even(2, forward=2.0, backward=2.0)
    alone = [step_time(gpipe(2, 2), [costs]).pipeline for costs in (fast, slow)]
    assert alone == [9.0, 12.0]
    both = step_time(gpipe(2, 2), [fast, slow], sums=[Sum((1.0,)), Sum((1.0,))])
    assert (both.pipeline, both.sums) == (12.0, 1.0)
    assert step_time(gpipe(2, 2), [fast], tie=4.0).sums == 4.0


def test_repeating_a_plan_numbers_its_micro_batches_on() -> None:
    for plan in (gpipe(3, 4), one_f_one_b(3, 4)):
        twice = repeated(plan, 2)
        assert sorted({action.mb for action in twice[1]}) == list(range(8))
        assert [action.op for action in twice[2]] == 2 * [action.op for action in plan[2]]
