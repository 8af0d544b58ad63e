"""Chat templates by name or from a file, and rows of the forms that people have."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from farspan.converters.hf import export_hf
from farspan.runtime.data.chat import NAMED
from farspan.runtime.data.open_tasks import open_tasks
from farspan.runtime.data.preprocess import main as preprocess
from farspan.runtime.data.task_spec import DataError, TaskSpec
from farspan.runtime.data.tokenizer import Vocabulary
from farspan.runtime.flags.config import Config, ConfigError
from launch import Run
from tiny import make_model, make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

Flags = Callable[..., dict[str, Any]]
TALK = [("system", "Be kind."), ("user", "Hi?"), ("assistant", "Yes."), ("user", "Why?"), ("assistant", "So.")]
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)
# Of TALK, and what of it the assistant says; and how a conversation without a system prompt begins.
RENDERED = {
    "chatml": (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nYes."
        "<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n",
        "Yes.<|im_end|>\nSo.<|im_end|>\n",
        "<|im_start|>user\n",
    ),
    "llama2": (
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi? [/INST] Yes. </s><s>[INST] Why? [/INST] So. </s>",
        " Yes. </s> So. </s>",
        "<s>[INST] Hi? [/INST]",
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user<|end_header_id|>"
        "\n\nHi?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nSo.<|eot_id|>",
        "Yes.<|eot_id|>So.<|eot_id|>",
        "<s><|start_header_id|>user",
    ),
    "alpaca": (
        "<s>Be kind.\n\n### Instruction:\nHi?\n\n### Response:\nYes.</s>\n\n### Instruction:\nWhy?\n\n### Response:\n"
        "So.</s>\n\n",
        "Yes.</s>\n\nSo.</s>\n\n",
        f"<s>{ALPACA}### Instruction:\nHi?\n\n### Response:\n",
    ),
    "vicuna": (
        "<s>Be kind. USER: Hi? ASSISTANT: Yes.</s>USER: Why? ASSISTANT: So.</s>",
        " Yes.</s> So.</s>",
        f"<s>{VICUNA}USER: Hi? ASSISTANT: Yes.",
    ),
    "zephyr": (
        "<|system|>\nBe kind.</s>\n<|user|>\nHi?</s>\n<|assistant|>\nYes.</s>\n<|user|>\nWhy?</s>\n<|assistant|>\nSo."
        "</s>\n",
        "Yes.</s>\nSo.</s>\n",
        "<|user|>\nHi?",
    ),
}


def make(folder: Path, **special: str) -> Path:
    """A tokenizer of bytes that knows <s> and </s>, and has no chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, **(special or {"bos_token": "<s>", "eos_token": "</s>"})
    ).save_pretrained(folder)
    return folder


def talk(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.parametrize("name", NAMED)
def test_a_template_by_its_name(tmp_path: Path, name: str) -> None:
    """What the assistant says is a target, with the token that ends it, which is the tokenizer's end token."""
    make(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(
        '{"eos_token": "</s>"}'
    )  # as older versions of transformers wrote
    vocabulary = Vocabulary(Config(tokenizer_name=str(tmp_path), chat_template=name))
    recipe = vocabulary.recipe(TaskSpec("a", messages="m", loss_on="completion"))
    block = recipe([json.dumps({"m": talk(turns)}).encode() for turns in (TALK, TALK[1:])])
    assert not block.faults
    assert block.targets is not None
    text, said, begins = RENDERED[name]
    tokenizer, first = vocabulary.tokenizer, block.ends[0]
    assert tokenizer.decode(block.tokens[:first]) == text
    assert tokenizer.decode(block.tokens[:first][block.targets[:first]]) == said
    assert tokenizer.decode(block.tokens[first:]).startswith(begins)
    assert tokenizer.decode(block.tokens[first:][block.targets[first:]]) == said
    assert tokenizer.eos_token_id in block.tokens[block.targets]
    assert vocabulary.size == 258 + len(NAMED[name].tokens)
    # The next user of what is saved renders alike, and finds the same end.
    saved = AutoTokenizer.from_pretrained(vocabulary.files(tmp_path / "saved"))
    made = saved.apply_chat_template(talk(TALK), tokenize=True, return_dict=False)
    assert (made, saved.eos_token_id) == (block.tokens[:first].tolist(), tokenizer.eos_token_id)


def test_a_template_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.role[0] + m.content }}{% endfor %}")
    tokenizer = str(make(tmp_path / "tok"))
    vocabulary = Vocabulary(Config(tokenizer_name=tokenizer, chat_template=str(tmp_path / "own.jinja")))
    tokens = vocabulary.recipe(TaskSpec("a", messages="m"))([json.dumps({"m": talk(TALK)}).encode()]).tokens
    assert vocabulary.tokenizer.decode(tokens) == "sBe kind.uHi?aYes.uWhy?aSo."
    with pytest.raises(ConfigError, match=r"--chat-template gemini is none of chatml, .* and no file .*: No such file"):
        Vocabulary(Config(tokenizer_name=tokenizer, chat_template="gemini"))
    (tmp_path / "own.jinja").write_text("{% for")
    vocabulary = Vocabulary(Config(tokenizer_name=tokenizer, chat_template=str(tmp_path / "own.jinja")))
    faults = vocabulary.recipe(TaskSpec("a", messages="m"))([json.dumps({"m": talk(TALK)}).encode()]).faults
    assert "the chat template refuses it" in faults[0]


def test_a_tokenizer_without_an_end(tmp_path: Path) -> None:
    """A template that brings its own can be had; one that needs the tokenizer's cannot."""
    make_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="--chat-template vicuna ends with an end token, and the tokenizer has none"):
        Vocabulary(Config(tokenizer_name=str(tmp_path), chat_template="vicuna"))
    assert Vocabulary(Config(tokenizer_name=str(tmp_path), chat_template="chatml")).tokenizer.eos_token == "<|im_end|>"


ROWS = {
    "messages": {"messages": talk(TALK[1:3])},
    "ShareGPT": {"id": 1, "conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]},
    "Alpaca": {"instruction": "Hi?", "input": "", "output": "Yes."},
}
IN_CHATML = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"


@pytest.mark.parametrize(("kind", "field"), [*zip(ROWS, ["messages", "conversations", "instruction"], strict=True)])
def test_rows_of_a_known_form_are_recognised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, field: str
) -> None:
    """And said; and without a chat template, the line names the flag. Also by `preprocess`."""
    caplog.set_level(logging.INFO)
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps(ROWS[kind]) + "\n") * 4)
    told = Config(
        tokenizer_name=str(make(tmp_path / "tok")), chat_template="chatml", data_cache=str(tmp_path / "cache"),
        task_name=str(path), seq_length=200, rows="padded",
    )  # fmt: skip
    vocabulary = Vocabulary(told)
    drawn = open_tasks(told, vocabulary).draw(1)
    text = vocabulary.tokenizer.decode(drawn.tokens[0])
    assert text.startswith(IN_CHATML)
    assert vocabulary.tokenizer.decode(drawn.tokens[drawn.targets]) == "Yes.<|im_end|>\n"
    assert f'read as "messages": "{field}", "loss_on": "completion"' in caplog.text
    flags = ["--task-name", str(path), "--tokenizer-name", told.tokenizer_name, "--chat-template", "chatml"]
    assert preprocess([*flags, "--output", str(tmp_path / "out")]) == 0
    made = json.loads((tmp_path / "out" / "meta.json").read_text())["made"]
    assert (made["messages"], made["loss_on"]) == (field, "completion")
    bare = Config(**{**vars(told), "chat_template": ""})
    with pytest.raises(DataError, match=r"a\.jsonl: messages need a chat template, .*: --chat-template chatml,"):
        open_tasks(bare, Vocabulary(bare))


def test_generating_stops_where_a_turn_ends(tmp_path: Path) -> None:
    """By the model's own generation_config.json, with one more end; as it stands where the end is the tokenizer's."""
    make(tmp_path)
    model, folder = tmp_path / "model", tmp_path / "folder"
    model.mkdir()
    folder.mkdir()
    (model / "config.json").write_text('{"eos_token_id": 7, "bos_token_id": 6}')
    told = {name: Vocabulary(Config(tokenizer_name=str(tmp_path), chat_template=name)) for name in ("chatml", "zephyr")}
    assert told["zephyr"].generation(model, folder) == model
    for own, want in (
        (None, {"bos_token_id": 6, "eos_token_id": [7, 259]}),
        ({"eos_token_id": 5, "top_p": 0.9}, {"top_p": 0.9, "eos_token_id": [5, 259]}),
        ({"eos_token_id": [5, 259]}, {"eos_token_id": [5, 259]}),
    ):
        if own is not None:
            (model / "generation_config.json").write_text(json.dumps(own))
        assert told["chatml"].generation(model, folder) == folder
        assert json.loads((folder / "generation_config.json").read_text()) == want
    (model / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"generation_config\.json is not JSON"):
        told["chatml"].generation(model, folder)


def test_rows_that_have_a_text_are_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "ok", **ROWS["Alpaca"]}) + "\n")
    told = Config(
        tokenizer_name=str(make(tmp_path / "tok")), data_cache=str(tmp_path / "cache"), task_name=str(path),
        seq_length=3,
    )  # fmt: skip
    vocabulary = Vocabulary(told)
    assert vocabulary.tokenizer.decode(open_tasks(told, vocabulary).draw(1).tokens[0]) == "\nok"


def test_alpaca_and_sharegpt_in_all_their_forms(tmp_path: Path) -> None:
    """The input stands below the instruction; names of speakers are translated; what is neither is told."""
    vocabulary = Vocabulary(Config(tokenizer_name=str(make(tmp_path)), chat_template="zephyr"))

    def text(field: str, row: dict[str, Any]) -> str:
        block = vocabulary.recipe(TaskSpec("a", messages=field))([row])
        return block.faults.get(0) or vocabulary.tokenizer.decode(block.tokens)

    assert text("instruction", {"instruction": "Add.", "input": "1 2", "output": "3"}) == (
        "<|user|>\nAdd.\n\n1 2</s>\n<|assistant|>\n3</s>\n"
    )
    assert text("c", {"c": [{"from": who, "value": "x"} for who in ("system", "human", "chatgpt")]}) == (
        "<|system|>\nx</s>\n<|user|>\nx</s>\n<|assistant|>\nx</s>\n"
    )
    assert 'a string under "input"' in text("instruction", {"instruction": "Add.", "input": [1], "output": "3"})
    for bad in ([{"from": "human"}], [{"from": 1, "value": "x"}], ["x"], [], "x", None):
        assert text("c", {"c": bad}).startswith("expected a list of")


def test_a_run_keeps_its_chat_template(flags: Flags, tmp_path: Path) -> None:
    """In checkpoint and export, with its tokens; and going on knows it again."""
    model = make_model(tmp_path / "model", "llama", vocab_size=300)
    make(model)
    (tmp_path / "a.jsonl").write_text((json.dumps(ROWS["ShareGPT"]) + "\n") * 9)
    told = flags(
        model_name=model, task_name=tmp_path / "a.jsonl", chat_template="chatml", total_steps=2, checkpoint_steps=1
    )
    with Run(1, 1, told) as run:
        run.succeed()
        said = run.err(0)
    assert "--chat-template chatml: <|im_start|> <|im_end|> are tokens, and <|im_end|> is the end token" in said
    out = export_hf("llama", tmp_path / "ck" / "checkpoint_2", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    prompt = tokenizer.apply_chat_template(talk(TALK[1:2]), tokenize=False, add_generation_prompt=True)
    assert prompt == IN_CHATML.removesuffix("Yes.<|im_end|>\n")
    assert tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>") == 259
    assert GenerationConfig.from_pretrained(out).eos_token_id == [0, 259]  # the model's, and what ends a turn
    (tmp_path / "ck" / "latest").write_text("1")
    with Run(1, 1, told) as run:
        run.succeed()
    with Run(1, 1, {**told, "chat_template": "zephyr", "total_steps": 3}) as run:
        ended = run.wait(60)[0]
    assert ended.code == 1
    assert "--special-tokens (or --chat-template) adds other tokens" in ended.err
