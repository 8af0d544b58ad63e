"""How well a run uses its machines: bubble and wire shares and peak memory, from counters that are always on."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ...comm.topology import Topology
from ...pipeline.timeline import Meter

_STATUS = Path("/proc/self/status")
_COMPUTING = ("forward", "backward", "optimizer")


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process has held: of the device's memory, or of the machine's where it computes there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    # Elsewhere: in KiB, but for macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Usage:
    """This rank's numbers of one update after another; they travel with the vote, so that nothing waits for them."""

    def __init__(self, meter: Meter, device: torch.device, topology: Topology) -> None:
        self._meter, self._device, self._topology = meter, device, topology
        self._since = time.perf_counter()
        self._before = dict(meter.seconds)

    def take(self) -> list[float]:
        """Since the last call: the share of time in which nothing was computed, and in which the busiest of this rank's
        connections (to the next stage, to the previous one, to the other replicas) was at work, which for a sum over
        replicas includes waiting for the slowest. And peak memory, GiB.
        """
        now, seconds = time.perf_counter(), dict(self._meter.seconds)
        past = max(now - self._since, 1e-9)
        share = {lane: (total - self._before.get(lane, 0.0)) / past for lane, total in seconds.items()}
        self._since, self._before = now, seconds
        wire = [value for lane, value in share.items() if lane.endswith(" send") or lane == "gradients"]
        computing = sum(share.get(lane, 0.0) for lane in _COMPUTING)
        return [max(0.0, 1 - computing), min(1.0, max(wire, default=0.0)), peak_memory_bytes(self._device) / 2**30]

    def row(self, told: Sequence[Sequence[float]]) -> dict[str, float]:
        """What `take` gave on every rank → what `Metrics` shows: a figure for the run, and one for each stage."""
        by_rank = list(zip(*told, strict=True))
        row = {}
        for name, values, over_run, over_replicas in (
            ("bubble", by_rank[0], _mean, _mean),
            ("wire", by_rank[1], max, _mean),
            ("peak_memory_gib", by_rank[2], max, max),
        ):
            row[name] = over_run(values)
            for stage in range(self._topology.stages):
                row[f"{name}/stage{stage}"] = over_replicas([values[rank] for rank in self._topology.peers(stage)])
        return row


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
