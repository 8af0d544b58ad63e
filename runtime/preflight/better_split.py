"""What `--check` would change of the split of the layers, from what it has measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from ...comm.topology import Topology
from ...modules.layers import unit_elements
from ...modules.spec import ModelSpec
from ...pipeline.partition import balanced_split, stage_units
from ...pipeline.step_time import StepTime
from ..setup.split import Split, show
from .measure import LayerSeconds

WORTH = 0.9
"""A split is proposed whose update takes at most this share of the time."""


def better_split(
    spec: ModelSpec,
    topology: Topology,
    split: Split,
    found: Sequence[dict[str, Any]],
    simulated: Callable[[Sequence[dict[str, Any]]], StepTime],
) -> str:
    """The split to give instead, in two lines, where it makes an update of a run faster by 10 % or more; else "".

    `found`: what `--check` measured on each rank; `simulated` makes an update of it.
    """
    now = simulated(found).seconds
    other = _measured_split(topology, split, found)
    then = simulated(_with_split(spec, topology, split, other, found)).seconds
    if then > WORTH * now:
        return ""
    return (
        f"a better split: --layer-split {show(other)} (now {show(split)}), {then:.2f} s an update, "
        f"{1 - then / now:.0%} less\n  (--check with it tells whether its memory suffices)"
    )


def _measured_split(topology: Topology, split: Split, found: Sequence[dict[str, Any]]) -> Split:
    """The split that suits the slowest replica of each stage."""
    blocks, ends = [], []
    for stage, count in enumerate(split):
        layers = [LayerSeconds(**found[rank]["layers"]) for rank in topology.peers(stage)]
        blocks.append(max(each.block_forward + each.block_backward for each in layers))
        ends.append(max(each.forward + each.backward for each in layers) - count * blocks[-1])
    return balanced_split(sum(split), blocks, ends)


def _with_split(
    spec: ModelSpec, topology: Topology, split: Split, other: Split, found: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """`found`, had it been measured with the split `other`."""
    moved = []
    for rank, each in enumerate(found):
        stage = topology.coord(rank).stage
        now, then = (sum(unit_elements(spec, unit) for unit in stage_units(s, stage)) for s in (split, other))
        sums = {
            "buckets": [seconds * then / now for seconds in each["sums"]["buckets"]],
            "spread": each["sums"]["spread"] * then / now,
        }
        layers = LayerSeconds(**each["layers"]).with_blocks(other[stage] - split[stage], then / now)
        moved.append({**each, "sums": sums, "layers": asdict(layers)})
    return moved
