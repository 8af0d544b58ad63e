"""A URL where a path is wanted is refused in one line, at the start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from farspan.converters.command import main_assemble, main_from, main_to
from farspan.runtime.data import preprocess
from farspan.runtime.data.task_spec import DataError, parse_tasks
from farspan.runtime.flags.config import Config, ConfigError
from farspan.runtime.flags.validation import problems_of

FLAGS = (
    "checkpoint_path", "model_name", "tokenizer_name", "task_config", "data_cache", "special_tokens", "chat_template",
    "secret_file", "task_name", "evaluation_data",
)  # fmt: skip


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("url", ["s3://bucket/run", "https://host/a.jsonl", "gs://bucket/run"])
def test_every_flag_of_a_run(name: str, url: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    (told,) = [line for line in problems_of(replace(Config(), **{name: url})) if "cannot be used yet" in line]
    assert told.startswith(f"{flag} {url}: ")


def test_flags_that_preprocess_shares(tmp_path: Path) -> None:
    told = Config(task_name="a", tokenizer_name="t", chat_template="s3://bucket/own.jinja")
    with pytest.raises(ConfigError, match=r"--chat-template s3://bucket/own\.jinja: s3:// cannot be used yet"):
        preprocess.preprocess(told, tmp_path / "out")


def test_hub_tasks_stay() -> None:
    config = replace(Config(), task_name="a.jsonl:0.5,hf://org/data:0.5", evaluation_data="hf://org/held")
    assert not [line for line in problems_of(config) if "cannot be used" in line]
    assert parse_tasks("hf://org/data:0.5")[0].path == "hf://org/data"
    with pytest.raises(DataError, match="s3:// cannot be used yet"):
        parse_tasks("s3://bucket/a.jsonl")


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (lambda words: main_from("llama", words), ["--model-name", "s3://b/m", "--save-dir", "out"]),
        (lambda words: main_from("llama", words), ["--model-name", "m", "--save-dir", "s3://b/m"]),
        (lambda words: main_to("llama", words), ["--ckpt-path", "m", "--save-path", "s3://b/m"]),
        (lambda words: main_to("llama", words), ["--ckpt-path", "a", "s3://b/m", "--save-path", "out"]),
        (main_assemble, ["a", "s3://b/m", "--save-path", "out"]),
        (preprocess.main, ["--task-name", "a", "--tokenizer-name", "t", "--output", "s3://b/m"]),
    ],
)
def test_the_other_scripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], main: object, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(words)  # type: ignore[operator]
    assert ended.value.code == 2
    assert "s3:// cannot be used yet" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
