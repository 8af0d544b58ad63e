"""Warming a stage up runs every kernel of a step, and leaves nothing behind: neither gradients nor other weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from farspan.modules.shards import ShardStore
from farspan.pipeline.estimate import still_edges
from farspan.pipeline.executor import Batch, Executor
from farspan.pipeline.gradients import Gradients
from farspan.pipeline.schedule import Plan, forward_only, gpipe, lower
from farspan.pipeline.stage import Stage
from farspan.pipeline.warmup import warm_up
from tiny import make_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROWS, LENGTH, MICRO_BATCHES = 2, 16, 3
STAGES = [range(0, 3), range(3, 5), range(5, 7)]


def load(folder: Path, units: range, dtype: torch.dtype, dropout: float = 0.0) -> tuple[Stage, Gradients]:
    store = ShardStore(make_model(folder / "m"))
    spec = replace(store.spec, attn_dropout=dropout, residual_dropout=dropout)
    stage = Stage(spec, units, dtype=dtype, device=torch.device("cpu"))
    for unit, layer in zip(units, stage.layers, strict=True):
        layer.load_state_dict(store.read_unit(unit))
    return stage, Gradients([t.parameter for t in stage.tensors()], bucket_elements=1)


def step(stage: Stage, plan: Plan, documents: bool) -> None:
    """The stage's first real one."""
    tokens = torch.randint(0, stage.spec.vocab, (MICRO_BATCHES * ROWS, LENGTH))
    positions = torch.arange(LENGTH).expand(MICRO_BATCHES * ROWS, -1) % 5
    row = lower(plan)[STAGES.index(stage.units) if stage.units in STAGES else 0]
    executor = Executor(stage, row, still_edges(stage), ROWS, LENGTH)
    executor.step(Batch(tokens, tokens, tokens.numel(), positions if documents else None), seed=5, scale=8.0)


class Kernels(TorchDispatchMode):
    """Every operation that was run, with the types of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple] = set()

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # noqa: ANN401 - whatever the operation gives
        tensors = (x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        self.seen.add((str(func), *(x.dtype for x in tensors)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("units", STAGES)
@pytest.mark.parametrize("plan", [gpipe(3, MICRO_BATCHES), forward_only(3, MICRO_BATCHES)], ids=["train", "evaluate"])
def test_a_step_runs_no_kernel_for_the_first_time(tmp_path: Path, units: range, plan: Plan, documents: bool) -> None:
    stage, gradients = load(tmp_path, units, torch.bfloat16, dropout=0.1)
    with Kernels() as before:
        warm_up(stage, gradients, ROWS, LENGTH, documents=documents)
    with Kernels() as real:
        step(stage, plan, documents)
    # `randint` and the rest are the test's own, on the host.
    own = {"aten.randint.low", "aten.remainder.Scalar", "aten.arange.default", "aten.expand.default"}
    assert {seen for seen in real.seen - before.seen if seen[0] not in own} == set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("units", [*STAGES, range(0, 7)])
def test_nothing_remains(tmp_path: Path, units: range, dtype: torch.dtype) -> None:
    stage, gradients = load(tmp_path, units, dtype, dropout=0.1)
    parameters = [t.parameter for t in stage.tensors()]
    before, generator = [p.detach().clone() for p in parameters], torch.get_rng_state()
    arrived: list[int] = []
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda _, index=index: arrived.append(index))
        for index, parameter in enumerate(parameters)
    ]
    warm_up(stage, gradients, ROWS, LENGTH, documents=False)
    assert sorted(arrived) == list(range(len(parameters)))
    assert not gradients.flat.any()
    for a, b in zip(before, parameters, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), generator)
    for hook in hooks:
        hook.remove()
    # Nor does it count among the first step's gradients, of which there are as many as micro-batches.
    plan = gpipe(3 if units in STAGES else 1, MICRO_BATCHES)
    every = list(reversed(range(len(gradients.buckets))))
    for ready in ([], every):
        sent: list[int] = []
        gradients.watch(sent.append)
        step(stage, plan, documents=False)
        gradients.unwatch()
        assert sent == ready
