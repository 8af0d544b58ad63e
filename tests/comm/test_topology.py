"""Ranks and places are one to one."""

from __future__ import annotations

import pytest
from farspan.comm.topology import Coord, Topology
from hypothesis import given
from hypothesis import strategies as st

grids = st.builds(Topology, st.integers(1, 12), st.integers(1, 12))


@given(grids)
def test_ranks_and_places_are_a_bijection(grid: Topology) -> None:
    places = [grid.coord(rank) for rank in range(grid.world)]
    assert set(places) == {Coord(r, s) for r in range(grid.replicas) for s in range(grid.stages)}
    assert [grid.rank(place) for place in places] == list(range(grid.world))


@given(grids)
def test_pipelines_and_peers_are_rows_and_columns(grid: Topology) -> None:
    lines = [grid.pipeline(replica) for replica in range(grid.replicas)]
    assert [grid.peers(stage) for stage in range(grid.stages)] == list(zip(*lines, strict=True))
    assert sorted(rank for line in lines for rank in line) == list(range(grid.world))
    for replica, line in enumerate(lines):
        assert [grid.coord(rank) for rank in line] == [Coord(replica, stage) for stage in range(grid.stages)]


def test_stages_of_one_replica_have_neighbouring_ranks() -> None:
    grid = Topology(replicas=2, stages=3)
    assert grid.pipeline(1) == (3, 4, 5)
    assert grid.peers(2) == (2, 5)
    assert grid.coord(4) == Coord(replica=1, stage=1)


@given(grids, st.integers(0, 3))
def test_a_rank_outside_the_grid_is_refused(grid: Topology, more: int) -> None:
    for rank in (-1 - more, grid.world + more):
        with pytest.raises(ValueError, match=f"^rank {rank} is outside a grid of {grid.replicas} x {grid.stages}$"):
            grid.coord(rank)
