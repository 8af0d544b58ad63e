"""Bytes on a wire: as many as shape and dtype say, and the same tensor at the other end, bit for bit."""

from __future__ import annotations

import pytest
import torch
from farspan.comm.codecs.codec import RawCodec
from torch import Tensor

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)


def make(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)


def bits(x: Tensor) -> list[int]:
    return x.contiguous().reshape(-1).view(torch.uint8).tolist()


VIEWS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1),
    "every second": lambda x: x[::2],
    "a column": lambda x: x[..., 1],
    "expanded": lambda x: x[:1].expand(5, *x.shape[1:]),
    "a scalar": lambda x: x.flatten()[3],
    "empty": lambda x: x[:0],
    "not at the start": lambda x: x[1:],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back(dtype: torch.dtype, view: str) -> None:
    codec, x = RawCodec(), VIEWS[view](make((6, 3, 4), dtype))
    wire = codec.encode(x)
    assert (wire.dtype, wire.ndim, wire.device) == (torch.uint8, 1, CPU)
    assert len(wire) == codec.nbytes(tuple(x.shape), dtype) == x.numel() * x.element_size()
    back = codec.decode(wire, tuple(x.shape), dtype, CPU)
    assert back.dtype == dtype
    assert back.shape == x.shape
    assert bits(back) == bits(x)


def test_what_is_not_a_number_arrives_as_it_was() -> None:
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    codec = RawCodec()
    assert bits(codec.decode(codec.encode(odd), (4,), torch.float32, CPU)) == bits(odd)


def test_nothing_is_copied_in_host_memory() -> None:
    codec, x = RawCodec(), make((4, 5), torch.float32)
    wire = codec.encode(x)
    assert wire.data_ptr() == x.data_ptr()
    assert codec.decode(wire, (4, 5), torch.float32, CPU).data_ptr() == x.data_ptr()


def test_a_graph_does_not_travel() -> None:
    x = make((3,), torch.float32).requires_grad_()
    codec = RawCodec()
    back = codec.decode(codec.encode(x * 2), (3,), torch.float32, CPU)
    assert not back.requires_grad
    assert torch.equal(back, (x * 2).detach())
