"""Pipeline schedules as data: who computes what, and when.

A plan has one row a stage; a row is the order in which that stage acts. With 3 stages and 4 micro-batches:

    gpipe         0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3        (Huang et al. 2019, arXiv:1811.06965)
                  1F0 1F1 1F2 1F3 1B0 1B1 1B2 1B3
                  2F0 2F1 2F2 2F3 2B0 2B1 2B2 2B3

    one_f_one_b   0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3        (Narayanan et al. 2020, PipeDream-Flush; arXiv:2006.09503)
                  1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3
                  2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3

    forward_only  0F0 0F1 0F2 0F3                        (evaluation: nothing is kept for a backward)
                  1F0 1F1 1F2 1F3
                  2F0 2F1 2F2 2F3
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Op(Enum):
    """The values are the short names in which a plan is printed."""

    FORWARD = "F"
    BACKWARD = "B"
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"


class Action(NamedTuple):
    """One thing that one stage does with one micro-batch, printed as `2F0`."""

    op: Op
    stage: int
    mb: int

    def __str__(self) -> str:
        return f"{self.stage}{self.op.value}{self.mb}"


Row = tuple[Action, ...]
Plan = tuple[Row, ...]


def show(plan: Plan) -> str:
    """One line a stage."""
    return "\n".join(" ".join(map(str, row)) for row in plan)


def gpipe(stages: int, micro_batches: int) -> Plan:
    """All forwards, then all backwards. Every stage holds all `micro_batches` activations at its peak."""
    return tuple(
        tuple(Action(op, stage, mb) for op in (Op.FORWARD, Op.BACKWARD) for mb in range(micro_batches))
        for stage in range(stages)
    )


def one_f_one_b(stages: int, micro_batches: int, ahead: int = 1) -> Plan:
    """Forwards to fill the pipeline, then a backward and a forward in turn.

    `ahead` is the number of forwards in flight for each hop to the last stage: 1 is the textbook's; more keeps far
    stages busy while activations travel. A stage keeps at most (stages − 1 − stage) × ahead + 1 micro-batches alive.
    """

    def row(stage: int) -> Row:
        warm_up = min(micro_batches, (stages - 1 - stage) * ahead)
        actions = [Action(Op.FORWARD, stage, mb) for mb in range(warm_up)]
        for mb in range(micro_batches):
            if warm_up + mb < micro_batches:
                actions.append(Action(Op.FORWARD, stage, warm_up + mb))
            actions.append(Action(Op.BACKWARD, stage, mb))
        return tuple(actions)

    return tuple(row(stage) for stage in range(stages))


def forward_only(stages: int, micro_batches: int) -> Plan:
    """Each micro-batch forward and no more, as an evaluation runs."""
    return tuple(tuple(Action(Op.FORWARD, stage, mb) for mb in range(micro_batches)) for stage in range(stages))


def trains(row: Row) -> bool:
    """Whether `row` has a backward. One without any is an evaluation's."""
    return any(action.op is Op.BACKWARD for action in row)


def live_activations(row: Row) -> int:
    """The most micro-batches that were forwarded and not yet backwarded at any moment of `row`."""
    live = peak = 0
    for action in row:
        live += (action.op is Op.FORWARD) - (action.op is Op.BACKWARD)
        peak = max(peak, live)
    return peak


def lower(plan: Plan) -> Plan:
    """Put a receive before each computation that needs a neighbour, and a send behind each that a neighbour needs."""
    last = len(plan) - 1

    def around(action: Action) -> Row:
        _, stage, mb = action
        if action.op is Op.FORWARD:
            before = (Action(Op.RECV_F, stage, mb),) if stage > 0 else ()
            after = (Action(Op.SEND_F, stage, mb),) if stage < last else ()
        else:
            before = (Action(Op.RECV_B, stage, mb),) if stage < last else ()
            after = (Action(Op.SEND_B, stage, mb),) if stage > 0 else ()
        return (*before, action, *after)

    return tuple(tuple(small for action in row for small in around(action)) for row in plan)
