"""Gradients of one stage as fp32 sums in one flat buffer, so that each is added in place and reduced in buckets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

ALIGN = 16
"""Elements: every view, bucket and shard starts on a cache line, where vectorised kernels start a vector."""


class Gradients:
    """`views[i]` collects the gradient of `parameters[i]` in fp32, whatever the parameter's own type.

    `flat` is cut into `buckets`, each a (start, stop) of at most `bucket_elements` elements (0: all in one), and each
    bucket into `shards` equal parts, of which replica r owns the r-th.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, shards: int = 1, bucket_elements: int = 0) -> None:
        grain = ALIGN * shards
        self.offsets, total = [], 0
        for parameter in parameters:
            self.offsets.append(total)
            total += _up(parameter.numel(), ALIGN)
        total = _up(total, grain)
        self.shards = shards
        self.flat = torch.zeros(total, dtype=torch.float32, device=parameters[0].device)
        size = _up(bucket_elements or total, grain)
        self.buckets = [(start, min(start + size, total)) for start in range(0, total, size)]
        self.views: list[Tensor] = []
        self._count = [0] * len(parameters)
        self._usual: list[int] | None = None
        self._on_ready: Callable[[int], None] | None = None
        self._missing: list[set[int]] = []
        self._next = -1
        for index, (parameter, offset) in enumerate(zip(parameters, self.offsets, strict=True)):
            view = self.flat[offset : offset + parameter.numel()].view_as(parameter)
            self.views.append(view)
            if parameter.dtype == torch.float32:
                parameter.grad = view  # autograd adds to an existing gradient in place
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, index))

    def zero(self) -> None:
        self.flat.zero_()

    def square_sum(self, skip: Tensor | None = None) -> float:
        """Σ g², without the view `skip`; summed over tensors in double precision."""
        return square_sum([view for view in self.views if view is not skip])

    def owned(self, replica: int) -> list[tuple[int, int]]:
        """The (start, stop) in `flat` that `replica` owns: its part of each bucket."""
        return [
            (start + replica * part, start + (replica + 1) * part)
            for start, stop in self.buckets
            for part in ((stop - start) // self.shards,)
        ]

    def watch(self, on_ready: Callable[[int], None]) -> None:
        """Until `unwatch`, call `on_ready(bucket)` as soon as a bucket has its last gradient, last bucket first.

        How often autograd adds to each gradient is counted the first time (micro-batches, uses, recomputation), and
        relied on from then on: the first time all buckets are left to the caller.
        """
        self._count = [0] * len(self.views)
        self._on_ready, self._next = on_ready, len(self.buckets) - 1
        spans = [(offset, offset + view.numel()) for offset, view in zip(self.offsets, self.views, strict=True)]
        self._missing = [
            {i for i, (first, last) in enumerate(spans) if first < stop and start < last}
            for start, stop in self.buckets
        ]

    def unwatch(self) -> None:
        self._on_ready = None
        if self._usual is None:
            self._usual = self._count

    def _arrived(self, index: int, parameter: nn.Parameter) -> None:
        if parameter.dtype != torch.float32:
            assert parameter.grad is not None
            self.views[index].add_(parameter.grad)
            parameter.grad = None
        if self._on_ready is None:
            return
        self._count[index] += 1
        if self._usual is None:
            return
        if self._count[index] > self._usual[index]:
            raise RuntimeError(f"gradient {index} was added to more often than in the step before: it may be sent")
        if self._count[index] == self._usual[index]:
            for missing in self._missing:
                missing.discard(index)
            while self._next >= 0 and not self._missing[self._next]:
                self._next -= 1
                self._on_ready(self._next + 1)


def square_sum(tensors: list[Tensor]) -> float:
    """Σ x² over all elements, summed in double precision: cut otherwise (by ZeRO-1, say) the same elements give a norm,
    and so a factor of clipping, that is the same fp32 number."""
    if not tensors:
        return 0.0
    return float(torch.stack(torch._foreach_norm(tensors, 2, torch.float64)).square().sum())


def _up(size: int, grain: int) -> int:
    return -(-size // grain) * grain
