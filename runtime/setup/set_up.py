"""What `train` and `--check` begin with: the same steps and exchanges, in one order on all ranks."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from ...comm.meeting.rendezvous import Rendezvous
from ...comm.topology import Coord, Topology
from ...modules.shards import ShardStore
from ...modules.spec import ModelSpec
from ...pipeline.partition import stage_units
from ...pipeline.schedule import Plan
from ..data.tokenizer import Vocabulary
from ..flags.config import Config
from ..observe.backends import check_backends
from ..optim.precision import compute_dtype
from ..training.as_test import shortened
from .network import Network
from .notices import notices
from .prepare import (
    check_model,
    describe,
    keep_freed_memory,
    make_plan,
    open_model,
    open_vocabulary,
    pick_device,
    shake_hands,
    share_threads,
)
from .split import Split, layer_split, told

log = logging.getLogger("farspan")


@dataclass(frozen=True)
class Setup:
    """What one rank stands on before it reads data or weights."""

    config: Config
    """As given, but --as-test has shortened it; `load` replaces it once more, where it turns --nepochs into steps."""
    meeting: Rendezvous
    network: Network
    topology: Topology
    place: Coord
    store: ShardStore | None
    """The pretrained weights' folder; None with --load-pretrained-model false."""
    spec: ModelSpec
    """With the tokens that --special-tokens add."""
    split: Split
    plan: Plan
    device: torch.device
    vocabulary: Vocabulary | None
    """Rank 0's alone."""

    @property
    def units(self) -> range:
        """Of this rank's stage."""
        return stage_units(self.split, self.place.stage)

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.config)


def set_up(config: Config, meeting: Rendezvous, network: Network) -> Setup:
    """All ranks call it together. Raises what `prepare`'s functions raise, e.g. `Mismatch` where the ranks differ."""
    topology = Topology(config.data_group_size, config.pipeline_group_size)
    place = topology.coord(config.rank)
    store, spec = open_model(config)
    check_model(config, spec)
    split = layer_split(config, spec)
    plan = make_plan(config)
    shake_hands(meeting, config, spec)
    if config.as_test and not config.check:  # the ranks have compared the flags of the real run
        config = shortened(config)
    device = pick_device(config, network)
    for line in notices(config, device.type) if config.rank == 0 else ():
        log.warning("%s", line)
    threads = share_threads(meeting)
    keep_freed_memory()
    if not config.check:  # its report says this
        if config.rank == 0 and topology.stages > 1:
            log.info(told(config, spec, split))
        log.info(
            "rank %d: replica %d, stage %d of %d, %s, on %s%s, interface %s",
            config.rank, place.replica, place.stage, topology.stages,
            describe(stage_units(split, place.stage), spec), device, threads, network,
        )  # fmt: skip
    if config.rank == 0:
        check_backends(config)
    vocabulary = open_vocabulary(config, spec) if config.rank == 0 else None
    # Only rank 0 has the tokenizer, and every rank must know how many tokens --special-tokens make it.
    spec = spec.grown(meeting.exchange("tokens", vocabulary.size if vocabulary else 0, config.wire_timeout)[0])
    return Setup(config, meeting, network, topology, place, store, spec, split, plan, device, vocabulary)
