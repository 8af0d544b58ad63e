"""A real model: weights that were trained, through our layers, say what HF's say."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_logits_and_gradients(stories: Path, assert_same: Callable[..., None]) -> None:
    hf = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    assert_same(hf, stories, tokens=64)


@torch.inference_mode()
def test_greedy_text(stories: Path, load: Callable) -> None:
    """The story that its README promises, token by token without a cache."""
    tokenizer = AutoTokenizer.from_pretrained(stories)
    _, layers = load(stories)
    ids = torch.tensor([[tokenizer.bos_token_id]])
    for _ in range(90):
        x = ids
        for layer in layers:
            x = layer.eval()(x)
        ids = torch.cat([ids, x[:, -1:].argmax(-1)], 1)
    readme = (stories.parent / "README.md").read_text(encoding="utf-8")
    promised = readme[readme.index('"Once upon a time') + 1 :].split('"')[0]
    assert tokenizer.decode(ids[0], skip_special_tokens=True).strip().startswith(promised)
