"""Which checkpoints are one run's: after crashes at several sites, and beside those of a branch that was left."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from farspan.comm.topology import Topology
from farspan.modules.shards import ShardStore
from farspan.pipeline.stage import Stage
from farspan.runtime.checkpoints.checkpoint import CheckpointError, Checkpoints, Progress, problem
from farspan.runtime.flags.config import Config
from farspan.runtime.checkpoints.lineage import Found, belongs, choose
from farspan.runtime.optim.optimizer import Optimizer
from farspan.runtime.checkpoints.retention import checkpoint_steps
from faults import killed_before_marking, killed_before_rename, signalled
from launch import Run

Flags = Callable[..., dict[str, Any]]


def site(latest: int | None, *found: Found, new: str = "new") -> dict[str, Any]:
    return {"root": "/ck", "latest": latest, "found": [asdict(f) for f in found], "new": new}


def good(step: int, save: str | None = None, *branches: tuple[int, str]) -> Found:
    return Found(step, save or f"save{step}", [list(branch) for branch in branches])


def test_the_newest_that_all_have() -> None:
    start = choose([site(4, good(2), good(4)), site(4, good(2), good(4))], None)
    assert (start.step, start.branches, start.own, start.passed_over) == (4, [], {2, 4}, [])
    assert choose([site(None, good(2)), site(None, good(2))], None).step is None
    assert choose([site(None), site(None)], None).branches == []
    # One site has not come to marking 4; or a person has written there where to go back to.
    start = choose([site(4, good(2), good(4)), site(2, good(2), good(4))], None)
    assert (start.step, start.branches) == (2, [[2, "new"]])
    # It died before its first mark.
    assert choose([site(4, good(4)), site(None, good(4))], None).step == 4


def test_checkpoints_from_before_there_were_ids() -> None:
    old = [Found(step, None, []) for step in (2, 4)]
    start = choose([site(4, *old), site(4, *old)], None)
    assert (start.step, start.branches, start.own) == (4, [], {2, 4})
    assert choose([site(4, *old), site(4, old[0], good(4))], None).step == 2


def test_different_saves_of_one_step_are_named_and_passed_over() -> None:
    ranks = [site(4, good(2), good(4, "a")), site(4, good(2), good(4, "b"))]
    start = choose(ranks, None)
    assert start.step == 2
    assert start.passed_over == ["/ck/checkpoint_4: rank 0 and rank 1 hold different saves of this step"]
    with pytest.raises(CheckpointError, match=r"different saves of this step\). Those that are: 2$"):
        choose(ranks, 4)
    with pytest.raises(CheckpointError, match=r"no checkpoint is complete for every rank .*different saves"):
        choose([site(4, good(4, "a")), site(4, good(4, "b"))], None)


def test_what_lies_on_the_way() -> None:
    run = [[4, "x"], [6, "y"]]
    assert [step for step in (2, 4) if belongs(step, [], run)] == [2, 4]
    assert not belongs(5, [], run)
    assert belongs(6, [[4, "x"]], run)
    assert not belongs(8, [[4, "x"]], run)
    assert not belongs(6, [[4, "z"]], run)
    assert belongs(8, run, run)


def test_a_branch_begins_where_something_is_left_behind() -> None:
    here = site(8, good(4), good(8))
    assert choose([here], 8).branches == choose([here], None).branches == []
    assert choose([here], 4).branches == [[4, "new"]]
    assert choose([here], 0).branches == [[0, "new"]]
    assert choose([site(None, good(4), new="a"), site(None, new="b")], None).branches == [[0, "a"]]
    again = choose([site(6, good(4), good(6, "s", (4, "x")), good(8))], None)
    assert (again.step, again.own, again.branches) == (6, {4, 6}, [[4, "x"], [6, "new"]])


BROKEN = "model-00007-of-00007.safetensors is missing"


def test_falling_back_stays_on_the_branch() -> None:
    own = [good(18), good(20, None, (18, "x"))]
    left = good(22)
    newest = good(25, None, (18, "x"))
    start = choose([site(25, *own, left, replace(newest, fault=BROKEN))], None)
    assert start.step == 20
    assert start.passed_over == [
        "/ck/checkpoint_22: it is of a branch that this run has left",
        f"/ck/checkpoint_25 (rank 0): {BROKEN}",
    ]
    # Another site's manifest will do.
    assert choose([site(25, *own, left), site(25, *own, left, newest)], None).step == 20
    # Nobody knows any more on which branch 25 was; a step that is on all of them may be taken.
    with pytest.raises(CheckpointError, match=r"rank 0 has no /ck/checkpoint_25; .* --load-step \(18, 20, 22\)"):
        choose([site(25, *own, left)], None)
    assert choose([site(25, *own)], None).step == 20
    with pytest.raises(CheckpointError, match=r"--load-step \(22\)"):
        choose([site(25, left, replace(newest, fault=BROKEN))], None)
    assert choose([site(25, *own, left, replace(newest, fault=BROKEN))], 22).branches == [[22, "new"]]


class Alone:
    """A meeting of one rank."""

    rank = 0

    def exchange(self, topic: str, value: object, timeout_s: float | None = None) -> list[object]:
        return [value]


class Life:
    """One run after another over the same folder, without training."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root, self.model = root, model
        self.spec = ShardStore(model).spec
        self.units = range(self.spec.unit_count)
        stage = Stage(self.spec, self.units, dtype=torch.float32, device=torch.device("cpu"))
        self.optimizer = Optimizer(stage, Config())

    def start(self, keep: int, wanted: int | None = None) -> int | None:
        self.wanted = wanted
        self.checkpoints = Checkpoints(self.root, Alone(), Topology(1, 1), 1.0, keep)  # type: ignore[arg-type]
        return self.checkpoints.find(self.units, self.spec, wanted)

    def load(self, step: int) -> Progress:
        progress = self.checkpoints.load(step, self.spec, self.optimizer)
        self.checkpoints.go_on(progress, taken_back=self.wanted is not None)
        return progress

    def save(self, step: int, best: int | None = None) -> None:
        progress = Progress(step=step, best_step=best, best_loss=1.0 if best else None)
        self.checkpoints.save(progress, self.spec, self.optimizer, torch.float32, self.model, self.model)


@pytest.fixture
def life(tmp_path: Path, model: Path) -> Life:
    return Life(tmp_path, model)


def test_a_left_branch_is_neither_counted_nor_deleted(life: Life) -> None:
    assert life.start(-1) is None
    for step in (14, 18, 22):
        life.save(step)
    assert life.start(2, wanted=18) == 18
    life.load(18)
    for step in (20, 25):
        life.save(step)
    assert checkpoint_steps(life.root) == [20, 22, 25]
    (life.root / "checkpoint_25" / "model-00007-of-00007.safetensors").unlink()
    assert life.start(2) == 20
    life.load(20)
    assert (life.root / "latest").read_text() == "25"  # somebody may bring the file back
    assert life.start(1, wanted=22) == 22  # and back to it
    life.load(22)
    life.save(30)
    assert checkpoint_steps(life.root) == [20, 25, 30]


def test_starting_over_leaves_what_is_there(life: Life) -> None:
    life.start(-1)
    for step in (2, 4, 6):
        life.save(step)
    assert life.start(1, wanted=0) is None
    life.save(3)
    life.save(5)
    assert checkpoint_steps(life.root) == [2, 4, 5, 6]
    assert life.start(1) == 5


def test_a_best_that_was_deleted_is_forgotten(life: Life, caplog: pytest.LogCaptureFixture) -> None:
    life.start(2)
    life.save(2, best=2)
    life.save(4, best=2)
    assert life.start(2) == 4
    assert life.load(4).best_step == 2
    life.save(6, best=6)
    assert checkpoint_steps(life.root) == [4, 6]
    assert "gone" not in caplog.text
    assert life.start(2, wanted=4) == 4
    progress = life.load(4)
    assert (progress.best_step, progress.best_loss, progress.waited) == (None, None, 0)
    assert not (life.root / "best").exists()
    assert "the best checkpoint, of step 2, is gone: looking for a best anew" in caplog.text


def test_a_folder_that_resists_its_deletion_keeps_no_save_from_its_name(
    life: Life, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    life.start(-1)
    for step in (2, 4):
        life.save(step)
    before = saves([life.root], 4)
    life.start(-1, wanted=2)
    real = shutil.rmtree

    def busy(path: Path, ignore_errors: bool = False) -> None:
        if path.name.endswith(".old") and not ignore_errors:
            raise OSError(16, "Device or resource busy")
        real(path, ignore_errors)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        life.save(4)
    assert saves([life.root], 4) != before
    assert problem(life.root / "checkpoint_4") is None
    assert caplog.text.count("Device or resource busy") == 1
    life.save(6)
    assert not list(life.root.glob(".checkpoint*"))


def test_checkpoints_of_before_are_taken_over(life: Life) -> None:
    life.start(-1)
    for step in (2, 4, 6):
        life.save(step)
        manifest = life.root / f"checkpoint_{step}" / "manifest.json"
        facts = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({"format": 1, "files": facts["files"]}))
    assert life.start(1) == 6
    assert life.load(6).step == 6
    assert life.start(1, wanted=4) == 4
    life.load(4)
    life.save(5)
    assert checkpoint_steps(life.root) == [5, 6]


def test_taken_back_and_killed_the_run_stays_back(flags: Flags, tmp_path: Path) -> None:
    told = flags(checkpoint_steps=2)
    with Run(1, 1, told) as run:
        run.succeed()
    killed = partial(signalled, "in a step", signal.SIGKILL, str(tmp_path / "when"))
    with Run(1, 1, {**told, "load_step": 2, "checkpoint_steps": 0}, faults={0: killed}) as run:
        assert run.wait()[0].code == -signal.SIGKILL
    assert (tmp_path / "ck" / "latest").read_text() == "2"
    with Run(1, 1, told) as run:
        run.succeed()
    assert f"resuming from {tmp_path / 'ck' / 'checkpoint_2'}" in run.err(0)


def two_sites(tmp_path: Path) -> tuple[list[Path], dict[int, dict[str, Any]]]:
    sites = [tmp_path / "site0", tmp_path / "site1"]
    return sites, {rank: {"checkpoint_path": path} for rank, path in enumerate(sites)}


def saves(sites: list[Path], step: int) -> set[str]:
    return {json.loads((path / f"checkpoint_{step}" / "manifest.json").read_text())["save"] for path in sites}


def test_a_crash_between_two_renames_is_never_half_of_each(flags: Flags, tmp_path: Path) -> None:
    """Taken back, with another learning rate; one site then has the new step 6, the other the old one."""
    sites, by_rank = two_sites(tmp_path)
    told = flags(checkpoint_steps=2, checkpoint_path=tmp_path / "logs")
    with Run(2, 1, told, by_rank=by_rank) as run:
        run.succeed()
    assert len(saves(sites, 6)) == 1
    back = {**told, "load_step": 4, "lr": 1e-3}
    killed = partial(killed_before_rename, 6, str(sites[0]))
    with Run(2, 1, back, by_rank=by_rank, faults={1: killed}) as run:
        assert run.wait()[1].code == -signal.SIGKILL
    assert len(saves(sites, 6)) == 2
    assert [(path / "latest").read_text() for path in sites] == ["4", "4"]
    for path in sites:  # as a run of before would have left it
        (path / "latest").write_text("6")
    with Run(2, 1, told, by_rank=by_rank) as run:
        run.succeed()
    assert "checkpoint_6: rank 0 and rank 1 hold different saves of this step" in run.err(0)
    assert f"resuming from {sites[0] / 'checkpoint_4'}" in run.err(0)
    assert len(saves(sites, 6)) == 1


def test_a_site_that_died_before_its_first_mark_goes_on(flags: Flags, tmp_path: Path) -> None:
    sites, by_rank = two_sites(tmp_path)
    told = flags(checkpoint_steps=2, checkpoint_path=tmp_path / "logs")
    killed = partial(killed_before_marking, str(sites[0]))
    with Run(2, 1, told, by_rank=by_rank, faults={1: killed}) as run:
        assert run.wait()[1].code == -signal.SIGKILL
    assert not (sites[1] / "latest").exists()
    with Run(2, 1, told, by_rank=by_rank) as run:
        run.succeed()
    assert f"resuming from {sites[0] / 'checkpoint_2'}" in run.err(0)
