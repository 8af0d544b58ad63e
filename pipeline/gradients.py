"""Gradients of one stage as fp32 sums in one flat buffer, so that each is added in place and reduced in one go."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_ALIGN = 16  # elements: every view starts on a cache line


class Gradients:
    """`views[i]` collects the gradient of `parameters[i]` in fp32, whatever the parameter's own type."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        sizes = [-(-p.numel() // _ALIGN) * _ALIGN for p in parameters]
        device = parameters[0].device
        self.flat = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        self.views: list[Tensor] = []
        offset = 0
        for parameter, size in zip(parameters, sizes, strict=True):
            view = self.flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += size
            self.views.append(view)
            if parameter.dtype == torch.float32:
                parameter.grad = view  # autograd adds to an existing gradient in place
            else:
                parameter.register_post_accumulate_grad_hook(lambda p, v=view: _move(p, v))

    def zero(self) -> None:
        self.flat.zero_()

    def square_sum(self, skip: Tensor | None = None) -> float:
        """Σ g², without the view `skip`; summed over tensors in double precision."""
        counted = [view for view in self.views if view is not skip]
        norms = torch.stack(torch._foreach_norm(counted))
        return float(norms.double().square().sum())


def _move(parameter: nn.Parameter, view: Tensor) -> None:
    assert parameter.grad is not None
    view.add_(parameter.grad)
    parameter.grad = None
