"""The simulation of a plan: its clock, its bubbles, what the schedules cost on a slow wire, and what it refuses."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
from farspan.pipeline.schedule import Action, Op, Plan, gpipe, live_activations, lower, one_f_one_b, show
from farspan.pipeline.simulate import Costs, PlanError, simulate
from farspan.pipeline.timeline import Timeline
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import bubble

F, B = Op.FORWARD, Op.BACKWARD
many = settings(deadline=None, max_examples=60)
stages_ = st.integers(1, 8)
micro_batches_ = st.integers(1, 16)
ahead_ = st.integers(1, 4)
seconds_ = st.integers(1, 20).map(float)  # whole numbers: sums are exact


def computing(plan: Plan) -> list[str]:
    return [f"stage {stage}" for stage in range(len(plan))]


def run(plan: Plan, **costs: float) -> Timeline:
    return simulate(lower(plan), Costs.even(len(plan), **costs))


def end_of_step(plan: Plan, costs: Costs) -> float:
    """The same question, asked backwards: when can each thing end, given what must have ended before?"""

    @cache
    def done(op: Op, stage: int, mb: int) -> float:
        row = plan[stage]
        at = row.index(Action(op, stage, mb))
        ready = done(*row[at - 1]) if at else 0.0
        source = stage - 1 if op is F else stage + 1
        if 0 <= source < len(plan):
            ready = max(ready, sent(op, source, mb) + costs.delay[min(stage, source)])
        return ready + (costs.forward if op is F else costs.backward)[stage]

    @cache
    def sent(op: Op, stage: int, mb: int) -> float:
        before = [a.mb for a in plan[stage] if a.op is op]
        at = before.index(mb)
        hop = stage if op is F else stage - 1
        return max(done(op, stage, mb), sent(op, stage, before[at - 1]) if at else 0.0) + costs.wire[hop]

    return max(done(*row[-1]) for row in plan)


@st.composite
def priced_plans(draw: st.DrawFn) -> tuple[Plan, Costs]:
    stages, micro_batches = draw(stages_), draw(micro_batches_)
    plan = draw(st.sampled_from([gpipe(stages, micro_batches), one_f_one_b(stages, micro_batches, draw(ahead_))]))

    def each(count: int) -> tuple[float, ...]:
        return tuple(draw(st.lists(seconds_, min_size=count, max_size=count)))

    return plan, Costs(each(stages), each(stages), each(stages - 1), each(stages - 1))


@many
@given(priced_plans())
def test_the_clock_is_that_of_the_longest_path(priced: tuple[Plan, Costs]) -> None:
    plan, costs = priced
    timeline = simulate(lower(plan), costs)
    assert timeline.seconds == end_of_step(plan, costs)
    lanes = {span.lane for span in timeline.spans}
    assert lanes == {*computing(plan)} | {
        name for a, b in pairwise(range(len(plan))) for name in (f"{a}→{b}", f"{b}→{a}")
    }
    for lane in lanes:
        spans = [span for span in timeline.spans if span.lane == lane]
        assert all(a.end <= b.start for a, b in pairwise(spans)), lane


@many
@given(stages_, micro_batches_, ahead_, seconds_, seconds_)
def test_without_a_wire_every_schedule_takes_the_textbooks_time(
    stages: int, micro_batches: int, ahead: int, forward: float, backward: float
) -> None:
    for plan in (gpipe(stages, micro_batches), one_f_one_b(stages, micro_batches, ahead)):
        timeline = run(plan, forward=forward, backward=backward)
        assert timeline.seconds == (micro_batches + stages - 1) * (forward + backward)
        assert bubble(timeline, computing(plan)) == pytest.approx((stages - 1) / (micro_batches + stages - 1))


@many
@given(stages_, micro_batches_, seconds_, seconds_, seconds_)
def test_gpipe_pays_for_a_delay_once_each_way(
    stages: int, micro_batches: int, forward: float, backward: float, delay: float
) -> None:
    timeline = run(gpipe(stages, micro_batches), forward=forward, backward=backward, delay=delay)
    assert timeline.seconds == (micro_batches + stages - 1) * (forward + backward) + 2 * (stages - 1) * delay


@many
@given(st.integers(2, 8), st.integers(1, 15), ahead_, st.integers(0, 3).map(float))
def test_more_micro_batches_shrink_the_bubble(stages: int, micro_batches: int, ahead: int, delay: float) -> None:
    def share(plan: Plan) -> float:
        return bubble(run(plan, delay=delay), computing(plan))

    assert share(gpipe(stages, micro_batches + 1)) < share(gpipe(stages, micro_batches))
    assert share(one_f_one_b(stages, 2 * micro_batches, ahead)) < share(one_f_one_b(stages, micro_batches, ahead))


@pytest.mark.parametrize(
    ("backward", "gpipe_s", "textbook_s"),
    [(2.0, 63.0, 85.0), (1.0, 44.0, 66.0)],  # 35 % and 50 % more
)
def test_a_slow_wire_starves_textbook_1f1b_and_one_more_ahead_feeds_it(
    backward: float, gpipe_s: float, textbook_s: float
) -> None:
    """4 stages, 16 micro-batches, one forward long from one stage to the next."""

    def seconds(plan: Plan) -> float:
        return run(plan, backward=backward, delay=1.0).seconds

    assert seconds(gpipe(4, 16)) == gpipe_s
    assert seconds(one_f_one_b(4, 16)) == textbook_s
    assert seconds(one_f_one_b(4, 16, ahead=2)) == gpipe_s
    assert max(map(live_activations, one_f_one_b(4, 16, ahead=2))) == 7
    assert max(map(live_activations, gpipe(4, 16))) == 16


def test_what_a_message_takes_on_a_narrow_wire() -> None:
    """A message that takes longer to send than to compute: the wire sets the pace, and the next waits for it."""
    timeline = run(gpipe(2, 3), forward=1.0, backward=1.0, wire=5.0, delay=2.0)
    there = [(span.name, span.start, span.end) for span in timeline.spans if span.lane == "0→1"]
    assert there == [("0SEND_F0", 1.0, 6.0), ("0SEND_F1", 6.0, 11.0), ("0SEND_F2", 11.0, 16.0)]
    back = [(span.name, span.start, span.end) for span in timeline.spans if span.lane == "1→0"]
    assert back == [("1SEND_B0", 20.0, 25.0), ("1SEND_B1", 25.0, 30.0), ("1SEND_B2", 30.0, 35.0)]
    assert timeline.seconds == 35.0 + 2.0 + 1.0


def swap(plan: Plan, stage: int, a: int, b: int) -> Plan:
    row = list(plan[stage])
    row[a], row[b] = row[b], row[a]
    return (*plan[:stage], tuple(row), *plan[stage + 1 :])


def test_a_plan_that_deadlocks_is_refused() -> None:
    """Stage 0 wants a gradient before the forward that stage 1 wants first."""
    plan = lower((one_f_one_b(1, 2)[0], gpipe(2, 2)[1]))
    with pytest.raises(PlanError) as caught:
        simulate(plan, Costs.even(2))
    assert str(caught.value) == f"the plan deadlocks at 0RECV_B0, 1RECV_F1:\n{show(plan)}"


@pytest.mark.parametrize("stage", [0, 1])
def test_two_ends_that_disagree_on_the_order_of_messages_are_refused(stage: int) -> None:
    plan = lower(swap(gpipe(2, 3), stage, 0, 1))
    sent, received = ("[1, 0, 2]", "[0, 1, 2]") if stage == 0 else ("[0, 1, 2]", "[1, 0, 2]")
    with pytest.raises(PlanError) as caught:
        simulate(plan, Costs.even(2))
    assert str(caught.value) == f"stage 0 sends {sent} and stage 1 receives {received}:\n{show(plan)}"


@pytest.mark.parametrize("lost", ["0SEND_F1", "1RECV_F1", "1SEND_B0", "0RECV_B0"])
def test_a_plan_that_lost_a_message_is_refused(lost: str) -> None:
    plan = tuple(tuple(action for action in row if str(action) != lost) for row in lower(one_f_one_b(2, 2)))
    with pytest.raises(PlanError, match=r"sends .* and stage . receives") as caught:
        simulate(plan, Costs.even(2))
    assert show(plan) in str(caught.value)
