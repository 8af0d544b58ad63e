"""Layers → stages. Units are numbered 0 = embedding, 1 … L = blocks, L + 1 = head; every unit lands on one stage."""

from __future__ import annotations

from collections.abc import Sequence


class PartitionError(ValueError):
    """A split that does not add up to the model."""


def even_split(layers: int, stages: int) -> tuple[int, ...]:
    """Blocks per stage, as even as can be; the earlier stages take what is left over (the last one has the head)."""
    _enough(layers, stages)
    whole, rest = divmod(layers, stages)
    return tuple(whole + (stage < rest) for stage in range(stages))


def balanced_split(layers: int, blocks: Sequence[float], ends: Sequence[float]) -> tuple[int, ...]:
    """Blocks per stage, at least one on each, such that the slowest stage is as fast as can be.

    By stage: what any one block costs there (`blocks`), and what embedding and head cost beside them (`ends`). Blocks
    are alike, so no choice is lost by handing them out singly, each to the stage that is fastest with it.
    """
    _enough(layers, len(blocks))
    split = [1] * len(blocks)
    for _ in range(layers - len(blocks)):
        costs = [(count + 1) * block + end for count, block, end in zip(split, blocks, ends, strict=True)]
        split[costs.index(min(costs))] += 1
    return tuple(split)


def fixed_split(layers: int, stages: int, per_stage: int) -> tuple[int, ...]:
    """`per_stage` blocks on each stage and the remainder on the last, as `--num-layers` says.

    Raises `PartitionError` where a block would be dropped or a stage left without one.
    """
    _enough(layers, stages)
    last = layers - per_stage * (stages - 1)
    if per_stage < 1 or not 0 < last <= per_stage:
        fits = -(-layers // stages)  # if any does
        even = ",".join(map(str, even_split(layers, stages)))
        advice = f"--num-layers {fits} or --layer-split" if fits * (stages - 1) < layers else f"--layer-split {even}"
        raise PartitionError(
            f"--num-layers {per_stage} on {stages} stages does not hold the model's {layers} layers "
            f"with at least one on each; try {advice}"
        )
    return (per_stage,) * (stages - 1) + (last,)


def explicit_split(layers: int, stages: int, counts: Sequence[int]) -> tuple[int, ...]:
    """`counts` itself, checked. Raises `PartitionError`."""
    if len(counts) != stages or sum(counts) != layers or min(counts) < 1:
        raise PartitionError(
            f"--layer-split {','.join(map(str, counts))} must name {stages} counts (one a stage, each at least 1) "
            f"that add up to the model's {layers} layers"
        )
    return tuple(counts)


def stage_units(split: Sequence[int], stage: int) -> range:
    """The units of one stage: its blocks, the embedding on the first stage, the head on the last."""
    start = 1 + sum(split[:stage])
    stop = start + split[stage]
    return range(start - (stage == 0), stop + (stage == len(split) - 1))


def _enough(layers: int, stages: int) -> None:
    if stages > layers:
        raise PartitionError(f"--pipeline-group-size {stages} is more than the model's {layers} layers")
