"""How long one update will take: the pipeline's walk on paper, then what all ranks do behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .schedule import Action, Plan, lower
from .simulate import Costs, simulate


@dataclass(frozen=True)
class Sum:
    """A sum over a group: `seconds` of each of its buckets, the one of the last layers first; `spread` of the weights
    that are gathered after the update (ZeRO-1)."""

    buckets: tuple[float, ...] = ()
    spread: float = 0.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of one update. `pipeline`: until the last stage's last backward; then `sums` that were not hidden behind
    it, the `vote`, the `optimizer` (with spreading its weights). `feed` is what the data takes on its way, one update
    ahead: it counts where it is longer than all of these. `bubble`: the share without computing, 0 to 1."""

    pipeline: float
    sums: float
    vote: float
    optimizer: float
    feed: float
    bubble: float

    @property
    def seconds(self) -> float:
        return max(self.pipeline + self.sums + self.vote + self.optimizer, self.feed)


def step_time(
    plan: Plan,
    replicas: Sequence[Costs],
    *,
    accumulate: int = 1,
    sums: Sequence[Sum] = (),
    tie: float = 0.0,
    vote: float = 0.0,
    optimizer: Sequence[float] = (),
    feed: float = 0.0,
) -> StepTime:
    """`plan`, not lowered, is walked `accumulate` times with the costs of each replica. By stage: `sums` over replicas,
    and the seconds of the `optimizer`. `tie`: the sum of a tied embedding's gradient over first and last stage."""
    stages = range(len(plan))
    walks = [simulate(lower(repeated(plan, accumulate)), costs) for costs in replicas]
    lanes = [f"stage {stage}" for stage in stages]
    ends = [max(max(s.end for s in walk.spans if s.lane == lane) for walk in walks) for lane in lanes]
    summed = []
    for stage in stages:
        # The last backward fills the buckets one after the other, and each is summed as soon as it is full.
        buckets = sums[stage].buckets if sums else ()
        last = max(costs.backward[stage] for costs in replicas)
        done = ends[stage]
        for number, seconds in enumerate(buckets, 1):
            full = ends[stage] - last * (1 - number / len(buckets))
            done = seconds + (max(done, full) if number > 1 else full)
        summed.append(max(done, ends[stage]))
    if tie:
        summed[0] = summed[-1] = max(summed[0], summed[-1]) + tie
    pipeline, all_summed = max(ends), max(summed)
    updating = max((o + (sums[s].spread if sums else 0.0) for s, o in enumerate(optimizer)), default=0.0)
    total = all_summed + vote + updating
    computing = sum(walk.busy(lanes) for walk in walks) / (len(walks) * len(plan)) + max(optimizer, default=0.0)
    return StepTime(pipeline, all_summed - pipeline, vote, updating, feed, 1 - computing / max(total, feed))


def repeated(plan: Plan, times: int) -> Plan:
    """`plan` walked `times` times, with micro-batches numbered on."""
    count = max(action.mb for row in plan for action in row) + 1
    return tuple(
        tuple(Action(op, stage, turn * count + mb) for turn in range(times) for op, stage, mb in row) for row in plan
    )
