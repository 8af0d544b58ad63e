"""`--profiling tidy_profiling`: all ranks' spans go to rank 0, which writes one trace and a picture of one step."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from ...comm.clock import Clock, ClockReading, read_clock
from ...comm.groups.group import Group
from ...comm.lanes.lane import Lane
from ...comm.topology import Topology
from ...pipeline.timeline import Span, Timeline
from ...pipeline.trace import RankSpans, chrome_trace, show_transfers
from .picture import draw_step

log = logging.getLogger("farspan")


class Profile:
    """One rank's part of the trace. Created when the groups are connected; `write` when training has ended.

    `world` is the group of all ranks (None: there is one), `collectives` the lane on which it works, `lanes` all that
    record spans.
    """

    def __init__(
        self,
        timeline: Timeline,
        world: Group | None,
        collectives: Lane,
        lanes: Sequence[Lane],
        topology: Topology,
        rank: int,
        timeout_s: float,
    ) -> None:
        self._timeline, self._topology, self._rank, self._timeout_s = timeline, topology, rank, timeout_s
        self._world, self._collectives, self._lanes = world, collectives, lanes
        self._started = datetime.now(UTC)
        self._first = self._read_clock()

    def write(self, folder: Path) -> None:
        """All ranks together. Rank 0 writes `folder`/trace.json and step.png; spans travel over the world group, so
        that no common file system is needed."""
        last = self._read_clock()
        for lane in self._lanes:
            lane.submit(lambda: None).get()  # what was submitted before has then been recorded
        here, clock = self._topology.coord(self._rank), Clock(self._first, last)
        spans = [Span(s.lane, s.name, clock.at_rank0(s.start), clock.at_rank0(s.end)) for s in self._timeline.spans]
        mine = RankSpans(self._rank, here.replica, here.stage, spans, clock.uncertainty_s)
        ranks = self._collectives.submit(lambda: _gather(self._world, mine, self._timeout_s)).get()
        if self._rank != 0:
            return
        ranks = show_transfers(ranks)
        metadata = {
            "started": self._started.isoformat(),
            "clock": "that of rank 0; offsets by ping-pong at the start and the end of training",
            "clock_uncertainty_us": {f"rank {r.rank}": round(r.uncertainty_s * 1e6, 1) for r in ranks},
        }
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "trace.json"
        path.write_text(json.dumps(chrome_trace(ranks, metadata), separators=(",", ":"), ensure_ascii=False))
        log.info("trace of all ranks: %s (open it at ui.perfetto.dev)", path)
        if importlib.util.find_spec("matplotlib") is None:
            log.info("notice: no picture of a step: it needs the package matplotlib")
        else:
            draw_step(ranks, folder / "step.png")

    def _read_clock(self) -> ClockReading:
        reading: ClockReading = self._collectives.submit(lambda: read_clock(self._world, self._timeout_s)).get()
        return reading


def _gather(world: Group | None, mine: RankSpans, timeout_s: float) -> list[RankSpans]:
    """On rank 0 all ranks' spans; elsewhere nothing."""
    operation = "gathering the trace"
    if world is None:
        return [mine]
    if mine.rank != 0:
        message = _pack(mine)
        world.send(torch.tensor([len(message)]), 0, timeout_s=timeout_s, operation=operation)
        world.send(message, 0, timeout_s=timeout_s, operation=operation)
        return []
    ranks = [mine]
    for peer in world.members[1:]:
        size = torch.empty(1, dtype=torch.int64)
        world.recv(size, peer, timeout_s=timeout_s, operation=operation)
        message = torch.empty(int(size), dtype=torch.uint8)
        world.recv(message, peer, timeout_s=timeout_s, operation=operation)
        ranks.append(_unpack(message))
    return ranks


def _pack(mine: RankSpans) -> Tensor:
    text = json.dumps([mine.rank, mine.replica, mine.stage, mine.spans, mine.uncertainty_s])
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _unpack(message: Tensor) -> RankSpans:
    rank, replica, stage, spans, uncertainty_s = json.loads(message.numpy().tobytes())
    return RankSpans(rank, replica, stage, [Span(*span) for span in spans], uncertainty_s)
