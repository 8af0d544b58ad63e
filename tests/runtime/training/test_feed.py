"""What happens where an update's rows hold nothing to predict, or cannot be drawn, or are not needed any more."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chars import write
from launch import Run, read_metrics
from tiny import WORDS, make_task

Flags = Callable[..., dict[str, Any]]


def completions(folder: Path, answer: str) -> Path:
    """A --task-config of one task whose prompts are five rows long, and its completions a word."""
    rows = [{"q": " ".join(WORDS[i % 22] for i in range(n, n + 79)), "a": answer} for n in range(40)]
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"path": str(folder / "qa.jsonl"), "template": "{q} {a}", "loss_on": "completion"}
    (folder / "tasks.json").write_text(json.dumps([task]))
    return folder / "tasks.json"


@pytest.mark.parametrize(("stages", "replicas"), [(1, 1), (2, 2)])
def test_rows_without_a_target_are_passed_over(flags: Flags, tmp_path: Path, stages: int, replicas: int) -> None:
    """And a run that was stopped goes on with the very next sequence."""
    told = flags(
        task_name=None, task_config=completions(tmp_path, "red"), batch_size=2 // replicas, micro_batch_size=1,
        num_checkpoints=6,
    )  # fmt: skip
    with Run(stages, replicas, told) as run:
        run.succeed()
    assert "passing over 2 sequences without a token to predict, up to sequence 2:" in run.err(0)
    rows = read_metrics(tmp_path / "ck")
    given = [row["tasks"]["qa"]["sequences"] for row in rows]
    assert given == [6, 10, 16, 20, 26, 30]  # every fifth sequence has a target
    (tmp_path / "ck" / "latest").write_text("3")
    with Run(stages, replicas, told) as run:
        run.succeed()
    again = read_metrics(tmp_path / "ck")
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]
    assert [row["tasks"] for row in again] == [row["tasks"] for row in rows]


def test_no_row_with_a_target_ends_the_run(flags: Flags, tmp_path: Path) -> None:
    with Run(2, 1, flags(task_name=None, task_config=completions(tmp_path, ""))) as run:
        for end in run.wait(30).values():
            assert end.code == 1
            assert "400 sequences in a row hold no token to predict, up to sequence 400: check loss_on" in end.err
    assert run.err(0).count("passing over") == 3


@pytest.mark.parametrize("mask", [False, True])
def test_data_that_nobody_needs_may_be_bad(flags: Flags, tmp_path: Path, mask: bool) -> None:
    """The draw ahead fails. A run that evaluation ends before it is needed ends well, with the numbers of one whose
    data goes on; a run that needs it ends with its line."""
    ends = []
    held_out = make_task(tmp_path / "held.jsonl", seed=5, lines=30)
    path = write(tmp_path / "a.jsonl", ["the small red ball was in it a"] * 24)  # 12 rows
    for repeats, stop in ((0, 1e6), (1, 1e6), (1, 0)):
        (tmp_path / "tasks.json").write_text(json.dumps([{"path": str(path), "repeats": repeats}]))
        told = flags(
            task_name=None, task_config=tmp_path / "tasks.json", checkpoint_path=tmp_path / f"{repeats}{stop}",
            evaluation_data=held_out, evaluation_steps=3, stop_perplexity=stop or None, document_mask=mask or None,
        )  # fmt: skip
        with Run(2, 1, told) as run:
            ends.append(run.wait(40))
        if stop:
            assert [end.code for end in ends[-1].values()] == [0, 0], run.err(0)
            assert "has reached --stop-perplexity" in run.err(0)
        else:
            for end in ends[-1].values():
                assert end.code == 1
                assert "all tasks have been read as often as their repeats allow, after 12 sequences" in end.err
    rows = [read_metrics(tmp_path / name)[-1] for name in ("01000000.0", "11000000.0", "10")]
    assert [row["step"] for row in rows] == [3, 3, 3]
    assert rows[0]["eval_loss"] == rows[1]["eval_loss"] == rows[2]["eval_loss"]
