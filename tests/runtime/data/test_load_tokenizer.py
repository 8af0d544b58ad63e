"""What --tokenizer-name may name, and what is said where it cannot be."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from farspan.converters.hf import export_hf
from farspan.runtime.data.task_spec import TaskSpec
from farspan.runtime.data.tokenizer import Vocabulary
from farspan.runtime.flags.config import Config, ConfigError
from launch import Run
from spm import ODD, make_spm, texts
from tiny import make_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

Flags = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("name", ["./none", "/none/tok", "~/tok", "org/name/more", "{here}/none"])
def test_a_path_that_is_not_there_asks_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    with pytest.raises(ConfigError, match=r"--tokenizer-name \S+: no such file or folder$"):
        Vocabulary(Config(tokenizer_name=name.format(here="here")))


@pytest.mark.parametrize("name", ["org/name", "gpt2"])
def test_a_name_that_the_hub_does_not_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """One line, and none of the attempts."""

    def asked(*_: object, **__: object) -> None:
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s")
        raise OSError("We couldn't connect to\n the hub. Are you online?\n" + "And so on. " * 99)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    with pytest.raises(ConfigError) as caught:
        Vocabulary(Config(tokenizer_name=name))
    said = str(caught.value)
    assert said.startswith(
        f"--tokenizer-name {name}: no such folder here, and the hub does not give it: OSError: We couldn't connect to "
        "the hub. Are you online? And so on."
    )
    assert said.endswith(" And so on.")
    assert len(said) < 600
    assert caplog.text == ""
    logging.getLogger("huggingface_hub.utils._http").error("told again")
    assert "told again" in caplog.text


@pytest.mark.parametrize("family", ["gptneox", "gptj"])
def test_a_folder_without_a_tokenizer(tmp_path: Path, family: str) -> None:
    """transformers makes one of config.json alone, which knows no text."""
    make_model(tmp_path, family)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigError, match="no tokenizer there"):
        Vocabulary(Config(model_name=str(tmp_path), eos="yes"))
    (tmp_path / "tokenizer.json").write_text('{"model": 5}')
    with pytest.raises(ConfigError, match="no tokenizer there"):
        Vocabulary(Config(model_name=str(tmp_path)))


def test_a_file_under_any_name(tmp_path: Path) -> None:
    """What the `tokenizers` library saves, whose end token is known by its name; and a folder's by its file's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(tmp_path / "gpt2.json"))
    vocabulary = Vocabulary(Config(tokenizer_name=str(tmp_path / "gpt2.json"), eos="yes"))
    tokens = vocabulary.recipe(TaskSpec("a", text="text"))([b'{"text": "ok"}']).tokens
    assert tokens.tolist() == [*backend.encode("\nok").ids, 256]
    saved = AutoTokenizer.from_pretrained(vocabulary.files(tmp_path / "saved"))
    assert (saved("ok").input_ids, saved.eos_token_id) == (backend.encode("ok").ids, 256)
    assert Vocabulary(Config(tokenizer_name=str(tmp_path / "saved" / "tokenizer.json"))).tokenizer.eos_token_id == 256


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "neither a tokenizer.json nor a model of sentencepiece"),
        ("some text", "neither a tokenizer.json nor a model of sentencepiece"),
        ('{"model": 5}', "no tokenizer there: "),
    ],
)
def test_a_file_that_is_no_tokenizer(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(ConfigError, match=rf"--tokenizer-name \S+a\.txt: .*{reason}"):
        Vocabulary(Config(tokenizer_name=str(tmp_path / "a.txt")))


def test_a_model_folder_with_tokenizer_model_alone(flags: Flags, tmp_path: Path) -> None:
    """The tokens of a run are sentencepiece's, each document after Llama's BOS. What is exported gives them too."""
    model = make_model(tmp_path / "model", "llama", vocab_size=1000)
    for file in model.glob("tokenizer*"):
        file.unlink()
    own = make_spm(model)
    said = [text for text in [*ODD, *texts()[:100]] if text]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"q": text, "a": text}) + "\n" for text in said))
    task = {"path": str(tmp_path / "a.jsonl"), "template": "{q}\n{a}", "loss_on": "completion"}
    (tmp_path / "tasks.json").write_text(json.dumps([task]))
    vocabulary = Vocabulary(Config(model_name=str(model), eos="yes"))
    recipe = vocabulary.recipe(TaskSpec(**task))
    for line, text in zip((tmp_path / "a.jsonl").read_bytes().splitlines(), said, strict=True):
        block = recipe([line])
        assert block.tokens.tolist() == [1, *own.encode(f"\n{text}\n{text}"), 2]
        assert block.targets is not None
        answer = own.decode(block.tokens[block.targets].tolist())
        assert answer.strip().endswith(text.replace("\u2581", " ").strip())
    told = flags(
        model_name=model, task_name=None, task_config=tmp_path / "tasks.json", total_steps=1, seq_length=32, eos="yes"
    )
    with Run(1, 1, told) as run:
        run.succeed()
    exported = AutoTokenizer.from_pretrained(export_hf("llama", tmp_path / "ck" / "checkpoint_1", tmp_path / "out"))
    assert exported(said).input_ids == [[1, *ids] for ids in own.encode(said)]
    assert exported(said, add_special_tokens=False).input_ids == own.encode(said)
