"""One flat fp32 buffer of gradients, whatever the parameters' own type."""

from __future__ import annotations

import pytest
import torch
from farspan.pipeline.gradients import Gradients, square_sum
from torch import Tensor, nn

SHAPES = ((3, 5), (7,), (16,), (1,), (4, 2, 3))


def make(dtype: torch.dtype) -> tuple[list[nn.Parameter], Gradients]:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    return parameters, Gradients(parameters)


def backward(parameters: list[nn.Parameter], factors: list[Tensor]) -> None:
    """Σ factor · parameter: the gradient of each parameter is its factor."""
    torch.stack([(p * f).sum().float() for p, f in zip(parameters, factors, strict=True)]).sum().backward()


def factors(dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_add_up_in_place_in_fp32(dtype: torch.dtype) -> None:
    parameters, gradients = make(dtype)
    views, storage = list(gradients.views), gradients.flat.data_ptr()
    expected = [torch.zeros(shape) for shape in SHAPES]
    for seed in range(40):
        backward(parameters, factors(dtype, seed))
        for total, factor in zip(expected, factors(dtype, seed), strict=True):
            total += factor.float()
    for parameter, view, want in zip(parameters, gradients.views, expected, strict=True):
        assert view.dtype == torch.float32
        assert view.shape == parameter.shape
        assert torch.equal(view, want)  # the same sums in the same order: bf16 sums would be far off
        assert view.untyped_storage().data_ptr() == storage
    assert all(a is b for a, b in zip(views, gradients.views, strict=True))
    assert gradients.flat.data_ptr() == storage


def test_a_bf16_parameter_keeps_no_gradient_of_its_own() -> None:
    parameters, gradients = make(torch.bfloat16)
    backward(parameters, factors(torch.bfloat16, 0))
    assert [parameter.grad for parameter in parameters] == [None] * len(SHAPES)
    assert gradients.flat.count_nonzero() > 0


def test_a_parameter_that_is_used_twice_counts_twice() -> None:
    """As a tied matrix is: the hook must see the sum of both uses once, not each use."""
    for dtype in (torch.float32, torch.bfloat16):
        parameter = nn.Parameter(torch.ones(4, dtype=dtype))
        gradients = Gradients([parameter])
        (2 * parameter + 3 * parameter).sum().backward()
        assert gradients.views[0].tolist() == [5.0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_starts_anew(dtype: torch.dtype) -> None:
    parameters, gradients = make(dtype)
    backward(parameters, factors(dtype, 0))
    gradients.zero()
    assert gradients.flat.count_nonzero() == 0
    backward(parameters, factors(dtype, 1))
    for view, want in zip(gradients.views, factors(dtype, 1), strict=True):
        assert torch.equal(view, want.float())


def test_views_do_not_overlap_and_start_on_cache_lines() -> None:
    _, gradients = make(torch.float32)
    for i, view in enumerate(gradients.views):
        assert view.storage_offset() % 16 == 0
        view.fill_(i + 1)
    counts = [int((gradients.flat == i + 1).sum()) for i in range(len(SHAPES))]
    assert counts == [torch.Size(shape).numel() for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_square_sum_is_the_norm_that_torch_clips_by(dtype: torch.dtype) -> None:
    parameters, gradients = make(dtype)
    backward(parameters, factors(dtype, 0))
    grads = [factor.float() for factor in factors(dtype, 0)]
    assert gradients.square_sum() == pytest.approx(float(torch.nn.utils.get_total_norm(grads)) ** 2, rel=1e-5)
    assert gradients.square_sum(skip=gradients.views[1]) == pytest.approx(
        gradients.square_sum() - float(grads[1].square().sum()), rel=1e-5
    )
    # An equal tensor is not the one to skip.
    assert gradients.square_sum(skip=gradients.views[1].clone()) == gradients.square_sum()


def test_square_sum_does_not_depend_on_where_tensors_are_cut() -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    assert square_sum(list(x.split(1_600))) == pytest.approx(square_sum([x]), rel=1e-14)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_square_sum_shows_what_is_not_finite(bad: float) -> None:
    _, gradients = make(torch.float32)
    gradients.views[2][3] = bad
    assert not torch.tensor(gradients.square_sum()).isfinite()
    assert gradients.square_sum(skip=gradients.views[2]) == 0.0


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("bucket", [0, 1, 50, 10_000])
def test_buckets_and_shards_cover_every_element_once(shards: int, bucket: int) -> None:
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    gradients = Gradients(parameters, shards=shards, bucket_elements=bucket)
    counts = torch.zeros(gradients.flat.numel())
    owned = [gradients.owned(replica) for replica in range(shards)]
    for start, stop in [span for spans in owned for span in spans]:
        assert start % 16 == stop % 16 == 0
        counts[start:stop] += 1
    assert (counts == 1).all()
    assert len({sum(stop - start for start, stop in spans) for spans in owned}) == 1  # everyone has as much
    sizes = [stop - start for start, stop in gradients.buckets]
    assert sum(sizes) == gradients.flat.numel()
    assert max(sizes) <= max(bucket or 10**9, 16 * shards) + 16 * shards
    if bucket == 1:
        assert set(sizes) == {16 * shards}


def watched(gradients: Gradients, parameters: list[nn.Parameter], backwards: int = 1) -> list[int]:
    """The buckets that were ready during the backward passes."""
    ready: list[int] = []
    gradients.watch(ready.append)
    for seed in range(backwards):
        backward(parameters, factors(parameters[0].dtype, seed))
    gradients.unwatch()
    return ready


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backwards", [1, 3])
def test_buckets_are_ready_from_the_last_to_the_first(dtype: torch.dtype, backwards: int) -> None:
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    gradients = Gradients(parameters, bucket_elements=16)
    every = list(reversed(range(len(gradients.buckets))))
    assert len(every) > len(SHAPES)  # one tensor lies in two
    assert watched(gradients, parameters, backwards) == []  # it only counts
    assert watched(gradients, parameters, backwards) == every
    assert watched(gradients, parameters, backwards) == every


def test_a_bucket_waits_for_its_last_gradient() -> None:
    parameters, gradients = [nn.Parameter(torch.zeros(16)) for _ in range(3)], None
    gradients = Gradients(parameters, bucket_elements=32)
    seen: list[tuple[str, int]] = []
    for parameter, name in zip(parameters, "abc", strict=True):
        parameter.register_post_accumulate_grad_hook(lambda p, n=name: seen.append((n, -1)))
    for _ in range(2):
        seen.clear()
        gradients.watch(lambda bucket: seen.append(("bucket", bucket)))
        for parameter in (parameters[1], parameters[2], parameters[0]):
            parameter.sum().backward()
        gradients.unwatch()
    assert seen == [("b", -1), ("bucket", 1), ("c", -1), ("bucket", 0), ("a", -1)]


def test_a_gradient_after_its_bucket_was_sent_is_an_error() -> None:
    parameters, gradients = make(torch.float32)
    watched(gradients, parameters)
    with pytest.raises(RuntimeError, match="more often than in the step before"):
        watched(gradients, parameters, backwards=2)
