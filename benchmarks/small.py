"""A small GPT-NeoX with its tokenizer and a task, for benchmarks of what is around the model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from farspan.modules.layers import build_layers, init_unit
from farspan.modules.shards import write_index, write_unit
from farspan.modules.spec import ModelSpec
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def prepare(folder: Path, layers: int, width: int, vocabulary: int) -> None:
    """Layer shards of random weights, the tokenizer, and task.jsonl, all in `folder`."""
    shape = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": 4,
        "intermediate_size": 4 * width,
        "vocab_size": vocabulary,
        "max_position_embeddings": 256,
        "rotary_pct": 0.25,
    }
    spec = ModelSpec.from_config({"model_type": "gpt_neox", **shape})
    for unit in range(spec.unit_count):
        (layer,) = build_layers(spec, [unit])
        init_unit(layer, spec, unit, 1)
        write_unit(folder, spec, unit, dict(layer.named_parameters()))
    write_index(folder, spec, torch.float32)
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    (folder / "task.jsonl").write_text(json.dumps({"text": "a b " * 500}) + "\n")
