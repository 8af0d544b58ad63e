"""`.ci/run` on a stand-in for a checkout: what it runs, with which data, where, and how it ends."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CI = Path(__file__).resolve().parents[1] / ".ci" / "run"
RUN = """#!/usr/bin/env bash
echo "$PWD;${FARSPAN_DATA:-};${PYTHONPATH:-};$*;$(echo $(ls ..));$(cat .venv/mark)" >> "$CALLS"
fails=$(cat fails)
[ "$fails" != "$(wc -l < "$CALLS")" ] || { echo "1 failed in 0.1s"; exit 1; }
echo "1 passed in 0.1s"
"""


def ci(folder: Path, data: bool, fails: int = 0) -> tuple[int, str, list[list[str]]]:
    """Exit status, last line and calls of tests/run.sh: [folder, data, PYTHONPATH, words, what lies beside, venv]."""
    checkout, calls = folder / "checkout", folder / "calls"
    for path, text in (("tests/run.sh", RUN), (".venv/mark", "the venv"), ("fails", str(fails))):
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        (checkout / path).write_text(text)
    (checkout / ".ci").mkdir()
    shutil.copy(CI, checkout / ".ci" / "run")
    if data:
        (folder / "shared" / "data").mkdir(parents=True)
    env = {**os.environ, "CALLS": str(calls)}
    env.pop("FARSPAN_DATA", None)
    env.pop("PYTHONPATH", None)
    done = subprocess.run(["bash", checkout / ".ci" / "run"], env=env, stdout=subprocess.PIPE, text=True, check=False)
    return done.returncode, done.stdout.splitlines()[-1], [call.split(";") for call in calls.read_text().splitlines()]


def test_with_data_its_dependents_run_once_more_without(tmp_path: Path) -> None:
    code, last, (first, second) = ci(tmp_path, data=True)
    assert (code, last) == (0, "1 passed in 0.1s")
    assert first[:4] == [str(tmp_path / "checkout"), str(tmp_path / "shared" / "data"), "", ""]
    where = Path(second[0])
    assert where.name == "farspan"
    assert tmp_path not in where.parents
    assert second[1:] == ["", str(where.parent), "--tests-only -m data and not exhaustive", "farspan", "the venv"]
    assert not where.parent.exists()


def test_without_data_there_is_one_run(tmp_path: Path) -> None:
    code, last, calls = ci(tmp_path, data=False)
    assert (code, last, len(calls)) == (0, "1 passed in 0.1s", 1)
    assert calls[0][1] == ""


@pytest.mark.parametrize("fails", [1, 2])
def test_either_run_can_fail(tmp_path: Path, fails: int) -> None:
    code, last, calls = ci(tmp_path, data=True, fails=fails)
    assert (code, last, len(calls)) == (1, "1 failed in 0.1s", fails)
