"""Which layers each stage has: what the flags say, or the units' estimated work."""

from __future__ import annotations

from ...modules.layers import unit_work
from ...modules.spec import ModelSpec
from ...pipeline.partition import balanced_split, even_split, explicit_split, fixed_split
from ..flags.config import Config

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


def _work(config: Config, spec: ModelSpec) -> tuple[float, float]:
    """Of a block and of the head."""
    rows, length = config.micro_batch_size, config.seq_length
    return unit_work(spec, 1, rows, length), unit_work(spec, spec.head_unit, rows, length)
