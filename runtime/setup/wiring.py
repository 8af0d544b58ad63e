"""All groups, lanes and links of one rank."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from ...comm.codecs.codec import RawCodec
from ...comm.groups.group import Group
from ...comm.lanes.lane import Lane, Recorder
from ...comm.link import WINDOW, Receiver, Sender
from ...comm.meeting.rendezvous import Rendezvous
from ...comm.meeting.verify import network_here, verify_interfaces
from ...comm.topology import Coord, Topology
from ...comm.transport import Transport, Wanted
from ...pipeline.executor import Edges
from ..flags.config import Config
from ..training.feed import Ends
from .network import Network


@dataclass
class Wires:
    """What a rank talks through. `close` finishes what is under way first."""

    edges: Edges
    ends: Ends
    peers: Group | None
    tie: Group | None
    world: Group | None
    collectives: Lane
    data: Lane
    transport: Transport | None = None

    @property
    def lanes(self) -> list[Lane]:
        return self.transport.lanes if self.transport is not None else []

    @property
    def groups(self) -> dict[str, Group]:
        return self.transport.groups if self.transport is not None else {}

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()


def backend_of(config: Config, group: str) -> str:
    """What carries a group of `group_members`. Tokens, labels and the world's votes lie in host memory."""
    if group.startswith("replicas"):
        return config.dp_library
    return config.pp_library if group[0].isdigit() or group.startswith("tied") else "gloo"


def fed(topology: Topology, positions: bool) -> Iterator[tuple[str, int]]:
    """What rank 0 sends of the data, and to whom; `positions` with --document-mask alone."""
    to = {"tokens": topology.peers(0), "labels": topology.peers(topology.stages - 1)}
    if positions:
        to["positions"] = tuple(range(topology.world))
    yield from ((kind, rank) for kind, ranks in to.items() for rank in ranks if rank != 0)


def group_members(topology: Topology, tied: bool, positions: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every group of a run, in one order on all ranks.

    Each directed edge is a group of its own: two directions never block each other.
    """
    for replica in range(topology.replicas):
        line = topology.pipeline(replica)
        for a, b in pairwise(line):
            yield f"{a}→{b}", (a, b)
            yield f"{b}→{a}", (a, b)
        if tied and topology.stages > 1:
            yield f"tied embedding of replica {replica}", (line[0], line[-1])
    for kind, rank in fed(topology, positions):
        yield f"{kind}→{rank}", (0, rank)
    if topology.replicas > 1:
        for stage in range(topology.stages):
            yield f"replicas of stage {stage}", topology.peers(stage)
    if topology.world > 1:
        yield "world", tuple(range(topology.world))


def connect(
    config: Config,
    topology: Topology,
    meeting: Rendezvous,
    network: Network,
    tied: bool,
    device: torch.device,
    record: Recorder | None,
) -> Wires:
    """Create this rank's groups and lanes; blocks until all peers have come."""
    rank = meeting.rank
    here = topology.coord(rank)
    transport = Transport(meeting, device, config.join_timeout, record)
    groups, lane = transport.groups, transport.lane
    transport.connect(
        Wanted(backend_of(config, name), name, members, network.of(name))
        for name, members in group_members(topology, tied, config.document_mask)
        if rank in members
    )
    # NCCL's sockets are bound to the interface by NCCL itself, and need not be what carries its bytes.
    if gloo := [group for name, group in groups.items() if backend_of(config, name) == "gloo"]:
        told = meeting.exchange("network", [network_here(), os.urandom(16).hex()])
        networks, nonces = zip(*told, strict=True)
        verify_interfaces(gloo, networks, meeting.key("".join(nonces)), config.join_timeout, meeting.liveness.check)
    codec, timeout_s = RawCodec(), config.wire_timeout

    def sender(name: str, to: int, lane_name: str) -> Sender:
        return Sender(groups[name], to, codec, lane(lane_name), timeout_s)

    def receiver(name: str, source: int, lane_name: str, to_device: torch.device = device) -> Receiver:
        group, its_lane = groups[name], lane(lane_name, host=to_device.type == "cpu")
        return Receiver(group, source, codec, its_lane, timeout_s, device=to_device, depth=group.ahead, window=WINDOW)

    before = topology.rank(Coord(here.replica, here.stage - 1)) if here.stage > 0 else None
    after = topology.rank(Coord(here.replica, here.stage + 1)) if here.stage + 1 < topology.stages else None
    edges = Edges(
        from_previous=receiver(f"{before}→{rank}", before, "forward receive") if before is not None else None,
        to_previous=sender(f"{rank}→{before}", before, "backward send") if before is not None else None,
        from_next=receiver(f"{after}→{rank}", after, "backward receive") if after is not None else None,
        to_next=sender(f"{rank}→{after}", after, "forward send") if after is not None else None,
    )
    feeders: dict[str, dict[int, Sender]] = {"tokens": {}, "labels": {}, "positions": {}}
    for kind, to in fed(topology, config.document_mask) if rank == 0 else ():
        name = f"{kind}→{to}"
        feeders[kind][to] = Sender(groups[name], to, codec, lane(name, host=True), timeout_s)

    def arriving(kind: str) -> Receiver | None:
        name = f"{kind}→{rank}"
        return receiver(name, 0, kind, torch.device("cpu")) if name in groups else None

    ends = Ends(
        tokens_to=feeders["tokens"],
        labels_to=feeders["labels"],
        positions_to=feeders["positions"],
        tokens_from=arriving("tokens"),
        labels_from=arriving("labels"),
        positions_from=arriving("positions"),
    )
    return Wires(
        edges,
        ends,
        peers=groups.get(f"replicas of stage {here.stage}"),
        tie=groups.get(f"tied embedding of replica {here.replica}"),
        world=groups.get("world"),
        collectives=lane("gradients"),
        data=lane("data", host=True),
        transport=transport,
    )
