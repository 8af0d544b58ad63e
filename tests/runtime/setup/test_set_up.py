"""What `train` and `--check` begin with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from farspan.comm.meeting.interfaces import interface
from farspan.comm.meeting.rendezvous import Rendezvous
from farspan.runtime.flags.config import Config
from farspan.runtime.setup.network import Network
from farspan.runtime.setup.set_up import set_up


class Meeting:
    """Of a rank whose every neighbour says what it says."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world, self.topics = rank, world, list[str]()
        self.agreed: dict[str, str] = {}

    def exchange(self, topic: str, value: Any, _timeout_s: float | None = None) -> list[Any]:  # noqa: ANN401
        self.topics.append(topic)
        return [value] * self.world

    def agree(self, values: dict[str, str]) -> None:
        self.topics.append("handshake")
        self.agreed = values


@pytest.mark.parametrize("rank", [0, 1])
def test_both_ways_make_the_same_exchanges(rank: int, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of --as-test, the ranks compare the real run's flags; `--check` judges the real run."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for the tests that follow, this process stays as it is
    monkeypatch.setattr("farspan.runtime.setup.set_up.keep_freed_memory", lambda: None)
    config = Config(
        model_name=str(model), pipeline_group_size=2, world_size=2, rank=rank, seq_length=16, total_steps=8,
        gradient_accumulate_step=2, use_cuda="false",
    )  # fmt: skip
    network, ways = Network(interface("lo"), interface("lo"), named=True), []
    for check, as_test in ((False, False), (True, False), (False, True), (True, True)):
        meeting = Meeting(rank, 2)
        given = replace(config, check=check, as_test=as_test)
        setup = set_up(given, cast(Rendezvous, meeting), network)
        assert setup.config.total_steps == (2 if as_test and not check else 8)
        assert meeting.agreed["--total-steps"] == "8"
        assert (setup.vocabulary is not None) == (rank == 0)
        assert setup.units == (range(0, 4) if rank == 0 else range(4, 7))
        ways.append(meeting.topics)
    assert ways == [["handshake", "host", "tokens"]] * 4
