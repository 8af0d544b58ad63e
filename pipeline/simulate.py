"""Run a plan on paper: refuse one that is wrong or deadlocks, and tell how long a step should take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from .schedule import Action, Op, Plan, show, trains
from .timeline import Timeline


class PlanError(ValueError):
    """A plan that cannot run; the message shows the plan and where it stands still."""


@dataclass(frozen=True)
class Wire:
    """One directed edge, in seconds.

    The k-th message in a row takes `burst[k]` of the wire (the later ones as long as the last of these); after `rest`
    of silence the row begins anew, since TCP does. It arrives `delay` later. For `turn` after a message the next one
    has to wait, until the receiver has said that it is ready.
    """

    burst: tuple[float, ...]
    delay: float = 0.0
    turn: float = 0.0
    rest: float = float("inf")


@dataclass(frozen=True)
class Costs:
    """Seconds of one micro-batch: `forward`, `backward` by stage; `wire` (size ÷ rate), `delay` (one way) by hop.

    `wires` has what is known better of an edge (from stage, to stage).
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    wire: tuple[float, ...] = ()
    delay: tuple[float, ...] = ()
    wires: Mapping[tuple[int, int], Wire] = field(default_factory=dict)

    def edge(self, stage: int, to: int) -> Wire:
        hop = min(stage, to)
        return self.wires.get((stage, to)) or Wire((self.wire[hop],), self.delay[hop])

    @classmethod
    def even(
        cls, stages: int, forward: float = 1.0, backward: float = 2.0, wire: float = 0.0, delay: float = 0.0
    ) -> Costs:
        """The same costs on every stage and hop."""
        hops = max(stages - 1, 0)
        return cls((forward,) * stages, (backward,) * stages, (wire,) * hops, (delay,) * hops)


_PARTNER = {Op.RECV_F: (Op.SEND_F, -1), Op.RECV_B: (Op.SEND_B, +1)}


def validate(plan: Plan, micro_batches: int, *, backward: bool = True) -> None:
    """Every micro-batch forward once and backward once on every stage, backward last, each action in its own row.

    Without `backward`, the plan is an evaluation's and must have none. Raises `PlanError`.
    """
    for stage, row in enumerate(plan):
        if any(action.stage != stage for action in row):
            raise PlanError(f"row {stage} has an action of another stage:\n{show(plan)}")
        if not backward and trains(row):
            raise PlanError(f"stage {stage} has a backward, in a plan that is forward only:\n{show(plan)}")
        for op in (Op.FORWARD, Op.BACKWARD) if backward else (Op.FORWARD,):
            counts = Counter(action.mb for action in row if action.op is op)
            if counts != Counter(range(micro_batches)):
                raise PlanError(f"stage {stage} must run {op.value} once for each of {micro_batches}:\n{show(plan)}")
        for mb in range(micro_batches) if backward else ():
            if row.index(Action(Op.BACKWARD, stage, mb)) < row.index(Action(Op.FORWARD, stage, mb)):
                raise PlanError(f"{stage}B{mb} comes before {stage}F{mb}:\n{show(plan)}")


def simulate(plan: Plan, costs: Costs) -> Timeline:
    """Walk a lowered plan as the executor does: computing in the row's order, sends and receives on lanes of their own.

    The spans' lanes are `stage N` for computing and `N→M` for the wire. Raises `PlanError` for a plan that stands
    still, or whose two ends of an edge disagree on the order of messages.
    """
    _check_wire_order(plan)
    timeline = Timeline()
    cursor = [0] * len(plan)
    clock = [0.0] * len(plan)
    in_a_row: dict[tuple[int, int], tuple[int, float]] = {}  # messages so far, and when the last one had left
    arrived: dict[Action, float] = {}
    moved = True
    while moved:
        moved = False
        for stage, row in enumerate(plan):
            while cursor[stage] < len(row):
                op, _, mb = action = row[cursor[stage]]
                if op in _PARTNER:
                    sending, step = _PARTNER[op]
                    sent = Action(sending, stage + step, mb)
                    if sent not in arrived:
                        break
                    clock[stage] = max(clock[stage], arrived[sent])
                elif op in (Op.SEND_F, Op.SEND_B):
                    to = stage + 1 if op is Op.SEND_F else stage - 1
                    wire = costs.edge(stage, to)
                    count, left = in_a_row.get((stage, to), (0, float("-inf")))
                    start = max(clock[stage], left + wire.turn)
                    if start - left > wire.rest:
                        count = 0
                    left = start + wire.burst[min(count, len(wire.burst) - 1)]
                    in_a_row[stage, to] = count + 1, left
                    arrived[action] = left + wire.delay
                    timeline.record(f"{stage}→{to}", str(action), start, left)
                else:
                    seconds = (costs.forward if op is Op.FORWARD else costs.backward)[stage]
                    timeline.record(f"stage {stage}", str(action), clock[stage], clock[stage] + seconds)
                    clock[stage] += seconds
                cursor[stage] += 1
                moved = True
    stuck = [str(row[at]) for row, at in zip(plan, cursor, strict=True) if at < len(row)]
    if stuck:
        raise PlanError(f"the plan deadlocks at {', '.join(stuck)}:\n{show(plan)}")
    return timeline


def _check_wire_order(plan: Plan) -> None:
    for receiving, (sending, step) in _PARTNER.items():
        for stage, row in enumerate(plan):
            want = [a.mb for a in row if a.op is receiving]
            source = stage + step
            sent = [a.mb for a in plan[source] if a.op is sending] if 0 <= source < len(plan) else []
            if want != sent:
                raise PlanError(f"stage {source} sends {sent} and stage {stage} receives {want}:\n{show(plan)}")
