"""A real model: weights that were trained, through our layers, say what HF's say."""

from collections.abc import Callable

import torch
from pretrained import Pretrained
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_logits_and_gradients(pretrained: Pretrained, assert_same: Callable[..., None]) -> None:
    hf = AutoModelForCausalLM.from_pretrained(pretrained.folder, dtype=torch.float32).eval()
    assert_same(hf, pretrained.folder, tokens=64)


@torch.inference_mode()
def test_greedy_text(pretrained: Pretrained, load: Callable) -> None:
    """The text that is promised beside it, token by token without a cache."""
    tokenizer = AutoTokenizer.from_pretrained(pretrained.folder)
    _, layers = load(pretrained.folder)
    ids = torch.tensor([[tokenizer.bos_token_id]])
    for _ in range(90):
        x = ids
        for layer in layers:
            x = layer.eval()(x)
        ids = torch.cat([ids, x[:, -1:].argmax(-1)], 1)
    assert tokenizer.decode(ids[0], skip_special_tokens=True).strip().startswith(pretrained.promised)
