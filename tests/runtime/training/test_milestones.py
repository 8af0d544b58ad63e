"""When a run evaluates, saves and ends; the best checkpoint; and that a resumed run decides as one never stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from farspan.runtime.checkpoints.checkpoint import Progress, problem
from farspan.runtime.flags.config import Config
from farspan.runtime.training.milestones import (
    compared_on,
    enough,
    evaluates,
    judge,
    mean_epoch,
    saves,
    steps_of_epochs,
)
from launch import Run, read_metrics
from tiny import make_task

Flags = Callable[..., dict[str, Any]]


def steps(rule: Callable[[Config, int], bool], **flags: Any) -> list[int]:  # noqa: ANN401 - whatever a flag takes
    config = Config(**{"total_steps": 12, **flags})
    return [step for step in range(1, 13) if step % config.gradient_accumulate_step == 0 and rule(config, step)]


def test_when() -> None:
    assert steps(evaluates) == [12]  # always at the end
    assert steps(evaluates, evaluation_steps=5) == [5, 10, 12]
    assert steps(evaluates, evaluation_steps=5, gradient_accumulate_step=2) == [6, 10, 12]
    assert steps(saves) == [12]
    assert steps(saves, checkpoint_steps=4, evaluation_steps=5) == [4, 8, 12]
    assert steps(saves, num_checkpoints=1) == [12]
    assert steps(saves, num_checkpoints=3) == [4, 8, 12]
    assert steps(saves, num_checkpoints=5) == [3, 5, 8, 10, 12]
    assert steps(saves, num_checkpoints=4, gradient_accumulate_step=2) == [4, 6, 10, 12]
    assert steps(saves, num_checkpoints=12) == list(range(1, 13))


def test_the_best_and_the_end() -> None:
    config = Config(patience=2, stop_perplexity=2.0)
    seen = []
    progress = Progress()
    for step, loss in enumerate((3.0, 2.0, 2.0, 1.5, 1.6, 1.7), 1):
        progress = judge(replace(progress, step=step), loss)
        seen.append((progress.best_step, progress.waited, bool(enough(config, progress))))
    # Being as good as the best is no improvement.
    assert seen == [(1, 0, False), (2, 0, False), (2, 1, False), (4, 0, False), (4, 1, False), (4, 2, True)]
    assert enough(config, progress).startswith("2 evaluations in a row have not improved on perplexity 4.482 at step 4")
    assert enough(Config(), progress) == ""
    assert "--stop-perplexity 2" in enough(config, judge(progress, 0.69))
    assert enough(config, judge(progress, 0.7)) == ""
    assert enough(config, Progress()) == ""


def test_epochs_that_change_their_length_on_the_way() -> None:
    assert mean_epoch(2, 0, 100, 50) == 50
    assert 2 * mean_epoch(2, 100, 100, 50) == 100 + 50  # one epoch as it was, and one as it is
    assert 2 * mean_epoch(2, 100, 100, 200) == 100 + 200
    assert 2 * mean_epoch(2, 200, 100, 500) == 200  # nothing is left
    assert 4 * mean_epoch(4, 50, 100, 100) == 400


def test_another_held_out_text_starts_the_comparison_anew() -> None:
    progress = compared_on(Progress(step=3), 17)
    progress = judge(progress, 2.0)
    assert compared_on(progress, 17) == progress
    other = compared_on(progress, 18)
    assert (other.step, other.held_out, other.best_loss, other.best_step, other.waited) == (3, 18, None, None, 0)


def test_epochs_in_steps() -> None:
    def count(sequences: int, **flags: int) -> int:
        return steps_of_epochs(Config(**{"nepochs": 1, "batch_size": 4, **flags}), sequences)

    assert [count(n) for n in (1, 4, 5, 8)] == [1, 1, 2, 2]
    assert count(5, nepochs=2) == 3  # ten sequences, four at a time
    assert count(9, data_group_size=2) == 2
    assert count(9, gradient_accumulate_step=2) == 4  # whole updates


@pytest.fixture
def overfit(flags: Flags, tmp_path: Path) -> Flags:
    """Three lines learnt by heart, evaluated on others: the held-out loss falls once and then rises."""
    task, held = make_task(tmp_path / "task.jsonl", lines=3), make_task(tmp_path / "held.jsonl", lines=4, seed=9)

    def make(**changes: Any) -> dict[str, Any]:  # noqa: ANN401 - whatever a flag takes
        told = {"task_name": task, "evaluation_data": held, "evaluation_steps": 1, "total_steps": 9, "lr": 3e-2}
        return flags(**{**told, **changes})

    return make


def losses(folder: Path) -> list[float]:
    return [row["eval_loss"] for row in read_metrics(folder)]


def number(path: Path) -> int:
    return int(path.read_text())


def trainer(folder: Path, step: int) -> dict[str, Any]:
    return json.loads((folder / f"checkpoint_{step}" / "trainer.json").read_text())


def test_the_best_is_saved_marked_and_kept(overfit: Flags, tmp_path: Path) -> None:
    with Run(2, 1, overfit(keep_checkpoints=1)) as run:
        run.succeed()
    folder = tmp_path / "ck"
    curve = losses(folder)
    best = 1 + curve.index(min(curve))
    assert 1 < best < 7  # or this test would show nothing
    assert number(folder / "best") == best
    assert number(folder / "latest") == 9
    assert {path.name for path in folder.glob("checkpoint_*")} == {f"checkpoint_{best}", "checkpoint_9"}
    assert problem(folder / f"checkpoint_{best}") is None
    state = trainer(folder, 9)
    assert (state["best_step"], state["best_loss"], state["waited"]) == (best, min(curve), 9 - best)
    assert f"the best evaluation: loss {min(curve):.4f}" in run.err(0)
    assert f"that model is in {folder / f'checkpoint_{best}'}" in run.err(0)


@pytest.mark.parametrize(("stages", "replicas"), [(2, 1), (1, 2)])
def test_patience_ends_all_ranks_and_survives_a_restart(
    overfit: Flags, tmp_path: Path, stages: int, replicas: int
) -> None:
    told = overfit(patience=3, checkpoint_steps=1, checkpoint_path=tmp_path / "whole")
    with Run(stages, replicas, told) as run:
        run.succeed()
    whole = tmp_path / "whole"
    curve = losses(whole)
    end = len(curve)
    assert end < 9
    assert min(curve) == curve[-4] < min(curve[-3:])
    assert number(whole / "latest") == end
    assert "ended early: 3 evaluations in a row have not improved on perplexity" in run.err(0)
    # As a kill in the middle of the waiting leaves it; what came after is lost.
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    (cut / "latest").write_text(str(end - 1))
    shutil.rmtree(cut / f"checkpoint_{end}")
    with Run(stages, replicas, {**told, "checkpoint_path": cut}) as run:
        run.succeed()
    assert losses(cut) == curve
    assert trainer(cut, end) == trainer(whole, end)
    # The same command again: it is over. With more patience: it goes on.
    with Run(stages, replicas, {**told, "checkpoint_path": cut}) as run:
        run.succeed()
    assert "nothing to do: 3 evaluations in a row" in run.err(0)
    assert losses(cut) == curve
    with Run(stages, replicas, {**told, "checkpoint_path": cut, "patience": 4}) as run:
        run.succeed()
    assert len(losses(cut)) > end
    # On another text nothing has been waited for yet.
    other = make_task(tmp_path / "other.jsonl", lines=4, seed=10)
    with Run(stages, replicas, {**told, "evaluation_data": other}) as run:
        run.succeed()
    assert losses(whole)[:end] == curve
    assert end < len(losses(whole))


def test_a_perplexity_ends_the_run(overfit: Flags, tmp_path: Path) -> None:
    told = overfit(total_steps=4, checkpoint_path=tmp_path / "whole")
    with Run(1, 1, told) as run:
        run.succeed()
    rows = read_metrics(tmp_path / "whole")
    assert rows[1]["eval_perplexity"] < rows[0]["eval_perplexity"]
    goal = rows[1]["eval_perplexity"] * 1.0001
    with Run(1, 1, overfit(total_steps=4, stop_perplexity=goal)) as run:
        run.succeed()
    assert [row["step"] for row in read_metrics(tmp_path / "ck")] == [1, 2]
    assert number(tmp_path / "ck" / "latest") == number(tmp_path / "ck" / "best") == 2
    assert "has reached --stop-perplexity" in run.err(0)


def test_taken_back_to_an_earlier_step_the_best_is_that_of_then(overfit: Flags, tmp_path: Path) -> None:
    with Run(1, 1, overfit(checkpoint_steps=1, total_steps=4)) as run:
        run.succeed()
    folder = tmp_path / "ck"
    curve = losses(folder)
    assert number(folder / "best") == 2
    with Run(1, 1, overfit(checkpoint_steps=1, total_steps=4, load_step=1)) as run:
        run.succeed()
    assert losses(folder) == curve
    shutil.rmtree(folder / "checkpoint_3")
    shutil.rmtree(folder / "checkpoint_2")
    with Run(1, 1, overfit(total_steps=1, load_step=1)) as run:
        run.succeed()
    assert number(folder / "best") == 1


def test_a_ruined_model_is_not_saved(overfit: Flags, tmp_path: Path) -> None:
    """The loss of the update was taken before it; the evaluation is the first to see the new weights."""
    with Run(2, 1, overfit(lr=1e38)) as run:
        for end in run.wait(30).values():
            assert end.code == 1
            assert "evaluation after update 1: the loss is nan" in end.err
    assert not list((tmp_path / "ck").glob("checkpoint_*"))


def test_killed_at_any_moment_the_best_is_the_same(overfit: Flags, tmp_path: Path) -> None:
    """With little kept, while saving, evaluating and deleting: in the end all is as if it had never been killed."""
    told = overfit(total_steps=40, checkpoint_steps=2, evaluation_steps=3, keep_checkpoints=1, lr=3e-3)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    with Run(2, 1, {**told, "checkpoint_path": whole}) as run:
        run.succeed()
    for goal in (7, 16, 29):
        with Run(2, 1, {**told, "checkpoint_path": cut}) as run:
            run.wait_for_step(goal)
    with Run(2, 1, {**told, "checkpoint_path": cut}) as run:
        run.succeed()
    columns = ("step", "loss", "eval_loss")
    curves = [[[row.get(key) for key in columns] for row in read_metrics(folder)] for folder in (whole, cut)]
    assert curves[0] == curves[1]
    assert trainer(cut, 40) == trainer(whole, 40)
    best = number(whole / "best")
    for folder in (whole, cut):
        assert number(folder / "best") == best
        assert {path.name for path in folder.glob("checkpoint_*")} == {f"checkpoint_{best}", "checkpoint_40"}
