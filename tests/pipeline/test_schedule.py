"""Plans: what they are, what they hold in memory, and that torch's own checker finds nothing wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
from farspan.pipeline.schedule import (
    Action,
    Op,
    Plan,
    forward_only,
    gpipe,
    live_activations,
    lower,
    one_f_one_b,
    show,
)
from farspan.pipeline.simulate import Costs, PlanError, simulate, validate
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from plans import live_bound
from torch.distributed.pipelining import schedules as torchs

GPIPE = """\
0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3
1F0 1F1 1F2 1F3 1B0 1B1 1B2 1B3
2F0 2F1 2F2 2F3 2B0 2B1 2B2 2B3"""

ONE_F_ONE_B = """\
0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3
1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3
2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3"""

TWO_AHEAD = """\
0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3
1F0 1F1 1F2 1B0 1F3 1B1 1B2 1B3
2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3"""

LOWERED = """\
0F0 0SEND_F0 0RECV_B0 0B0
1RECV_F0 1F0 1SEND_F0 1RECV_B0 1B0 1SEND_B0
2RECV_F0 2F0 2B0 2SEND_B0"""

stages_ = st.integers(1, 8)
micro_batches_ = st.integers(1, 16)
ahead_ = st.integers(1, 4)
plans = st.one_of(
    st.builds(gpipe, stages_, micro_batches_), st.builds(one_f_one_b, stages_, micro_batches_, ahead=ahead_)
)
many = settings(deadline=None, max_examples=60)


def micro_batches_of(plan: Plan) -> int:
    return len(plan[0]) // 2


def in_torchs_words(plan: Plan) -> dict[int, list[torchs._Action]]:
    return {stage: [torchs._Action.from_str(str(action)) for action in row] for stage, row in enumerate(plan)}


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (gpipe(3, 4), GPIPE),
        (one_f_one_b(3, 4), ONE_F_ONE_B),
        (one_f_one_b(3, 4, ahead=2), TWO_AHEAD),
        (lower(gpipe(3, 1)), LOWERED),
        (lower(gpipe(1, 2)), "0F0 0F1 0B0 0B1"),
        (forward_only(2, 3), "0F0 0F1 0F2\n1F0 1F1 1F2"),
        (lower(forward_only(3, 1)), "0F0 0SEND_F0\n1RECV_F0 1F0 1SEND_F0\n2RECV_F0 2F0"),
    ],
)
def test_the_plans_of_the_books(plan: Plan, text: str) -> None:
    assert show(plan) == text


@many
@given(stages_, micro_batches_, ahead_)
def test_every_plan_is_whole_and_runs_within_its_memory(stages: int, micro_batches: int, ahead: int) -> None:
    eager, lean = gpipe(stages, micro_batches), one_f_one_b(stages, micro_batches, ahead)
    for plan in (eager, lean):
        assert len(plan) == stages
        validate(plan, micro_batches)
        validate(lower(plan), micro_batches)
        computed = {span.name for span in simulate(lower(plan), Costs.even(stages)).spans if "→" not in span.lane}
        assert computed == {str(action) for row in plan for action in row}
    assert [live_activations(row) for row in eager] == [micro_batches] * stages
    assert [live_activations(row) for row in lean] == [
        live_bound(stages, stage, micro_batches, ahead) for stage in range(stages)
    ]


@many
@given(stages_, micro_batches_)
def test_an_evaluations_plan_fills_the_pipeline_once(stages: int, micro_batches: int) -> None:
    plan = forward_only(stages, micro_batches)
    validate(plan, micro_batches, backward=False)
    timeline = simulate(lower(plan), Costs.even(stages))
    assert timeline.seconds == stages - 1 + micro_batches  # one second a forward
    with pytest.raises(PlanError, match="must run B once"):
        validate(plan, micro_batches)
    with pytest.raises(PlanError, match="stage 0 has a backward"):
        validate(gpipe(stages, micro_batches), micro_batches, backward=False)
    with pytest.raises(PlanError, match="must run F once"):
        validate(plan, micro_batches + 1, backward=False)


def test_how_much_one_f_one_b_keeps_alive() -> None:
    assert [live_bound(4, stage, 16) for stage in range(4)] == [4, 3, 2, 1]
    assert [live_bound(4, stage, 16, ahead=2) for stage in range(4)] == [7, 5, 3, 1]
    assert [live_bound(4, stage, 2, ahead=2) for stage in range(4)] == [2, 2, 2, 1]


@many
@given(stages_, st.integers(0, 8))
def test_torch_plans_the_same(stages: int, more: int) -> None:
    """For 1F1B all rows but the last, where torch's drawing (not its run) counts micro-batches from 1."""
    micro_batches = stages + more  # torch's 1F1B takes no fewer
    sizes = SimpleNamespace(_num_stages=stages, _n_microbatches=micro_batches)

    def theirs(kind: type) -> list[str]:
        order = kind._get_pipeline_order(sizes)
        computing = [[a for a in order[rank] if a is not None and a.is_compute_op] for rank in range(stages)]
        return [" ".join(map(str, row)) for row in computing]

    assert show(gpipe(stages, micro_batches)).splitlines() == theirs(torchs.ScheduleGPipe)
    assert show(one_f_one_b(stages, micro_batches)).splitlines()[:-1] == theirs(torchs.Schedule1F1B)[:-1]


@many
@given(plans)
def test_torch_reads_and_accepts_every_plan(plan: Plan) -> None:
    stages, lowered = len(plan), lower(plan)
    read = in_torchs_words(lowered)
    assert [" ".join(map(str, read[stage])) for stage in range(stages)] == show(lowered).splitlines()

    computing = in_torchs_words(plan)
    placed = torchs._validate_schedule(computing, stages, stages, micro_batches_of(plan))
    assert placed == {stage: stage for stage in range(stages)}
    ran = torchs._simulate_comms_compute(read, lambda stage: stage, stages)
    assert [[str(a) for a in ran[stage] if a is not None] for stage in range(stages)] == [
        [str(a) for a in row] for row in lowered
    ]


@many
@given(plans)
def test_torch_sends_the_same_messages_in_the_same_order(plan: Plan) -> None:
    stages = len(plan)
    theirs = torchs._add_send_recv(in_torchs_words(plan), lambda stage: stage, stages)
    for stage, row in enumerate(lower(plan)):
        for receiving in ("RECV_F", "RECV_B"):
            assert [str(a) for a in row if a.op.value == receiving] == [
                str(a) for a in theirs[stage] if a.computation_type.value == receiving
            ]
        assert [str(a) for a in row if "RECV" not in a.op.value] == [
            str(a) for a in theirs[stage] if "RECV" not in a.computation_type.value
        ]


@st.composite
def plans_in_wire_order(draw: st.DrawFn) -> Plan:
    """Each stage takes forwards in order and backwards in order, and mixes the two as it likes."""
    stages, micro_batches = draw(st.integers(2, 4)), draw(st.integers(1, 4))
    rows = []
    for stage in range(stages):
        row: list[Action] = []
        forwards = backwards = 0
        while backwards < micro_batches:
            can = [forwards < micro_batches, backwards < forwards]
            if all(can):
                can[draw(st.integers(0, 1))] = False
            row.append(Action(Op.FORWARD, stage, forwards) if can[0] else Action(Op.BACKWARD, stage, backwards))
            forwards, backwards = forwards + can[0], backwards + can[1]
        rows.append(tuple(row))
    return tuple(rows)


def runs(check: Callable[[], object], error: type[Exception]) -> bool:
    try:
        check()
    except error:
        return False
    return True


@settings(deadline=None, max_examples=100)
@given(plans_in_wire_order())
@example(one_f_one_b(2, 2))
@example((one_f_one_b(1, 2)[0], gpipe(2, 2)[1]))
def test_torch_agrees_on_which_plans_deadlock(plan: Plan) -> None:
    validate(plan, micro_batches_of(plan))
    ours = runs(lambda: simulate(lower(plan), Costs.even(len(plan))), PlanError)
    read = in_torchs_words(lower(plan))
    assert ours == runs(lambda: torchs._simulate_comms_compute(read, lambda stage: stage, len(plan)), ValueError)


def test_both_verdicts_of_the_comparison_occur() -> None:
    stuck = (one_f_one_b(1, 2)[0], gpipe(2, 2)[1])
    assert show(stuck) == "0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1"
    assert not runs(lambda: simulate(lower(stuck), Costs.even(2)), PlanError)
    assert runs(lambda: simulate(lower(gpipe(2, 2)), Costs.even(2)), PlanError)


@given(plans, st.data())
@settings(deadline=None, max_examples=60)
def test_a_plan_that_lacks_or_doubles_an_action_is_refused(plan: Plan, data: st.DataObject) -> None:
    stage = data.draw(st.integers(0, len(plan) - 1))
    at = data.draw(st.integers(0, len(plan[stage]) - 1))
    row = plan[stage]
    for broken_row in (row[:at] + row[at + 1 :], (*row, row[at])):
        broken = (*plan[:stage], broken_row, *plan[stage + 1 :])
        with pytest.raises(PlanError) as caught:
            validate(broken, micro_batches_of(plan))
        assert f"stage {stage} must run {row[at].op.value} once" in str(caught.value)
        assert show(broken) in str(caught.value)


@given(plans, st.data())
@settings(deadline=None, max_examples=60)
def test_a_backward_before_its_forward_is_refused(plan: Plan, data: st.DataObject) -> None:
    stage = data.draw(st.integers(0, len(plan) - 1))
    mb = data.draw(st.integers(0, micro_batches_of(plan) - 1))
    forward, backward = Action(Op.FORWARD, stage, mb), Action(Op.BACKWARD, stage, mb)
    swap = {forward: backward, backward: forward}
    broken = tuple(tuple(swap.get(action, action) for action in row) for row in plan)
    with pytest.raises(PlanError) as caught:
        validate(broken, micro_batches_of(plan))
    assert f"{stage}B{mb} comes before {stage}F{mb}" in str(caught.value)
    assert show(broken) in str(caught.value)


@given(plans, st.data())
@settings(deadline=None, max_examples=60)
def test_a_row_of_another_stage_is_refused(plan: Plan, data: st.DataObject) -> None:
    assume(len(plan) > 1)
    a, b = sorted(data.draw(st.sets(st.integers(0, len(plan) - 1), min_size=2, max_size=2)))
    broken = (*plan[:a], plan[b], *plan[a + 1 : b], plan[a], *plan[b + 1 :])
    with pytest.raises(PlanError) as caught:
        validate(broken, micro_batches_of(plan))
    assert f"row {a} has an action of another stage" in str(caught.value)
    assert show(broken) in str(caught.value)


def test_too_few_micro_batches_are_refused() -> None:
    with pytest.raises(PlanError, match="stage 0 must run F once for each of 3"):
        validate(gpipe(2, 2), 3)
