"""Layers of the stages: by the work of the units where no flag says otherwise, and by measured seconds in `--check`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pytest
from farspan.comm.topology import Topology
from farspan.modules.spec import ModelSpec
from farspan.pipeline.partition import PartitionError
from farspan.pipeline.schedule import gpipe
from farspan.pipeline.simulate import Costs
from farspan.pipeline.step_time import StepTime, step_time
from farspan.runtime.flags.config import Config
from farspan.runtime.preflight.better_split import better_split
from farspan.runtime.preflight.measure import LayerSeconds
from farspan.runtime.setup.split import layer_split, told
from tiny import config_of


def spec_of(family: str = "gptneox", layers: int = 4, **changes: object) -> ModelSpec:
    return ModelSpec.from_config(config_of(family, layers=layers, **changes).to_dict())


LARGE_HEAD = {"hidden_size": 64, "intermediate_size": 256, "vocab_size": 50432}


@pytest.mark.parametrize(
    ("spec", "stages", "split"),
    [
        (spec_of(layers=4, **LARGE_HEAD), 2, (3, 1)),
        (spec_of(layers=9, **LARGE_HEAD), 3, (4, 4, 1)),
        (spec_of(layers=12, **{**LARGE_HEAD, "vocab_size": 3000}), 2, (8, 4)),  # a head of some 4 layers
        (spec_of(layers=5), 2, (3, 2)),  # a small head: even, what is left over goes to the front
        (spec_of(layers=28), 4, (7, 7, 7, 7)),
        (spec_of("llama", layers=5), 1, (5,)),
    ],
    ids=str,
)
def test_the_default_split_weighs_the_head(spec: ModelSpec, stages: int, split: tuple[int, ...]) -> None:
    config = Config(pipeline_group_size=stages, seq_length=32, micro_batch_size=1)
    assert layer_split(config, spec) == split


def test_models_of_the_family_sizes() -> None:
    """GPT-J 6B on 4 stages of 28 layers: the head is as much work as 1.3 of them."""
    gptj = ModelSpec.from_config({"model_type": "gptj"})
    config = Config(pipeline_group_size=4, seq_length=2048, micro_batch_size=1)
    assert layer_split(config, gptj) == (8, 7, 7, 6)
    assert told(config, gptj, (8, 7, 7, 6)) == (
        "layers of the stages: 8,7,7,6, since the head is as much work as 1.3 layers (--layer-split even: 7,7,7,7)"
    )


def test_flags_say_otherwise() -> None:
    spec = spec_of(layers=4, **LARGE_HEAD)
    for flags, split in (
        ({"layer_split": "even"}, (2, 2)),
        ({"layer_split": "1,3"}, (1, 3)),
        ({"num_layers": 2}, (2, 2)),
    ):
        config = Config(pipeline_group_size=2, seq_length=32, **flags)
        assert layer_split(config, spec) == split
        assert told(config, spec, split) == f"layers of the stages: {split[0]},{split[1]}"
    with pytest.raises(PartitionError, match="--pipeline-group-size 5 is more than the model's 4 layers"):
        layer_split(Config(pipeline_group_size=5), spec)


def test_a_row_twice_as_long_makes_blocks_more_work() -> None:
    spec = spec_of(layers=8, **{**LARGE_HEAD, "vocab_size": 1600, "max_position_embeddings": 4096})
    splits = [layer_split(Config(pipeline_group_size=2, seq_length=n, micro_batch_size=1), spec) for n in (16, 4096)]
    assert splits == [(5, 3), (4, 4)]


def found_of(split: Sequence[int], blocks: Sequence[float], head: float) -> list[dict[str, Any]]:
    """What one replica's ranks would measure: `blocks` seconds of a forward, twice of a backward, of each stage's."""
    found = []
    for stage, (count, block) in enumerate(zip(split, blocks, strict=True)):
        end = head * (stage + 1 == len(split))
        layers = LayerSeconds(count * block + end, 2 * (count * block + end), 0.0, block, 2 * block)
        found.append({"layers": asdict(layers), "sums": {"buckets": [0.01], "spread": 0.0}})
    return found


def walked(found: Sequence[dict[str, Any]]) -> StepTime:
    layers = [LayerSeconds(**each["layers"]) for each in found]
    costs = Costs(
        tuple(each.forward for each in layers), tuple(each.backward for each in layers),
        (0.0,) * (len(layers) - 1), (0.0,) * (len(layers) - 1),
    )  # fmt: skip
    return step_time(gpipe(len(layers), 8), [costs], optimizer=[each.update for each in layers])


def test_check_proposes_what_is_faster_by_a_tenth() -> None:
    spec, topology = spec_of(layers=8), Topology(1, 2)

    def line(split: tuple[int, ...], blocks: Sequence[float], head: float) -> str:
        return better_split(spec, topology, split, found_of(split, blocks, head), walked)

    assert line((4, 4), (1.0, 1.0), 4.0).startswith("a better split: --layer-split 6,2 (now 4,4), ")
    assert line((4, 4), (1.0, 3.0), 0.0).startswith("a better split: --layer-split 6,2 ")  # a slower machine
    assert line((4, 4), (1.0, 1.0), 0.3) == ""
    assert line((5, 3), (1.0, 1.0), 1.0) == ""  # no tenth to be had
    before, after = (walked(found_of(split, (1.0, 1.0), 4.0)).seconds for split in ((4, 4), (6, 2)))
    assert f"{after:.2f} s an update, {1 - after / before:.0%} less" in line((4, 4), (1.0, 1.0), 4.0)


def test_check_suits_the_slowest_replica_of_a_stage() -> None:
    spec, split = spec_of(layers=8), (4, 4)
    found = [*found_of(split, (1.0, 1.0), 0.0), *found_of(split, (1.0, 3.0), 0.0)]
    line = better_split(spec, Topology(2, 2), split, found, lambda found: walked(found[2:]))
    assert line.startswith("a better split: --layer-split 6,2 ")
