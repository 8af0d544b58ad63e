"""A task whose first rows cannot be used is refused before anything is loaded, and the line says what would do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chars import mixture, text_of
from farspan.converters.hf import import_hf
from farspan.runtime.data.preprocess import main as preprocess
from farspan.runtime.data.task_spec import DataError
from launch import Run
from tiny import make_tokenizer

Flags = Callable[..., dict[str, Any]]
CHAT = [{"role": "user", "content": "a"}]


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"prompt": "a", "answer": "b", "id": 3},
            ['"prompt" (text), "answer" (text), "id" (number)', '"template": "{prompt}\\n{answer}"'],
        ),
        ({"story": "a", "ok": True, "n": None}, ['"ok" (true or false), "n" (null)', '[{"path": …, "text": "story"}]']),
        ({"turns": CHAT, "story": "a"}, ['"turns" (conversation)', '"messages": "turns"']),
        ({"my field": "a"}, ['"my field" (text)']),
        ({"x" * 1000: 1, **{f"f{i}": 1 for i in range(99)}}, [f'"{"x" * 24}…" (number)', "and 92 more"]),
        ({}, ["no fields"]),
        ([{"text": "a"}], ["one JSON object", "jq -c '.[]'"]),
        ("text", ["one JSON object, such as"]),
    ],
)
@pytest.mark.parametrize("bad_lines", ["error", "skip"])
def test_what_the_rows_have_is_told(tmp_path: Path, row: Any, words: list[str], bad_lines: str) -> None:  # noqa: ANN401
    path = lines(tmp_path / "a.jsonl", [row] * 40)
    with pytest.raises(DataError) as caught:
        mixture(tmp_path, str(path), 4, bad_lines=bad_lines)
    told = str(caught.value)
    assert told.startswith(f"{path}:1: expected an object")
    assert "; none of the 16 rows that were tried can be used. " in told
    for word in words:
        assert word in told
    assert "--bad-lines" not in told
    assert "\n" not in told
    assert len(told) < 500 + len(str(path))


def test_one_bad_line_among_the_first_is_told_at_once(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"text": "good"}, {"txt": "bad"}])
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*--bad-lines skip goes on without"):
        mixture(tmp_path, str(path), 4)
    assert text_of(mixture(tmp_path, str(path), 5, bad_lines="skip").draw(1).tokens) == "\ngood"


def test_a_file_may_begin_with_bad_lines_if_they_are_skipped(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"txt": "bad"}] * 20 + [{"text": "good"}] * 20)
    with pytest.raises(DataError, match="none of the 16 rows that were tried"):
        mixture(tmp_path, str(path), 4)
    assert text_of(mixture(tmp_path, str(path), 5, bad_lines="skip").draw(1).tokens) == "\ngood"


def test_preprocess_says_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = lines(tmp_path / "a.jsonl", [{"story": "a"}] * 3)
    make_tokenizer(tmp_path / "tokenizer")
    told = ["--task-name", str(path), "--tokenizer-name", str(tmp_path / "tokenizer"), "--bad-lines", "skip"]
    assert preprocess([*told, "--output", str(tmp_path / "out")]) == 1
    assert '"text": "story"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["task_name", "evaluation_data"])
def test_data_is_tried_before_weights_are_loaded(flags: Flags, model: Path, tmp_path: Path, flag: str) -> None:
    """The weights are gone, and the data's fault is the one that is told."""
    shards = import_hf("gptneox", str(model), tmp_path / "shards")
    (shards / "model-00002-of-00007.safetensors").unlink()
    path = lines(tmp_path / "a.jsonl", [{"story": "a"}])
    with Run(1, 1, flags(model_name=shards, **{flag: path})) as run:
        ended = run.wait(60)[0]
    assert ended.code == 1
    assert '"text": "story"' in ended.err
