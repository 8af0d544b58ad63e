"""What `--check` measures: the edges of the run, its sums and votes, and the seconds of this rank's layers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from ...comm.groups.gloo import GlooGroup
from ...comm.groups.group import Group
from ...comm.lanes.lane import ThreadLane
from ...comm.meeting.rendezvous import Rendezvous
from ...comm.probe import EdgeFigures, Probe
from ...comm.topology import Topology
from ...modules.layers import init_unit, unit_elements
from ...modules.spec import ModelSpec
from ...pipeline.estimate import alone_row, still_edges
from ...pipeline.executor import Batch, Executor
from ...pipeline.schedule import Plan, live_activations
from ...pipeline.stage import Stage
from ..flags.config import Config
from ..optim.optimizer import Optimizer
from ..setup.wiring import fed

CONNECTIONS = 4
_ROUNDS, _LONG_ENOUGH_S = 3, 2.0
_SAMPLE_S = 1.0
"""A sum over replicas that would take longer is measured by a smaller one."""


@dataclass(frozen=True)
class Edge:
    """A directed edge of the run: the groups that carry it and what comes back (perhaps the same one).

    `kind`: pipeline, replicas or data; up to `messages` of `message_bytes` are under way at once in a step.
    """

    kind: str
    source: int
    target: int
    there: str
    back: str
    message_bytes: int = 0
    messages: int = 0


def edges_of(config: Config, topology: Topology, plan: Plan, message_bytes: int) -> Iterator[Edge]:
    """Every edge: between stages both ways, between replicas around the ring, and from rank 0 to where data goes."""
    for replica in range(topology.replicas):
        for stage, (a, b) in enumerate(pairwise(topology.pipeline(replica))):
            messages = live_activations(plan[stage])
            for source, target in ((a, b), (b, a)):
                there, back = f"{source}→{target}", f"{target}→{source}"
                yield Edge("pipeline", source, target, there, back, message_bytes, messages)
    for stage in range(topology.stages if topology.replicas > 1 else 0):
        peers = topology.peers(stage)
        for source, target in zip(peers, (*peers[1:], peers[0]), strict=True):
            yield Edge("replicas", source, target, name := f"replicas of stage {stage}", name)
    for kind, rank in fed(topology, config.document_mask):
        yield Edge("data", 0, rank, name := f"{kind}→{rank}", name)


def in_rounds(edges: Sequence[Edge], networks: Sequence[str]) -> list[list[Edge]]:
    """Edges that can be measured at the same time: no host takes part in two of a round, so none disturbs another."""
    rounds: list[tuple[set[str], list[Edge]]] = []
    for edge in edges:
        hosts = {networks[edge.source], networks[edge.target]}
        for taken, members in rounds:
            if not taken & hosts:
                taken |= hosts
                members.append(edge)
                break
        else:
            rounds.append((hosts, [edge]))
    return [members for _, members in rounds]


def measure_edges(
    rounds: Sequence[Sequence[Edge]],
    groups: dict[str, Group],
    world: Group,
    meeting: Rendezvous,
    timeout_s: float,
) -> list[tuple[Edge, EdgeFigures]]:
    """All ranks call this together; each gets the figures of the edges that begin at it."""
    found = []
    rank = meeting.rank
    for members in rounds:
        world.barrier(timeout_s=timeout_s, operation="waiting for the edges measured before")
        for edge in members:
            if rank not in (edge.source, edge.target):
                continue
            there, pair = groups[edge.there], tuple(sorted((edge.source, edge.target)))
            more: list[Group] = [
                GlooGroup(
                    meeting.store, f"probe {n} of {edge.there}, {edge.source}", pair, rank, there.interface, timeout_s
                )
                for n in range(CONNECTIONS)
            ]
            lanes = [ThreadLane(f"probe {n}", check=meeting.liveness.check) for n in range(CONNECTIONS)]
            probe = Probe(edge.source, edge.target, there, groups[edge.back], more, lanes, timeout_s)
            figures = probe.measure(edge.message_bytes, edge.messages)
            if figures is not None:
                found.append((edge, figures))
            for lane in lanes:
                lane.close()
            for group in more:
                group.close()
    world.barrier(timeout_s=timeout_s, operation="waiting for the last edges measured")
    return found


def measure_sum(group: Group, elements: int, timeout_s: float, operation: str = "all_reduce") -> float:
    """Seconds of a sum (or another collective) of `elements` fp32 numbers over `group`; all members call this together.

    Large ones are judged by smaller ones, as long as takes a second.
    """
    small = 16 * group.size
    least = _timed(group, small, timeout_s, operation)
    sample, took = small, least
    while sample < elements and took < _SAMPLE_S / 2:
        grown = min(elements, max(sample * 8, 1 << 14))
        grown -= grown % small  # equal parts
        if grown <= sample:
            break
        sample, took = grown, _timed(group, grown, timeout_s, operation)
    if sample == small:
        return took
    return least + (took - least) * elements / sample


def _timed(group: Group, elements: int, timeout_s: float, operation: str) -> float:
    """The same for all members: the mean of what it took each, the better of two times."""
    best = float("inf")
    for _ in range(2):
        x = torch.zeros(elements)
        group.barrier(timeout_s=timeout_s)
        start = time.perf_counter()
        getattr(group, operation)(x, timeout_s=timeout_s, operation="measuring")
        took = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
        group.all_reduce(took, timeout_s=timeout_s)
        best = min(best, took.item() / group.size)
    return best


@dataclass(frozen=True)
class LayerSeconds:
    """Of this rank: one micro-batch forward and backward, through its stage and through one block of it, and all that
    belongs to one update of the weights."""

    forward: float
    backward: float
    update: float
    block_forward: float
    block_backward: float

    def with_blocks(self, more: int, elements: float) -> LayerSeconds:
        """The same with so many `more` blocks (or fewer), which make the stage `elements` times as large."""
        forward, backward = self.forward + more * self.block_forward, self.backward + more * self.block_backward
        return replace(self, forward=forward, backward=backward, update=self.update * elements)


def measure_layers(
    config: Config, spec: ModelSpec, units: range, dtype: torch.dtype, device: torch.device
) -> LayerSeconds:
    """Two blocks of the stage compute real micro-batches, with random weights, and take as long as any others; then
    once more with the embedding before them, or the head behind them, where the stage has these."""
    blocks = [unit for unit in units if 0 < unit < spec.head_unit]
    few = blocks[:2]
    ends = []
    if units.start == 0:
        ends.append(range(0, 1 + len(few)))
    if units.stop == spec.unit_count:
        ends.append(range(spec.head_unit - len(few), spec.unit_count))
    inner = _computed(config, spec, range(few[0], few[-1] + 1), dtype, device)
    one_forward, one_backward = (seconds / len(few) for seconds in inner[:2])
    forward, backward = len(blocks) * one_forward, len(blocks) * one_backward
    for part in ends:
        more = _computed(config, spec, part, dtype, device)
        forward += max(more[0] - inner[0], 0.0)
        backward += max(more[1] - inner[1], 0.0)
    elements = sum(unit_elements(spec, unit) for unit in units)
    return LayerSeconds(forward, backward, inner[2] * elements, one_forward, one_backward)


def _computed(
    config: Config, spec: ModelSpec, units: range, dtype: torch.dtype, device: torch.device
) -> tuple[float, float, float]:
    """Median seconds of a forward and a backward of `units`, and of an update for each element."""
    stage = Stage(spec, units, dtype=dtype, device=device, recompute=config.recompute)
    for unit, layer in zip(units, stage.layers, strict=True):
        init_unit(layer, spec, unit, config.seed)
    optimizer = Optimizer(stage, config)
    optimizer.adopt()
    seconds: dict[str, float] = {}

    def record(lane: str, _name: str, start: float, end: float) -> None:
        seconds[lane] = end - start

    executor = Executor(
        stage, alone_row(stage, 1), still_edges(stage), config.micro_batch_size, config.seq_length, record
    )
    tokens = torch.ones(config.micro_batch_size, config.seq_length, dtype=torch.int64)
    batch = Batch(tokens, tokens, tokens.numel(), tokens if config.document_mask else None)
    times: list[tuple[float, float, float]] = []
    begun = time.perf_counter()
    while len(times) <= _ROUNDS or time.perf_counter() - begun < _LONG_ENOUGH_S:
        executor.step(batch)
        _wait_for(device)
        executor.watch.settle()
        start = time.perf_counter()
        optimizer.gradients.zero()
        optimizer.square_sum()
        optimizer.step(0.0, 0.5)
        _wait_for(device)
        times.append((seconds["forward"], seconds["backward"], time.perf_counter() - start))
    forward, backward, update = (statistics.median(column) for column in zip(*times[1:], strict=True))
    return forward, backward, update / optimizer.gradients.flat.numel()


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
