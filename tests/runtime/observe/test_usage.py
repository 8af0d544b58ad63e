"""Shares and peaks from counters, and their way with the vote."""

from __future__ import annotations

import time

import pytest
import torch
from farspan.comm.topology import Topology
from farspan.pipeline.timeline import Meter
from farspan.runtime.observe.usage import Usage, peak_memory_bytes


def test_shares_are_of_the_time_since_the_last_look(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    meter = Meter()
    usage = Usage(meter, torch.device("cpu"), Topology(1, 2))
    meter.record("forward", "0F0", 100.0, 102.0)
    meter.record("backward", "0B0", 105.0, 108.0)
    meter.record("optimizer", "update 1", 109.0, 109.5)
    meter.record("forward send", "activations", 102.0, 103.0)
    meter.record("backward receive", "gradients", 100.0, 105.0)
    meter.record("gradients", "reduce", 108.0, 110.0)
    meter.record("gradients", "vote", 110.0, 119.0)
    now = 110.0
    bubble, wire, _ = usage.take()
    assert (bubble, wire) == pytest.approx((0.45, 0.2))
    meter.record("forward", "0F0", 110.0, 111.0)
    now = 112.0
    assert usage.take()[:2] == pytest.approx([0.5, 0.0])


def test_a_row_has_the_run_and_every_stage() -> None:
    usage = Usage(Meter(), torch.device("cpu"), Topology(replicas=2, stages=2))
    row = usage.row([[0.1, 0.5, 1.0], [0.2, 0.1, 2.0], [0.3, 0.3, 4.0], [0.6, 0.1, 3.0]])
    assert row == pytest.approx(
        {
            **{"bubble": 0.3, "bubble/stage0": 0.2, "bubble/stage1": 0.4},
            **{"wire": 0.5, "wire/stage0": 0.4, "wire/stage1": 0.1},
            **{"peak_memory_gib": 4.0, "peak_memory_gib/stage0": 4.0, "peak_memory_gib/stage1": 3.0},
        }
    )


def test_a_peak_stays_when_the_memory_is_gone() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    held = torch.ones(before // 4 + (16 << 20))
    assert peak_memory_bytes(torch.device("cpu")) >= before + (16 << 20)
    del held
    assert peak_memory_bytes(torch.device("cpu")) >= before + (16 << 20)
