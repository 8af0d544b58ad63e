"""Our layers on a GPU against Hugging Face's model on CPU in fp32: logits, loss and every gradient."""

from __future__ import annotations

from pathlib import Path

import gpu
import pytest
import torch
from farspan.modules.layers import build_layers, hf_names
from farspan.modules.loss import cross_entropy_sum, linear_cross_entropy_sum
from farspan.modules.shards import ShardStore
from tiny import VOCAB, make_model
from transformers import AutoModelForCausalLM

pytestmark = gpu.on_gpu


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)], ids=str
)
@pytest.mark.parametrize("family", ["gptj", "gptneox", "llama"])
def test_as_hugging_face(tmp_path: Path, family: str, dtype: torch.dtype, tolerance: float) -> None:
    store = ShardStore(make_model(tmp_path / "m", family, layers=2))
    layers = build_layers(store.spec, range(store.spec.unit_count), dtype=dtype, device=gpu.DEVICE)
    for unit, layer in enumerate(layers):
        layer.load_state_dict({name: x.to(dtype) for name, x in store.read_unit(unit).items()}, strict=True)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB, (2, 19), generator=generator)
    labels = torch.randint(0, VOCAB, (2, 19), generator=generator)
    labels[0, :3] = -100

    expected = hf(ids, use_cache=False).logits
    cross_entropy_sum(expected, labels).backward()
    x = ids.to(gpu.DEVICE)
    for layer in layers:
        x = layer(x)
    loss = cross_entropy_sum(x, labels.to(gpu.DEVICE))
    loss.backward()
    assert distance(x, expected) <= tolerance
    gradients = {name: parameter.grad for name, parameter in hf.named_parameters()}
    for unit, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            want = gradients[hf_names(store.spec, unit)[name].replace("embed_out", "lm_head")]
            assert distance(parameter.grad, want) <= tolerance, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_in_chunks(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((2, 33, 16), (50, 16)))
    labels = torch.randint(0, 50, (2, 33), generator=generator)
    labels[1, 4:9] = -100
    found = []
    for device, most in ((torch.device("cpu"), 1 << 24), (gpu.DEVICE, 500)):
        kind = dtype if device == gpu.DEVICE else torch.float32
        h, w = (x.detach().to(device, kind).requires_grad_() for x in (hidden, weight))
        loss = linear_cross_entropy_sum(h, w, None, labels.to(device), most)
        loss.backward()
        found.append((loss, h.grad, w.grad))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for want, got in zip(*found, strict=True):
        assert distance(got, want) <= tolerance


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a − b|| relative to ||b||, in double precision on CPU."""
    a, b = (x.detach().double().cpu() for x in (a, b))
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()
