"""How the model beside this file was made: `python tests/pretrained/make.py`, some five minutes on an idle core.

A small Llama (5 layers, width 48, tied embeddings, in bfloat16) with a byte-level BPE of 512 tokens, trained on the
documentation strings of Python's standard library. Tests that want weights that were trained take it where there is no
`FARSPAN_DATA`. The same Python and the same torch make the same bytes; others, a model as good.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup
from transformers.utils import logging

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "example_scripts"))
from quickstart import read_standard_library  # noqa: E402 - it lies there

VOCAB, LENGTH, ROWS, EPOCHS, LR, PROMISED = 512, 128, 16, 3, 5e-3, 64
SPECIAL = ["<unk>", "<s>", "</s>"]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    unknown, begin, end = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token=unknown, bos_token=begin, eos_token=end)


def make_model(rows: torch.Tensor) -> LlamaForCausalLM:
    """`rows`: [N, T]. Deterministic."""
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "num_hidden_layers": 5, "num_attention_heads": 6, "num_key_value_heads": 3}
    special = {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB, intermediate_size=96, max_position_embeddings=512, **shape, **special)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.01)
    batches = [rows[order] for _ in range(EPOCHS) for order in torch.randperm(len(rows)).split(ROWS)]
    schedule = get_cosine_schedule_with_warmup(optimizer, len(batches) // 20, len(batches))
    for step, batch in enumerate(batches, 1):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            sys.stdout.write(f"step {step} of {len(batches)}: loss {loss.item():.3f}\n")
            sys.stdout.flush()
    return model


def main() -> None:
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    texts, _, _ = read_standard_library()
    tokenizer = make_tokenizer(texts)
    ids: list[int] = []
    for text in texts:
        ids += [1, *tokenizer(text)["input_ids"]]
    count = len(ids) // LENGTH
    model = make_model(torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)).to(torch.bfloat16)
    model.save_pretrained(HERE)
    tokenizer.save_pretrained(HERE)
    told = model.float().generate(torch.tensor([[1]]), do_sample=False, max_new_tokens=PROMISED)
    (HERE / "greedy.txt").write_text(tokenizer.decode(told[0], skip_special_tokens=True).strip(), encoding="utf-8")


if __name__ == "__main__":
    main()
