"""The memory that a stage is said to take, against what it takes: the peak of a fresh process, by the kernel."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from farspan.modules.layers import init_unit
from farspan.modules.spec import ModelSpec
from farspan.pipeline.estimate import Estimate, estimate, still_edges
from farspan.pipeline.executor import Batch, Executor
from farspan.pipeline.partition import stage_units
from farspan.pipeline.replicas import Replicas
from farspan.pipeline.schedule import gpipe, lower, one_f_one_b
from farspan.pipeline.stage import Stage
from farspan.runtime.flags.config import Config
from farspan.runtime.observe.usage import peak_memory_bytes
from farspan.runtime.optim.optimizer import Optimizer
from farspan.runtime.setup.prepare import keep_freed_memory
from peers import Peer, play
from tiny import config_of

CPU = torch.device("cpu")
MICRO_BATCHES, ROWS, LENGTH = 4, 2, 256
DEADLINE_S = 400.0  # 16-bit products take a processor that has none for them a hundred times as long
SHAPES: dict[str, dict[str, Any]] = {
    "gptneox": {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 8000, "max_position_embeddings": 256},
    "llama": {"hidden_size": 256, "intermediate_size": 768, "vocab_size": 8000, "max_position_embeddings": 256},
    "gptj": {"n_embd": 256, "vocab_size": 8000, "n_positions": 256, "rotary_dim": 32},
}
# family, schedule, recompute, type, stage of 2, replicas that share the optimizer's state
CASES = [
    ("gptneox", "gpipe", "none", "float32", 0, 1),
    ("gptneox", "gpipe", "none", "bfloat16", 1, 1),
    ("gptneox", "gpipe", "block", "float32", 1, 1),
    ("gptneox", "gpipe", "block", "bfloat16", 0, 1),
    ("gptj", "1f1b", "none", "float32", 1, 1),
    ("llama", "1f1b", "none", "bfloat16", 0, 1),
    ("llama", "1f1b", "block", "float32", 0, 1),
    ("gptj", "1f1b", "block", "bfloat16", 1, 1),
    ("gptneox", "gpipe", "none", "float32", 1, 2),
]


def spec_of(family: str) -> ModelSpec:
    return ModelSpec.from_config(config_of(family, layers=8, **SHAPES[family]).to_dict())


def plan_of(mode: str) -> Any:  # noqa: ANN401
    return gpipe(2, MICRO_BATCHES) if mode == "gpipe" else one_f_one_b(2, MICRO_BATCHES)


def estimated(number: int) -> Estimate:
    family, mode, recompute, dtype, at, shards = CASES[number]
    spec = spec_of(family)
    return estimate(
        spec, stage_units((4, 4), at), plan_of(mode)[at], rows=ROWS, length=LENGTH, dtype=getattr(torch, dtype),
        device=CPU, recompute=recompute, shards=shards,
    )  # fmt: skip


@pytest.mark.parametrize("units", [range(0, 3), range(3, 5), range(5, 10)])
def test_a_stage_of_another_device_than_the_host_can_be_planned(units: range) -> None:
    spec, row = spec_of("gptneox"), lower(gpipe(3, MICRO_BATCHES))[0]
    here, there = (
        estimate(
            spec, units, row, rows=ROWS, length=LENGTH, dtype=torch.float32, device=torch.device(device), documents=True
        )
        for device in ("cpu", "meta")
    )
    assert there.weights == here.weights
    assert there.activations > 0.9 * here.activations


def train(me: Peer, number: int, spec: ModelSpec, length: int) -> None:
    """An update of the stage, with neighbours that answer at once. Replicas sum in buckets from the second one on."""
    _, mode, recompute, dtype, at, shards = CASES[number]
    units = stage_units((spec.layers // 2,) * 2, at)
    stage = Stage(spec, units, dtype=getattr(torch, dtype), device=CPU, recompute=recompute)
    for unit, layer in zip(units, stage.layers, strict=True):
        init_unit(layer, spec, unit, 1)
    told = Config(dp_mode="zero1" if shards > 1 else "allreduce", data_group_size=shards)
    optimizer = Optimizer(stage, told, me.ranks.index(me.rank))
    optimizer.adopt()
    peers = me.group(f"peers {length}") if shards > 1 else None
    replicas = Replicas(optimizer.gradients, peers, None, None, 60.0, sharded=optimizer.sharded)
    executor = Executor(stage, lower(plan_of(mode))[at], still_edges(stage), ROWS, length)
    tokens = torch.randint(0, spec.vocab, (2, MICRO_BATCHES * ROWS, length))
    for _ in range(2 if shards > 1 else 1):
        optimizer.gradients.zero()
        executor.step(Batch(tokens[0], tokens[1], tokens[1].numel()))
        replicas.reduce()
        optimizer.square_sum()
        weights = optimizer.step(1e-4, 0.5)
        if weights is not None:
            replicas.gather(weights)
            optimizer.take(weights)
    if peers is not None:
        peers.close()


def grown(me: Peer) -> int:
    """Bytes by which case `rank` (or, of 2 replicas, half of it) makes the process grow."""
    number = min(me.rank, len(CASES) - 1)
    spec = spec_of(CASES[number][0])
    small = replace(spec, layers=2, width=64, heads=4, head_dim=16, kv_heads=4, rotary_dim=4, mlp_width=64)
    train(me, number, small, 16)  # what is loaded or made once
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory_bytes(CPU)
    train(me, number, spec, LENGTH)
    return peak_memory_bytes(CPU) - before


def peak(me: Peer) -> int:
    """As a run has its memory."""
    keep_freed_memory()
    return grown(me)


def peak_without_holes(me: Peer) -> int:
    """Every tensor that is freed goes back to the kernel at once."""
    ctypes.CDLL(None).mallopt(-3, 65536)
    return grown(me)


def ranks_of(number: int) -> tuple[int, ...]:
    return (number,) if CASES[number][-1] == 1 else (number, number + 1)


def name_of(number: int) -> str:
    return "-".join(map(str, CASES[number]))


linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux counts peaks anew")


@linux
@pytest.mark.parametrize("number", range(len(CASES)), ids=name_of)
def test_the_parts_add_up_to_what_is_used(number: int, tmp_path: Path) -> None:
    need = estimated(number)
    for real in play(peak_without_holes, ranks_of(number), tmp_path, deadline_s=DEADLINE_S).values():
        # Below: what libraries take inside an operation, such as weights in another order for 16-bit products.
        assert 0.9 < (need.on_device - need.heap) / real < 1.1, f"{need} against {real / 2**20:.1f} MiB"


@linux
@pytest.mark.parametrize("number", [3, 5, 6, 8], ids=name_of)
def test_the_estimate_is_within_15_percent_of_the_peak(number: int, tmp_path: Path) -> None:
    need = estimated(number)
    for real in play(peak, ranks_of(number), tmp_path, deadline_s=DEADLINE_S).values():
        assert 0.85 < need.on_device / real < 1.15, f"{need} against {real / 2**20:.1f} MiB"


def test_a_tied_matrix_on_one_stage_counts_once() -> None:
    needs = []
    for tied in (False, True):
        spec = replace(spec_of("llama"), tied=tied)
        row = gpipe(1, 1)[0]
        needs.append(estimate(spec, range(spec.unit_count), row, rows=1, length=16, dtype=torch.float32, device=CPU))
    assert needs[0].weights - needs[1].weights == 4 * spec.vocab * spec.width


def test_offloaded_state_is_the_hosts() -> None:
    spec = spec_of("gptneox")
    told: dict[str, Any] = {"rows": 1, "length": 16, "dtype": torch.bfloat16, "device": CPU}
    units, row = range(spec.unit_count), gpipe(1, 1)[0]
    need = estimate(spec, units, row, **told, offload=True)
    elements = need.gradients // 4
    assert (need.weights, need.masters, need.moments) == (2 * elements, 4 * elements, 8 * elements)
    assert need.on_host == 12 * elements
    assert estimate(spec, units, row, **told).on_host == 0
    eight = estimate(spec, units, row, **told, optimizer="8bit-adam")
    assert 2 * elements < eight.moments < 2.1 * elements
