"""`--check`: meet as a run does, measure what it will depend on, tell what to expect, and leave. Nothing is written."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from ...comm.meeting.rendezvous import Rendezvous
from ...comm.meeting.verify import host_here, network_here
from ...comm.probe import EdgeFigures
from ...modules.checksums import SUMS, read_sums, sha256
from ...modules.layers import unit_elements
from ...modules.shards import ShardError, ShardStore
from ...pipeline.estimate import estimate
from ...pipeline.simulate import Costs, Wire
from ...pipeline.step_time import StepTime, Sum, step_time
from ..flags.config import Config
from ..setup.network import Network
from ..setup.prepare import describe, first_difference
from ..setup.set_up import Setup, set_up
from ..setup.wiring import Wires, connect
from .better_split import better_split
from .measure import Edge, LayerSeconds, edges_of, in_rounds, measure_edges, measure_layers, measure_sum
from .report import report

log = logging.getLogger("farspan")


class CheckFailed(RuntimeError):
    """The run would not go well; the message has all reasons."""


@dataclass(frozen=True)
class Files:
    """The weights that a rank will read: how many files and bytes, name → digest of each, and what is wrong."""

    count: int
    size: int
    sums: dict[str, str]
    known: bool
    """Whether the folder says what the digests should be."""
    problems: list[str]


def check(config: Config, meeting: Rendezvous, network: Network) -> None:
    """Raises `CheckFailed`, on all ranks, unless the run can be started; rank 0 has printed its findings by then."""
    setup = set_up(config, meeting, network)
    spec, units, plan, device, dtype = setup.spec, setup.units, setup.plan, setup.device, setup.dtype
    topology, place = setup.topology, setup.place
    if config.rank == 0:
        log.info("--check: reading weights, planning memory")
    files = look_at_files(setup.store, units) if setup.store is not None else Files(0, 0, {}, True, [])
    need = estimate(
        spec, units, plan[place.stage], rows=config.micro_batch_size, length=config.seq_length, dtype=dtype,
        device=device, recompute=config.recompute, optimizer=config.optimizer_kind, offload=config.use_offload,
        shards=topology.replicas if config.dp_mode == "zero1" else 1, documents=config.document_mask,
    )  # fmt: skip
    pools = {
        host_pool(): [free_host_memory(), need.on_host if device.type == "cuda" else need.on_host + need.on_device]
    }
    if device.type == "cuda":
        pools[gpu_pool(device)] = [torch.cuda.mem_get_info(device)[0], need.on_device]
    told = {
        "what": describe(units, spec), "network": network_here(),
        "need": asdict(need), "pools": pools, "files": asdict(files),
    }  # fmt: skip
    ranks = meeting.exchange("check: plans", told, config.wire_timeout)
    problems = file_problems(ranks) + memory_problems(ranks)

    message = config.micro_batch_size * config.seq_length * spec.width * dtype.itemsize
    wires = connect(config, topology, meeting, network, spec.tied, device, None)
    if config.rank == 0:
        log.info("--check: measuring the network")
    edges = list(edges_of(config, topology, plan, message))
    rounds = in_rounds(edges, [rank["network"] for rank in ranks])
    found = measure_network(setup, wires, rounds)
    found["sums"] = asdict(_sums(setup, wires))
    found["tie"], found["vote"] = _tie_and_vote(setup, wires)
    if not problems:
        if config.rank == 0:
            log.info("--check: measuring layers")
        if wires.world is not None:
            wires.world.barrier(timeout_s=config.wire_timeout)
        found["layers"] = asdict(measure_layers(config, spec, units, dtype, device))
    all_found = meeting.exchange("check: figures", found, config.wire_timeout)
    wires.close()

    figures = [(Edge(**edge), EdgeFigures(**seen)) for each in all_found for edge, seen in each["edges"]]
    step, better = None, ""
    if not problems:
        step = simulated(setup, figures, all_found)
        better = better_split(spec, topology, setup.split, all_found, partial(simulated, setup, figures))
    if config.rank == 0:
        sys.stdout.write(report(config, topology, ranks, figures, all_found, step, problems, better))
        sys.stdout.flush()
    if problems:
        raise CheckFailed(f"--check: do not start this run: {'; '.join(problems)}")


def look_at_files(store: ShardStore, units: range) -> Files:
    """Are the units' files here, whole, and as the folder's SHA256SUMS says?"""
    problems: list[str] = []
    sums: dict[str, str] = {}
    size = 0
    names = sorted({name for unit in units for name in store.unit_files(unit)})
    try:
        known = read_sums(store.folder)
    except ShardError as error:
        known, problems = {}, [str(error)]
    for name in names:
        path = store.folder / name
        if not path.is_file():
            problems.append(f"{path} is missing: copy it here")
            continue
        size += path.stat().st_size
        sums[name] = sha256(path)
        if known.get(name, sums[name]) != sums[name]:
            problems.append(f"{path} is not what {SUMS} says (its digest is {sums[name][:12]}…): copy it again")
    return Files(len(names), size, sums, bool(known), problems)


def file_problems(ranks: Sequence[dict[str, Any]]) -> list[str]:
    """What the ranks found, and files that two of them have differently."""
    problems = [f"rank {rank}: {line}" for rank, told in enumerate(ranks) for line in told["files"]["problems"]]
    differ = None if problems else first_difference([told["files"]["sums"] for told in ranks])
    return problems if differ is None else [f"{differ}: copy one over the other"]


def memory_problems(ranks: Sequence[dict[str, Any]]) -> list[str]:
    """Ranks that share memory (a host, a GPU) need it together."""
    shares: dict[str, list[tuple[int, float, float]]] = {}
    for rank, told in enumerate(ranks):
        for pool, (free, need) in told["pools"].items():
            shares.setdefault(pool, []).append((rank, free, need))
    problems = []
    for pool, members in shares.items():
        free, need = min(free for _, free, _ in members), sum(need for _, _, need in members)
        if need > free:
            who = ", ".join(str(rank) for rank, _, _ in members)
            problems.append(
                f"rank {who}: {need / 2**30:.1f} GiB will be needed of {pool.split(' ')[0]} and {free / 2**30:.1f} GiB "
                "are free: see 'When memory is short' in docs/training.md"
            )
    return problems


def free_host_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its container where that has a limit."""
    free: int = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return max(free, 0)


def host_pool() -> str:
    return f"{os.uname().nodename} {host_here()}"


def gpu_pool(device: torch.device) -> str:
    return f"{os.uname().nodename}:{device} {torch.cuda.get_device_properties(device).uuid}"


def measure_network(setup: Setup, wires: Wires, rounds: Sequence[Sequence[Edge]]) -> dict[str, Any]:
    if wires.world is None:
        return {"edges": []}
    found = measure_edges(rounds, wires.groups, wires.world, setup.meeting, setup.config.wire_timeout)
    return {"edges": [(asdict(edge), asdict(figures)) for edge, figures in found]}


def _sums(setup: Setup, wires: Wires) -> Sum:
    """What this stage's gradients take over replicas; one stage after the other."""
    config, found = setup.config, Sum()
    for stage in range(setup.topology.stages if wires.peers is not None else 0):
        assert wires.world is not None
        wires.world.barrier(timeout_s=config.wire_timeout)
        if stage != setup.place.stage or wires.peers is None:
            continue
        sharded = config.dp_mode == "zero1"
        elements = sum(unit_elements(setup.spec, unit) for unit in setup.units)
        most = min(int(config.bucket_mb * 1e6 / 4), elements)
        how = "reduce_scatter" if sharded else "all_reduce"
        full = measure_sum(wires.peers, most, config.wire_timeout, how)
        spread = measure_sum(wires.peers, most, config.wire_timeout, "all_gather") if sharded else 0.0
        count = elements / most
        buckets = (full * (count % 1),) * (count % 1 > 0) + (full,) * int(count)
        found = Sum(buckets, spread * count * setup.dtype.itemsize / 4)
    return found


def _tie_and_vote(setup: Setup, wires: Wires) -> tuple[float, float]:
    spec, timeout_s = setup.spec, setup.config.wire_timeout
    tie = vote = 0.0
    if wires.world is None:
        return tie, vote
    wires.world.barrier(timeout_s=timeout_s)
    if wires.tie is not None:
        tie = measure_sum(wires.tie, spec.vocab * spec.width, timeout_s)
    wires.world.barrier(timeout_s=timeout_s)
    return tie, measure_sum(wires.world, 16 * setup.topology.world, timeout_s)


def simulated(setup: Setup, figures: Sequence[tuple[Edge, EdgeFigures]], found: Sequence[dict[str, Any]]) -> StepTime:
    """One update of a run, from what was measured."""
    config, topology = setup.config, setup.topology
    layers = [LayerSeconds(**each["layers"]) for each in found]
    costs = []
    for replica in range(topology.replicas):
        line = topology.pipeline(replica)
        wires = {
            (line.index(edge.source), line.index(edge.target)): Wire(
                seen.burst_s, seen.round_trip_s / 2, seen.turn_s, 0.2 + seen.round_trip_s
            )
            for edge, seen in figures
            if edge.kind == "pipeline" and edge.source in line
        }
        costs.append(
            Costs(tuple(layers[r].forward for r in line), tuple(layers[r].backward for r in line), wires=wires)
        )
    carried = 4 * (1 + config.batch_size * config.seq_length)
    feed = [seen.round_trip_s + carried / seen.one_rate for edge, seen in figures if edge.kind == "data"]
    first = topology.pipeline(0)
    return step_time(
        setup.plan,
        costs,
        accumulate=config.gradient_accumulate_step,
        sums=[Sum(tuple(found[r]["sums"]["buckets"]), found[r]["sums"]["spread"]) for r in first],
        tie=max(each["tie"] for each in found),
        vote=max(each["vote"] for each in found),
        optimizer=[max(layers[r].update for r in topology.peers(stage)) for stage in range(topology.stages)],
        feed=config.gradient_accumulate_step * max(feed, default=0.0),
    )
