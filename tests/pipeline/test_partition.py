"""Every layer lands on exactly one stage, or the split is refused by the name of its flag."""

from __future__ import annotations

from itertools import chain, combinations, pairwise

import pytest
from farspan.pipeline.partition import (
    PartitionError,
    balanced_split,
    even_split,
    explicit_split,
    fixed_split,
    stage_units,
)
from hypothesis import given
from hypothesis import strategies as st


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=8)))


def units_of(split: tuple[int, ...]) -> list[int]:
    return list(chain.from_iterable(stage_units(split, stage) for stage in range(len(split))))


@given(st.integers(1, 8), st.integers(0, 60))
def test_an_even_split_is_whole_and_even(stages: int, more: int) -> None:
    layers = stages + more
    split = even_split(layers, stages)
    assert len(split) == stages
    assert sum(split) == layers
    assert max(split) - min(split) <= 1
    assert sorted(split, reverse=True) == list(split)  # what is left over goes to the front


@given(st.data(), st.integers(1, 4), st.integers(0, 8))
def test_a_balanced_split_has_the_fastest_slowest_stage(data: st.DataObject, stages: int, more: int) -> None:
    """Of all splits there are."""
    layers = stages + more
    blocks, ends = (data.draw(st.lists(st.floats(low, 10), min_size=stages, max_size=stages)) for low in (0.1, 0.0))

    def slowest(split: tuple[int, ...]) -> float:
        return max(count * block + end for count, block, end in zip(split, blocks, ends, strict=True))

    cuts = combinations(range(1, layers), stages - 1)
    every = [tuple(b - a for a, b in pairwise((0, *inner, layers))) for inner in cuts]
    split = balanced_split(layers, blocks, ends)
    assert split in every
    assert slowest(split) == min(map(slowest, every))


@given(st.integers(1, 8), st.integers(0, 60))
def test_without_ends_a_balanced_split_is_the_even_one(stages: int, more: int) -> None:
    assert balanced_split(stages + more, [1.0] * stages, [0.0] * stages) == even_split(stages + more, stages)


@given(counts())
def test_units_follow_each_other_without_gap_or_overlap(split: tuple[int, ...]) -> None:
    assert units_of(split) == list(range(sum(split) + 2))
    assert explicit_split(sum(split), len(split), list(split)) == split


@given(st.integers(1, 8), st.integers(1, 70), st.integers(0, 20))
def test_a_fixed_split_is_whole_or_refused(stages: int, layers: int, per_stage: int) -> None:
    """`per_stage` on each stage, fewer on the last: it fits when the last one has between 1 and `per_stage`."""
    fits = stages <= layers and per_stage * (stages - 1) < layers <= per_stage * stages
    try:
        split = fixed_split(layers, stages, per_stage)
    except PartitionError:
        assert not fits
    else:
        assert fits
        assert units_of(split) == list(range(layers + 2))
        assert split[:-1] == (per_stage,) * (stages - 1)


@pytest.mark.parametrize(
    ("layers", "stages", "split", "units"),
    [
        (1, 1, (1,), [range(0, 3)]),
        (5, 2, (3, 2), [range(0, 4), range(4, 7)]),
        (28, 4, (7, 7, 7, 7), [range(0, 8), range(8, 15), range(15, 22), range(22, 30)]),
    ],
)
def test_splits_by_hand(layers: int, stages: int, split: tuple[int, ...], units: list[range]) -> None:
    assert even_split(layers, stages) == split
    assert [stage_units(split, stage) for stage in range(stages)] == units


@pytest.mark.parametrize(
    ("layers", "stages", "per_stage", "advice"),
    [
        (28, 4, 6, "--num-layers 7 or --layer-split"),  # drops 4 layers
        (28, 4, 10, "--num-layers 7 or --layer-split"),  # starves the last stage
        (30, 4, 7, "--num-layers 8 or --layer-split"),
        (28, 4, 0, "--num-layers 7 or --layer-split"),
        (4, 3, 2, "--layer-split 2,1,1"),  # 2 starves and 1 drops: no number fits
    ],
)
def test_num_layers_that_drops_or_starves_is_refused(layers: int, stages: int, per_stage: int, advice: str) -> None:
    with pytest.raises(PartitionError) as caught:
        fixed_split(layers, stages, per_stage)
    assert str(caught.value) == (
        f"--num-layers {per_stage} on {stages} stages does not hold the model's {layers} layers "
        f"with at least one on each; try {advice}"
    )


@given(st.integers(1, 8), st.integers(0, 60))
def test_what_a_refusal_advises_works(stages: int, more: int) -> None:
    layers = stages + more
    with pytest.raises(PartitionError) as caught:
        fixed_split(layers, stages, 0)
    flag, value = str(caught.value).split("try ")[1].split()[:2]
    if flag == "--num-layers":
        assert sum(fixed_split(layers, stages, int(value))) == layers
    else:
        assert flag == "--layer-split"
        explicit_split(layers, stages, [int(count) for count in value.split(",")])


@pytest.mark.parametrize("given_counts", [[3, 2, 1], [2, 2], [0, 5], [6, -1], [5], []])
def test_a_layer_split_that_does_not_add_up_is_refused(given_counts: list[int]) -> None:
    with pytest.raises(PartitionError) as caught:
        explicit_split(5, 2, given_counts)
    assert str(caught.value) == (
        f"--layer-split {','.join(map(str, given_counts))} must name 2 counts (one a stage, each at least 1) "
        "that add up to the model's 5 layers"
    )


def test_more_stages_than_layers_are_refused() -> None:
    for refused in (
        lambda: even_split(3, 4),
        lambda: fixed_split(3, 4, 1),
        lambda: balanced_split(3, [1] * 4, [0] * 4),
    ):
        with pytest.raises(PartitionError, match=r"^--pipeline-group-size 4 is more than the model's 3 layers$"):
            refused()
