"""Warming a stage up leaves nothing behind: neither gradients nor other weights, and every kernel has run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from farspan.modules.shards import ShardStore
from farspan.pipeline.gradients import Gradients
from farspan.pipeline.stage import Stage
from farspan.pipeline.warmup import warm_up
from tiny import make_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("units", [range(0, 3), range(3, 5), range(5, 7), range(0, 7)])
def test_nothing_remains(tmp_path: Path, units: range, dtype: torch.dtype) -> None:
    store = ShardStore(make_model(tmp_path / "m"))
    stage = Stage(store.spec, units, dtype=dtype, device=torch.device("cpu"))
    for unit, layer in zip(units, stage.layers, strict=True):
        layer.load_state_dict(store.read_unit(unit))
    parameters = [t.parameter for t in stage.tensors()]
    before = [p.detach().clone() for p in parameters]
    gradients = Gradients(parameters)
    arrived: list[int] = []
    for index, parameter in enumerate(parameters):
        parameter.register_post_accumulate_grad_hook(lambda _, index=index: arrived.append(index))
    warm_up(stage, gradients, 2, 16)
    assert sorted(arrived) == list(range(len(parameters)))
    assert not gradients.flat.any()
    for a, b in zip(before, parameters, strict=True):
        assert torch.equal(a, b)
