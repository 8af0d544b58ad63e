"""Which layers each stage has: what the flags say, or the units' estimated work; and what `--check` would change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from ..comm.topology import Topology
from ..modules.layers import unit_elements, unit_work
from ..modules.spec import ModelSpec
from ..pipeline.partition import balanced_split, even_split, explicit_split, fixed_split, stage_units
from ..pipeline.step_time import StepTime
from .config import Config
from .measure import LayerSeconds

WORTH = 0.9
"""`--check` proposes a split whose update takes at most this share of the time."""

Split = tuple[int, ...]


def layer_split(config: Config, spec: ModelSpec) -> Split:
    """Layers of each stage. Raises `PartitionError`."""
    stages = config.pipeline_group_size
    if config.layer_split == "even":
        return even_split(spec.layers, stages)
    if config.layer_split:
        return explicit_split(spec.layers, stages, [int(count) for count in config.layer_split.split(",") if count])
    if config.num_layers:
        return fixed_split(spec.layers, stages, config.num_layers)
    block, head = _work(config, spec)
    return balanced_split(spec.layers, [block] * stages, [0.0] * (stages - 1) + [head])


def told(config: Config, spec: ModelSpec, split: Split) -> str:
    """`split` in one line, and why it is not even where nobody asked for it."""
    line, even = f"layers of the stages: {show(split)}", even_split(spec.layers, len(split))
    if config.layer_split or config.num_layers or split == even:
        return line
    block, head = _work(config, spec)
    return f"{line}, since the head is as much work as {head / block:.1f} layers (--layer-split even: {show(even)})"


def show(split: Split) -> str:
    return ",".join(map(str, split))


def advice(
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


def _work(config: Config, spec: ModelSpec) -> tuple[float, float]:
    """Of a block and of the head."""
    rows, length = config.micro_batch_size, config.seq_length
    return unit_work(spec, 1, rows, length), unit_work(spec, spec.head_unit, rows, length)


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
