"""Tensors between host and device memory. What lies in the right place already is never copied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def placed(x: Tensor, device: torch.device, *, read: bool = True, write: bool = True) -> Iterator[Tensor]:
    """`x` on `device`, for a library that works there: `x` itself, or a copy of it.

    `read`: the library reads it; `write`: what it wrote goes back to `x`. Copies are queued on the current stream, and
    those in host memory are pinned; the host waits only where the library is about to read one.
    """
    if x.device == device:
        yield x
        return
    to_host = device.type == "cpu"
    copy = torch.empty(x.shape, dtype=x.dtype, device=device, pin_memory=to_host)
    if read:
        copy.copy_(x, non_blocking=to_host)
        if to_host:
            there = torch.cuda.Event(blocking=True)  # sleeps, where a stream's own `synchronize` would spin
            there.record(torch.cuda.current_stream(x.device))
            there.synchronize()
    yield copy
    if write:
        x.copy_(copy, non_blocking=to_host)


def host_memory(nbytes: int, device: torch.device) -> Tensor:
    """[nbytes] uint8 in host memory, from which `device` can read without a further copy."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type != "cpu")


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x`, of host memory where it is not there yet, on `device`; the host does not wait for what that is doing."""
    return x if x.device == device else x.pin_memory().to(device, non_blocking=True)
