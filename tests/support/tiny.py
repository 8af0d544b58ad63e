"""Tiny models, tokenizers and tasks, made in a moment and without a network."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import torch
from farspan.modules.shards import INDEX, old_state_file, old_unit_file, state_file, unit_file
from farspan.modules.spec import ModelSpec
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

WORDS = (
    "the", "a", "small", "red", "ball", "of", "Lily", "was", "in", "park", "and", "she",
    "saw", "big", "day", "to", "play", "with", "it", "sun", "went", "up",
)  # fmt: skip
VOCAB = 64


def config_of(family: str, layers: int = 5, **changes: object) -> PreTrainedConfig:
    """A config of `family` that trains in milliseconds: width 32, 4 heads, vocabulary 64, 64 positions."""
    common: dict = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0}
    if family == "gptj":
        shape = {"n_embd": 32, "n_layer": layers, "n_head": 4, "n_positions": 64, "rotary_dim": 4}
        return GPTJConfig(**{**common, **shape, **changes})
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    if family == "gptneox":
        return GPTNeoXConfig(**{**common, **shape, "tie_word_embeddings": False, **changes})
    return LlamaConfig(**{**common, **shape, "num_key_value_heads": 2, **changes})


def make_model(folder: Path, family: str = "gptneox", seed: int = 0, **changes: object) -> Path:
    """A random HF checkpoint with its tokenizer, in `folder`."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(family, **changes))
    with torch.no_grad():
        for parameter in model.parameters():  # larger than HF's 0.02, so that every layer matters; biases too
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_tokenizer(folder: Path, extra: int = 0) -> None:
    """One token a word (and `extra` unused ones), saved so that AutoTokenizer loads it."""
    vocab = {word: i for i, word in enumerate(["<unk>", *WORDS, *(f"<extra{i}>" for i in range(extra))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def make_task(path: Path, lines: int = 40, seed: int = 0) -> Path:
    """A jsonl task of short sentences."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for _ in range(lines):
            file.write(json.dumps({"text": " ".join(rng.choices(WORDS, k=rng.randint(3, 30)))}) + "\n")
    return path


def spell_as_before(folder: Path) -> None:
    """Give a shard folder or checkpoint the file names (and no checksums) of before weights were named `model-…`."""
    spec = ModelSpec.from_folder(folder)
    names = {}
    for unit in range(spec.unit_count):
        names[unit_file(spec, unit)] = old_unit_file(spec, unit)
        names[state_file(spec, unit)] = old_state_file(spec, unit)
    for new, old in names.items():
        if (folder / new).exists():
            (folder / new).rename(folder / old)
    shutil.rmtree(folder / "optimizer", ignore_errors=True)
    index = folder / INDEX
    told = json.loads(index.read_text())
    told["weight_map"] = {tensor: names[file] for tensor, file in told["weight_map"].items()}
    index.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")
    manifest = folder / "manifest.json"
    if manifest.is_file():
        told = json.loads(manifest.read_text())
        told["files"] = {names.get(file, file): size for file, size in told["files"].items()}
        told["files"][INDEX] = index.stat().st_size
        told.pop("crc32", None)
        manifest.write_text(json.dumps(told, indent=1))
