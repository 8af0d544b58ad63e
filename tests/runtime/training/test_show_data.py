"""What a run shows of its data: the row that is trained on, and exactly its targets marked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from farspan.modules.loss import IGNORED
from farspan.runtime.training.show_data import ENDS, ShowData, marked
from launch import Run

Flags = Callable[..., dict[str, Any]]


def spaced(tokens: list[int]) -> str:
    """As a tokenizer that drops the space before its first word."""
    return " ".join(chr(token) for token in tokens)


@pytest.mark.parametrize(
    ("text", "targets", "shown"),
    [
        ("abcd", "    ", "a b c d"),
        ("abcd", " xx ", "a⟦ b c⟧ d"),
        ("abcd", "xxxx", "⟦a b c d⟧"),
        ("a\nc\t", " x x", "a⟦ ⏎⟧ c⟦ ⇥⟧"),
    ],
)
def test_targets_are_marked(text: str, targets: str, shown: str) -> None:
    assert marked(spaced, [*map(ord, text)], [mark == "x" for mark in targets]) == shown


def test_the_middle_of_a_long_row_is_left_out() -> None:
    """And marks that it would cut are closed and opened again."""
    tokens = [ord("a")] * ENDS + [ord("b")] * 7 + [ord("c")] * ENDS
    shown = marked(lambda some: "".join(map(chr, some)), tokens, [False] + [True] * (len(tokens) - 1))
    assert shown == f"a⟦{'a' * (ENDS - 1)}⟧ [… 7 tokens …] ⟦{'c' * ENDS}⟧"


def test_when_a_row_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    tokens, labels = torch.tensor([97, 98, 99]), torch.tensor([98, IGNORED, IGNORED])
    for every, shown in ((0, [4]), (3, [4, 6, 9])):
        caplog.clear()
        show = ShowData(spaced, every)
        for update in range(4, 10):
            show(update, tokens, labels)
        assert [int(record.getMessage().split()[1].strip(",")) for record in caplog.records] == shown
        assert "of 3 tokens; the 1 in ⟦ ⟧ are to be predicted" in caplog.text
        assert caplog.records[0].getMessage().endswith(": a⟦ b⟧ c")


def test_a_run_shows_its_rows(flags: Flags, tmp_path: Path) -> None:
    """On rank 0 alone, also where the targets' stage is another one's."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"q": "the big", "a": "red ball"}) + "\n")
    task = {"path": str(tmp_path / "a.jsonl"), "template": "{q} {a}", "loss_on": "completion"}
    (tmp_path / "tasks.json").write_text(json.dumps([task]))
    told = flags(task_name=None, task_config=tmp_path / "tasks.json", total_steps=4, rows="padded", seq_length=5)
    with Run(2, 1, {**told, "show_data": 2}) as run:
        run.succeed()
    rows = [line for line in run.err(0).splitlines() if "⟦ ⟧" in line]
    assert [line.split(",")[0] for line in rows] == ["update 1", "update 2", "update 4"]
    assert all("the 2 in ⟦ ⟧" in line and "the big⟦ red ball⟧" in line for line in rows), rows
    assert "⟦" not in run.err(1)
