"""Which checkpoints stay, what a crash leaves, and going on from a step of one's choice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from farspan.comm.topology import Topology
from farspan.modules.shards import ShardStore
from farspan.pipeline.stage import Stage
from farspan.runtime.checkpoints.checkpoint import Checkpoints, Progress, problem
from farspan.runtime.flags.config import Config
from farspan.runtime.optim.optimizer import Optimizer
from farspan.runtime.checkpoints.retention import checkpoint_steps, doomed, prune, remove, sweep
from launch import Run, read_metrics

Flags = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("steps", "newest", "best", "keep", "gone"),
    [
        ([2, 4, 6, 8], 8, None, -1, []),
        ([2, 4, 6, 8], 8, None, 1, [2, 4, 6]),
        ([2, 4, 6, 8], 8, None, 3, [2]),
        ([2, 4, 6, 8], 8, None, 9, []),
        ([2, 4, 6, 8], 8, 2, 1, [4, 6]),
        ([2, 4, 6, 8], 8, 8, 2, [2, 4]),
        ([2, 4, 6, 8], 4, None, 1, [2]),  # 6 and 8 are of a run that was taken back
        ([8], 8, None, 1, []),
    ],
)
def test_what_is_to_go(steps: list[int], newest: int, best: int | None, keep: int, gone: list[int]) -> None:
    assert doomed(steps, newest, best, keep) == gone


def make_folder(root: Path, step: int) -> Path:
    folder = root / f"checkpoint_{step}"
    folder.mkdir(parents=True)
    (folder / "x").write_text("12")
    (folder / "manifest.json").write_text(json.dumps({"files": {"x": 2}}))
    assert problem(folder) is None
    return folder


def test_a_crash_while_deleting_leaves_nothing_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path, 3)

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            (path / "x").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove(folder)
    assert checkpoint_steps(tmp_path) == []
    remove(make_folder(tmp_path, 3))  # what lies in the way is no hindrance
    (tmp_path / ".checkpoint_4.old").mkdir()
    (tmp_path / ".checkpoint_5.tmp").mkdir()
    (tmp_path / ".site-ab12-0").touch()
    make_folder(tmp_path, 6)
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_6"]


def test_what_cannot_be_deleted_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_folder(tmp_path, 1)
    make_folder(tmp_path, 2)

    def refuse(source: Path, target: Path) -> None:
        if source.name == "checkpoint_1":
            raise PermissionError(13, "Permission denied")
        source.rename(target)

    monkeypatch.setattr("os.replace", refuse)
    prune(tmp_path, [1, 2])
    assert checkpoint_steps(tmp_path) == [1]
    assert f"cannot delete {tmp_path / 'checkpoint_1'}: Permission denied" in caplog.text


class Alone:
    """A meeting of one rank; it fails at a topic, as it does when another site has crashed."""

    rank = 0

    def __init__(self, fails_at: str = "") -> None:
        self.fails_at = fails_at

    def exchange(self, topic: str, value: object, timeout_s: float | None = None) -> list[object]:
        if topic == self.fails_at:
            raise ConnectionError(topic)
        return [value]


def test_nothing_is_deleted_before_latest_has_moved_everywhere(tmp_path: Path, model: Path) -> None:
    """Where another site still has the older `latest`, only the older checkpoint can be resumed from."""
    store = ShardStore(model)
    stage = Stage(store.spec, range(store.spec.unit_count), dtype=torch.float32, device=torch.device("cpu"))
    optimizer = Optimizer(stage, Config())

    def save(step: int, meeting: Alone) -> None:
        checkpoints = Checkpoints(tmp_path, meeting, Topology(1, 1), 1.0, 1)  # type: ignore[arg-type]
        checkpoints.save(Progress(step=step), store.spec, optimizer, torch.float32, model, model)

    save(1, Alone())
    with pytest.raises(ConnectionError):
        save(2, Alone("checkpoint_2 marked"))
    assert checkpoint_steps(tmp_path) == [1, 2]
    assert (tmp_path / "latest").read_text() == "2"
    save(3, Alone())
    assert checkpoint_steps(tmp_path) == [3]


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({"checkpoint_steps": 1, "keep_checkpoints": None}, [5, 6]),  # unless the flag says otherwise
        ({"checkpoint_steps": 2, "keep_checkpoints": 1}, [6]),
        ({"checkpoint_steps": 2}, [2, 4, 6]),
        ({"num_checkpoints": 2}, [3, 6]),
        ({"num_checkpoints": 6, "keep_checkpoints": 3}, [4, 5, 6]),
    ],
)
def test_a_run_keeps_so_many(flags: Flags, tmp_path: Path, changes: dict[str, int], left: list[int]) -> None:
    with Run(2, 1, flags(**changes)) as run:
        run.succeed()
    kept = {"keep_checkpoints": -1, **changes}["keep_checkpoints"]
    said = f"of this run's checkpoints the newest {kept or 2} and the best stay, and older ones are deleted"
    assert (said in run.err(0)) == (kept != -1)
    assert checkpoint_steps(tmp_path / "ck") == left
    assert all(problem(tmp_path / "ck" / f"checkpoint_{step}") is None for step in left)
    assert not list((tmp_path / "ck").glob(".checkpoint*"))


def test_each_site_clears_its_own_folder(flags: Flags, tmp_path: Path) -> None:
    sites = {rank: {"checkpoint_path": tmp_path / f"site{rank}"} for rank in range(2)}
    told = flags(checkpoint_steps=2, keep_checkpoints=2, checkpoint_path=tmp_path / "logs")
    with Run(2, 1, told, by_rank=sites) as run:
        run.succeed()
    assert [checkpoint_steps(tmp_path / f"site{rank}") for rank in range(2)] == [[4, 6], [4, 6]]


def test_a_damaged_one_is_not_counted(flags: Flags, tmp_path: Path) -> None:
    """Two good ones stay. A broken folder is left for a person to look at."""
    folder = tmp_path / "ck"
    with Run(1, 1, flags(checkpoint_steps=2, total_steps=4)) as run:
        run.succeed()
    (folder / "checkpoint_4" / "manifest.json").unlink()
    with Run(1, 1, flags(checkpoint_steps=5, total_steps=5, keep_checkpoints=2)) as run:
        run.succeed()
    assert "passing over" in run.err(0)
    assert checkpoint_steps(folder) == [2, 4, 5]


def test_going_on_from_a_chosen_step(flags: Flags, tmp_path: Path) -> None:
    def curve() -> list[float]:
        return [row["loss"] for row in read_metrics(tmp_path / "ck")]

    told = flags(checkpoint_steps=2)
    with Run(2, 1, told) as run:
        run.succeed()
    whole = curve()
    with Run(2, 1, {**told, "load_step": 2}) as run:
        run.succeed()
    assert f"resuming from {tmp_path / 'ck' / 'checkpoint_2'}" in run.err(0)
    assert curve() == whole
    (tmp_path / "ck" / "latest").write_text("2")
    with Run(2, 1, {**told, "load_step": 4}) as run:  # past `latest`: the flag says so
        run.succeed()
    assert curve() == whole
    assert (tmp_path / "ck" / "latest").read_text() == "6"


@pytest.mark.parametrize("harm", ["none", "damaged", "nothing saved"])
def test_a_step_that_is_not_there(flags: Flags, tmp_path: Path, harm: str) -> None:
    told = flags(checkpoint_steps=2)
    if harm != "nothing saved":
        with Run(2, 1, told) as run:
            run.succeed()
    if harm == "damaged":
        (tmp_path / "ck" / "checkpoint_4" / "model-00007-of-00007.safetensors").unlink()
    with Run(2, 1, {**told, "load_step": 4 if harm == "damaged" else 3}) as run:
        ended = run.wait(30)
    want = {
        "none": "--load-step 3: no such checkpoint is complete for every rank. Those that are: 2, 4, 6",
        "damaged": "model-00007-of-00007.safetensors is missing). Those that are: 2, 6",
        "nothing saved": "Those that are: none",
    }
    for end in ended.values():
        assert end.code == 1
        assert want[harm] in end.err
