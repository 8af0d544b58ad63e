"""How a tensor becomes bytes on a wire. The number of bytes follows from shape and dtype: no size is ever sent."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Codec(Protocol):
    """Both ways may return views: what goes in must not be written to afterwards."""

    name: str

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int: ...

    def encode(self, x: Tensor) -> Tensor:
        """Any tensor → [nbytes] uint8 on its device."""
        ...

    def decode(self, wire: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """[nbytes] uint8 → `shape` of `dtype` on `device`."""
        ...


class RawCodec:
    """The tensor's own bytes, without a copy where it is contiguous."""

    name = "raw"

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        count = 1
        for size in shape:
            count *= size
        return count * dtype.itemsize

    def encode(self, x: Tensor) -> Tensor:
        return x.detach().contiguous().reshape(-1).view(torch.uint8)

    def decode(self, wire: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return wire.view(dtype).view(shape).to(device)
