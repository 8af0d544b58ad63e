"""Where each rank stands in the grid of replicas and stages. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Coord:
    """A rank's place: `replica` counts pipelines, `stage` counts positions within one."""

    replica: int
    stage: int


@dataclass(frozen=True)
class Topology:
    """`replicas` pipelines of `stages` stages each; rank = replica * stages + stage."""

    replicas: int
    stages: int

    @property
    def world(self) -> int:
        return self.replicas * self.stages

    def rank(self, coord: Coord) -> int:
        return coord.replica * self.stages + coord.stage

    def coord(self, rank: int) -> Coord:
        if not 0 <= rank < self.world:
            raise ValueError(f"rank {rank} is outside a grid of {self.replicas} x {self.stages}")
        return Coord(*divmod(rank, self.stages))

    def pipeline(self, replica: int) -> tuple[int, ...]:
        """The ranks of one pipeline, first stage first."""
        return tuple(self.rank(Coord(replica, stage)) for stage in range(self.stages))

    def peers(self, stage: int) -> tuple[int, ...]:
        """The ranks that hold the same stage, one of each replica."""
        return tuple(self.rank(Coord(replica, stage)) for replica in range(self.replicas))
