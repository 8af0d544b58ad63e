"""Gradients over replicas, and over the two stages that hold a tied embedding."""

from __future__ import annotations

from torch import Tensor

from ..comm.groups.group import Group
from ..comm.lanes.lane import Lane
from .gradients import Gradients


class Replicas:
    """Sums a stage's gradients over all replicas, and the tied matrix's over its two stages.

    The order matters, since the two copies of the tied matrix must get the same gradient bit for bit. Each all-reduce
    leaves the same bits on all who took part, but how it orders a sum depends on where an element lies: so the pair
    comes last. With `sharded` buffers (ZeRO-1) each replica gets the sums of its own shard only, and the two stages cut
    the matrix in different places: so the pair comes first, and reduce-scatter adds in the replicas' order everywhere.
    """

    def __init__(
        self,
        gradients: Gradients,
        peers: Group | None,
        tie: Group | None,
        tied: Tensor | None,
        timeout_s: float,
        *,
        sharded: bool = False,
    ) -> None:
        self._gradients, self._peers, self._timeout_s, self._sharded = gradients, peers, timeout_s, sharded
        self._tie, self._tied = tie, tied if tie is not None else None
        self._left = list(reversed(range(len(gradients.buckets))))
        self._held = {b for b in self._left if sharded and self._is_tied(b)}
        self._watching = False

    def overlap(self, lane: Lane) -> None:
        """From here to `reduce`, buckets are summed on `lane` while the backward passes that fill others go on."""
        if self._peers is None:
            return

        def submit(bucket: int) -> None:
            if bucket not in self._held:
                self._left.remove(bucket)
                lane.submit(lambda: self._sum(bucket), label=f"bucket {bucket}")

        self._gradients.watch(submit)
        self._watching = True

    def reduce(self) -> None:
        """Sum what is not summed yet. On the lane that `overlap` was given, everything is summed when this is done."""
        if self._watching:
            self._gradients.unwatch()
            self._watching = False
        for bucket in self._left:
            if bucket not in self._held:
                self._sum(bucket)
        if self._tied is not None:
            assert self._tie is not None
            self._tie.all_reduce(
                self._tied, timeout_s=self._timeout_s, operation="summing the tied embedding's gradient"
            )
        for bucket in self._left:
            if bucket in self._held:
                self._sum(bucket)
        self._left = list(reversed(range(len(self._gradients.buckets))))

    def gather(self, weights: Tensor) -> None:
        """`weights`, laid out as the flat gradients, has this replica's shard: fill in the others'."""
        assert self._peers is not None
        for start, stop in self._gradients.buckets:
            self._peers.all_gather(
                weights[start:stop], timeout_s=self._timeout_s, operation="spreading weights over replicas"
            )

    def complete(self, index: int, x: Tensor) -> None:
        """`x`, in host memory and shaped like parameter `index`, has this replica's shard of some state of it: fill in
        the others'. All replicas must call this together."""
        assert self._peers is not None
        offset, values = self._gradients.offsets[index], x.view(-1)
        for replica, member in enumerate(self._peers.members):
            for start, stop in self._gradients.owned(replica):
                part = values[max(start - offset, 0) : max(stop - offset, 0)]
                if part.numel():
                    self._peers.broadcast(
                        part, member, timeout_s=self._timeout_s, operation="collecting the optimizer's state"
                    )

    def _is_tied(self, bucket: int) -> bool:
        if self._tied is None:
            return False
        start, stop = self._gradients.buckets[bucket]
        first = self._tied.storage_offset()
        return first < stop and start < first + self._tied.numel()

    def _sum(self, bucket: int) -> None:
        if self._peers is None:
            return
        start, stop = self._gradients.buckets[bucket]
        combine = self._peers.reduce_scatter if self._sharded else self._peers.all_reduce
        combine(
            self._gradients.flat[start:stop], timeout_s=self._timeout_s, operation="summing gradients over replicas"
        )
