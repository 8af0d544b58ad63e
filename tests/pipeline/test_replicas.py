"""Which sums over replicas and tied stages are made, of what, and in which order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from farspan.pipeline.gradients import Gradients
from farspan.pipeline.replicas import Replicas
from torch import Tensor, nn


class Doubling:
    """A group of two that hold the same; writes down what it was asked to sum."""

    def __init__(self, asked: list[tuple[str, int, float]]) -> None:
        self._asked = asked

    def all_reduce(self, x: Tensor, *, timeout_s: float, operation: str = "all-reduce") -> None:
        self._asked.append((operation, x.numel(), timeout_s))
        x.mul_(2)

    reduce_scatter = all_reduce


REPLICAS = ("summing gradients over replicas", 32, 9.0)
TIE = ("summing the tied embedding's gradient", 16, 9.0)


@pytest.mark.parametrize(
    ("peers", "tie", "sums", "after"),
    [
        (False, False, [], [1.0, 1.0]),
        (True, False, [REPLICAS], [2.0, 2.0]),
        (False, True, [TIE], [1.0, 2.0]),
        (True, True, [REPLICAS, TIE], [2.0, 4.0]),  # the pair last: its two copies must end the same bit for bit
    ],
)
def test_the_sums_of_a_stage(peers: bool, tie: bool, sums: list[tuple[str, int, float]], after: list[float]) -> None:
    gradients = Gradients([nn.Parameter(torch.zeros(16)), nn.Parameter(torch.zeros(4, 4))])
    gradients.flat.fill_(1.0)
    asked: list[tuple[str, int, float]] = []
    group = Doubling(asked)
    tied = gradients.views[1]
    Replicas(gradients, group if peers else None, group if tie else None, tied if tie else None, 9.0).reduce()
    assert asked == sums
    assert [view.unique().tolist() for view in gradients.views] == [[value] for value in after]


@pytest.mark.parametrize(
    ("sharded", "order"),
    [
        (False, [("bucket", 16), ("bucket", 16), ("bucket", 16), ("tie", 16)]),
        (True, [("bucket", 16), ("bucket", 16), ("tie", 16), ("bucket", 16)]),  # the tied bucket waits for its pair
    ],
)
@pytest.mark.parametrize("overlap", [False, True])
def test_the_order_of_buckets_and_the_pair(sharded: bool, order: list[tuple[str, int]], overlap: bool) -> None:
    parameters = [nn.Parameter(torch.zeros(16)) for _ in range(3)]
    gradients = Gradients(parameters, bucket_elements=16)
    asked: list[tuple[str, int, float]] = []
    tied = gradients.views[1]
    replicas = Replicas(gradients, Doubling(asked), Doubling(asked), tied, 9.0, sharded=sharded)
    for _ in range(3):
        asked.clear()
        gradients.zero()
        if overlap:
            replicas.overlap(Now())
        sum(p.sum() for p in parameters).backward()
        replicas.reduce()
        kinds = {REPLICAS[0]: "bucket", TIE[0]: "tie"}
        assert [(kinds[operation], count) for operation, count, _ in asked] == order
        assert [view.unique().tolist() for view in gradients.views] == [[2.0], [4.0], [2.0]]


class Now:
    """A lane that does what it is told at once."""

    name = "now"

    def submit(self, fn: Callable[[], object], *, label: str = "") -> None:
        fn()

    def close(self) -> None:
        return
