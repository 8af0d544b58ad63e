"""How long a run is: --nepochs, and the one update of --as-test."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chars import mixture, write
from launch import Run, read_metrics
from tiny import make_task
from transformers import AutoModelForCausalLM

Flags = Callable[..., dict[str, Any]]


def words(path: Path) -> list[list[str]]:
    return [json.loads(line)["text"].split() for line in path.read_text().splitlines()]


def test_an_epoch_holds_every_document(tmp_path: Path) -> None:
    """Of one task: every document once, and less than a sequence of the next epoch."""
    path = make_task(tmp_path / "a.jsonl", lines=23)
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    made = mixture(tmp_path, str(path), 16)
    count = made.sequences()
    assert count == -(-sum(len(text) + 1 for text in texts) // 16)
    drawn = "".join(map(chr, made.draw(count).tokens.flatten().tolist()))
    once = sum(len(text) + 1 for text in texts)
    assert sorted(drawn[1:once].split("\n")) == sorted(texts)
    assert len(drawn) - once < 16


def test_what_was_counted_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Until the file, the recipe or the rows change, or the disk spoils it."""
    caplog.set_level("INFO")
    path = make_task(tmp_path / "a.jsonl", lines=23)

    def counted(told: str | list[dict[str, Any]] = str(path), length: int = 16, **flags: Any) -> tuple[int, bool]:  # noqa: ANN401
        caplog.clear()
        count = mixture(tmp_path, told, length, **flags).sequences()
        return count, "counting the tokens" in caplog.text

    count, _ = counted()
    assert counted() == (count, False)
    assert counted(length=count * 16) == (-(-count // count), False)  # the tokens are the same ones
    template = [{"path": str(path), "template": "{text}{text}"}]
    assert counted(template)[1] and not counted(template)[1]  # noqa: PT018
    padded = counted(rows="padded")[0]
    assert counted(rows="padded") == (padded, False)
    assert counted(rows="padded", length=8) == (counted(rows="padded", length=8)[0], True)
    for kept in (tmp_path / "cache").glob("*.count"):
        kept.write_bytes(b"")
    assert counted() == (count, True)
    assert "making it anew" in caplog.text
    make_task(path, lines=46)
    assert counted() == (counted()[0], True)
    assert len([*(tmp_path / "cache").glob("*.count")]) == 1  # what an older state of the file left is gone


@pytest.mark.parametrize(("stages", "replicas", "accumulate"), [(2, 1, 1), (1, 2, 2)])
def test_epochs_set_the_length_on_all_ranks(
    flags: Flags, tmp_path: Path, stages: int, replicas: int, accumulate: int
) -> None:
    a, b = make_task(tmp_path / "a.jsonl", lines=9), make_task(tmp_path / "b.jsonl", lines=5, seed=1)
    an_epoch = sum(-(-sum(len(line) for line in words(path)) // 16) for path in (a, b))  # a word is a token
    in_update = accumulate * replicas * 4
    steps = -(-2 * an_epoch // in_update) * accumulate
    told = flags(
        task_name=f"{a}:0.3,{b}:0.7", total_steps=None, nepochs=2, num_checkpoints=2, warmup_steps=1,
        gradient_accumulate_step=accumulate,
    )  # fmt: skip
    with Run(stages, replicas, told) as run:
        run.succeed()
    folder = tmp_path / "ck"
    rows = read_metrics(folder)
    assert rows[-1]["step"] == steps
    updates = steps // accumulate
    assert [row["lr"] for row in rows][-1] == pytest.approx(3e-3 / (updates - 1))  # the schedule knows it too
    assert f"{an_epoch} sequences an epoch, {steps} steps" in run.err(0)
    assert "counting the tokens" in run.err(0)
    state = json.loads((folder / f"checkpoint_{steps}" / "trainer.json").read_text())
    assert state["epoch_sequences"] == an_epoch
    drawn = state["data"]["drawn"]
    assert 2 * an_epoch <= drawn < 2 * an_epoch + in_update
    # Resumed, it counts no more, and ends where it would have.
    half = int(min(p.name.split("_")[1] for p in folder.glob("checkpoint_*") if p.name != f"checkpoint_{steps}"))
    (folder / "latest").write_text(str(half))
    shutil.rmtree(folder / f"checkpoint_{steps}")
    with Run(stages, replicas, told) as run:
        run.succeed()
    assert "counting the tokens" not in run.err(0)
    again = read_metrics(folder)
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]


def test_epochs_are_counted_again_where_rows_are_cut_otherwise(flags: Flags, tmp_path: Path) -> None:
    """One epoch in rows of 16, then the second in rows of 8: every token twice, and no more than an update is over."""
    path = make_task(tmp_path / "a.jsonl", lines=31)
    total = sum(len(line) for line in words(path))
    for epochs, length in ((1, 16), (2, 8), (2, 8)):
        told = flags(task_name=path, total_steps=None, nepochs=epochs, seq_length=length)
        with Run(1, 1, told) as run:
            run.succeed()
    assert "counting the tokens" not in run.err(0)  # the third time nothing has changed
    assert "nothing to do" in run.err(0)
    given = read_metrics(tmp_path / "ck")[-1]["tasks"][path.stem]["tokens"]
    assert 2 * total <= given < 2 * total + 16 + 8 * 2 * 4


@pytest.mark.parametrize(("stages", "replicas", "batch"), [(2, 1, 8), (1, 2, 4)])
def test_epochs_end_where_repeats_do(flags: Flags, tmp_path: Path, stages: int, replicas: int, batch: int) -> None:
    """As many epochs as the task may be read: rows that are missing in the last update are blank, and none is missing
    that rounding up every epoch would have asked for."""
    path = write(tmp_path / "a.jsonl", ["the small red ball was in it"] * 7)
    (tmp_path / "tasks.json").write_text(json.dumps([{"path": str(path), "repeats": 9}]))
    told = flags(
        task_name=None, task_config=tmp_path / "tasks.json", total_steps=None, nepochs=9, batch_size=batch,
        num_checkpoints=2,
    )  # fmt: skip
    once = sum(len(line) for line in words(path))
    total = 9 * once
    assert -(-total // 16) % 8  # else nothing is blank
    assert 9 * -(-once // 16) > 8 * -(-total // (16 * 8))  # else rounding up every epoch asks for no more
    with Run(stages, replicas, told) as run:
        run.succeed()
    rows = read_metrics(tmp_path / "ck")
    assert len(rows) == -(-total // (16 * 8))
    assert rows[-1]["tasks"][path.stem] == {"sequences": -(-total // 16), "tokens": total, "epochs": 9}
    assert rows[-1]["loss"] > 0
    # On from the middle, to the same end.
    (tmp_path / "ck" / "latest").write_text(str(len(rows) // 2))
    with Run(stages, replicas, told) as run:
        run.succeed()
    again = read_metrics(tmp_path / "ck")
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]
    assert "no more than" in run.err(0)


def test_a_warm_up_longer_than_the_epochs_is_refused_by_all(flags: Flags) -> None:
    with Run(2, 1, flags(total_steps=None, nepochs=1, warmup_steps=500)) as run:
        for end in run.wait(30).values():
            assert end.code == 1
            assert "--warmup-steps 500 is more than the run's" in end.err


def as_test(told: dict[str, Any], stages: int = 2, replicas: int = 1, **more: Any) -> Run:  # noqa: ANN401
    return Run(stages, replicas, {**told, "as_test": True}, **more)


def test_as_test_goes_through_everything(flags: Flags, tmp_path: Path, model: Path) -> None:
    """Twice, since people do; and the real run finds nothing of it."""
    held_out = make_task(tmp_path / "held.jsonl", seed=9)
    told = flags(
        evaluation_data=held_out, evaluation_steps=2, patience=1, warmup_steps=3, checkpoint_steps=2,
        gradient_accumulate_step=2, batch_size=2, log_steps=1,
    )  # fmt: skip
    folder = tmp_path / "ck" / "as-test"
    for _ in range(2):
        with as_test(told, 2, 2) as run:
            run.succeed()
        assert "--as-test: all worked: one update, evaluation, checkpoint in" in run.err(0)
        (row,) = read_metrics(folder)
        assert row["step"] == 2
        assert row["eval_loss"] > 0
    exported = AutoModelForCausalLM.from_pretrained(folder / "exported")
    trained = AutoModelForCausalLM.from_pretrained(folder / "checkpoint_2")
    before = AutoModelForCausalLM.from_pretrained(model)
    assert not (folder / "exported" / "optimizer").exists()
    ids = torch.arange(16)[None]
    assert torch.equal(exported(ids).logits, trained(ids).logits)
    assert not torch.allclose(exported(ids).logits, before(ids).logits)  # the update did something
    assert sorted(p.name for p in (tmp_path / "ck").iterdir() if p.suffix != ".err") == ["as-test"]


def test_as_test_with_epochs_and_without_evaluation(flags: Flags) -> None:
    with as_test(flags(total_steps=None, nepochs=3), 1) as run:
        run.succeed()
    assert "all worked: one update, checkpoint in" in run.err(0)
    assert "counting" not in run.err(0)


def test_as_test_where_the_export_fails(flags: Flags, tmp_path: Path) -> None:
    (tmp_path / "ck" / "as-test").mkdir(parents=True)
    (tmp_path / "ck" / "as-test" / "exported").write_text("a file in the way")
    with as_test(flags()) as run:
        for end in run.wait(60).values():
            assert end.code == 1
            assert "--as-test: exporting" in end.err
            assert "all worked" not in end.err


def test_as_test_at_two_sites(flags: Flags, tmp_path: Path) -> None:
    sites = {rank: {"checkpoint_path": tmp_path / f"site{rank}"} for rank in range(2)}
    with as_test(flags(), by_rank=sites) as run:
        run.succeed()
    assert "no export: that folder holds embedding + layers 0–2 alone. The rest: rank 1, " in run.err(0)
    folder = tmp_path / "site0" / "as-test"
    assert f"--save-path {folder}/whole/checkpoint_1. The folder {folder} may be deleted" in run.err(0)
