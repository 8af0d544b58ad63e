"""The loss of a head in chunks: the numbers of the plain one, and never all logits at once."""

from __future__ import annotations

import pytest
import torch
from farspan.modules.layers import init_unit
from farspan.modules.loss import IGNORED, cross_entropy_sum, linear_cross_entropy_sum
from farspan.modules.spec import ModelSpec
from farspan.pipeline.stage import Stage
from tiny import VOCAB, config_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROWS, LENGTH, WIDTH, WORDS = 3, 7, 16, 50


def make(dtype: torch.dtype, bias: bool) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    labels = torch.randint(0, WORDS, (ROWS, LENGTH), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = IGNORED
    return [draw(ROWS, LENGTH, WIDTH), draw(WORDS, WIDTH), *([draw(WORDS)] if bias else [])], labels


def losses(dtype: torch.dtype, bias: bool, most: int) -> tuple[Tensor, list[Tensor]]:
    inputs, labels = make(dtype, bias)
    loss = linear_cross_entropy_sum(*inputs[:2], inputs[2] if bias else None, labels, most)
    return loss, list(torch.autograd.grad(loss * 0.25, inputs))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 7, 20])  # 21 positions: some chunks end short
def test_chunks_change_nothing_in_fp32(rows: int, bias: bool) -> None:
    plain, plain_grads = losses(torch.float32, bias, 10**9)
    loss, grads = losses(torch.float32, bias, rows * WORDS + 3)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    for found, want in zip(grads, plain_grads, strict=True):
        assert (found - want).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_close_to_the_truth_as_the_plain_loss(dtype: torch.dtype) -> None:
    inputs, labels = make(dtype, True)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    logits = exact[0] @ exact[1].T + exact[2]
    truth = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    true_grads = torch.autograd.grad(truth * 0.25, exact)
    plain, plain_grads = losses(dtype, True, 10**9)
    loss, grads = losses(dtype, True, 4 * WORDS)
    assert abs(loss - truth) <= 1.5 * abs(plain - truth) + 1e-6 * truth
    for found, like, true in zip(grads, plain_grads, true_grads, strict=True):
        assert found.dtype == like.dtype
        assert (found - true).norm() <= 1.5 * (like - true).norm()


def test_no_target_means_no_loss_and_no_gradient() -> None:
    inputs, labels = make(torch.float32, False)
    loss = linear_cross_entropy_sum(*inputs, None, torch.full_like(labels, IGNORED), 4 * WORDS)
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, inputs))


class Largest(TorchDispatchMode):
    """The most elements that any one result has had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # noqa: ANN001, ANN204 - as torch calls it
        out = op(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.itemsize)
        return out


@pytest.mark.parametrize("train", [True, False])
def test_all_logits_never_exist_at_once(train: bool) -> None:
    words, positions, width = 512, 64, 4
    hidden, weight = (
        torch.randn(1, positions, width, requires_grad=train),
        torch.randn(words, width, requires_grad=train),
    )
    labels = torch.randint(0, words, (1, positions))
    with Largest() as largest, torch.set_grad_enabled(train):
        loss = linear_cross_entropy_sum(hidden, weight, None, labels, 8 * words)
        if train:
            loss.backward()
    assert largest.elements == 8 * words


@pytest.mark.parametrize(
    "changes",
    [{"family": "llama", "tie_word_embeddings": True}, {"family": "gptj"}, {"family": "gptneox"}],
    ids=lambda changes: changes["family"],
)
def test_the_head_of_a_stage(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tied heads, GPT-J's bias, and gradients that are added to what is there."""
    spec = ModelSpec.from_config(config_of(layers=1, **changes).to_dict())
    tokens, labels = torch.randint(0, VOCAB, (2, 2, 16))

    def gradients(chunked: bool) -> list[Tensor]:
        stage = Stage(spec, range(spec.unit_count), dtype=torch.float32, device=torch.device("cpu"))
        for unit, layer in zip(stage.units, stage.layers, strict=True):
            init_unit(layer, spec, unit, seed=1)
        for t in stage.tensors():
            t.parameter.grad = torch.ones_like(t.parameter)
        loss = stage(tokens, 0, labels) if chunked else cross_entropy_sum(stage(tokens), labels)
        loss.backward()
        return [t.parameter.grad for t in stage.tensors()]

    plain = gradients(False)
    monkeypatch.setattr(linear_cross_entropy_sum, "__defaults__", (5 * VOCAB,))
    for found, want in zip(gradients(True), plain, strict=True):
        assert (found - want).norm() <= 1e-6 * want.norm()
