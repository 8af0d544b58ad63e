"""How example_scripts/launch.sh ends, with ranks that do nothing but end."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
STANDS_IN = """#!/usr/bin/env bash
# Ends as RANK0, RANK1 … say: a status, or what to do when SIGTERM comes.
while [ "$1" != --rank ]; do shift; done
how=RANK$2
case ${!how} in
    [0-9]*) exit "${!how}" ;;
esac
trap "${!how}" TERM
touch "$LOGS/waits$2"
for ((i = 0; i < 600; i++)); do sleep 0.1; done
"""
LAUNCH = ". example_scripts/launch.sh; STAGES=2 REPLICAS=1 RANKS_HERE=2; farspan_launch"


def launch(folder: Path, rank0: str, rank1: str) -> subprocess.Popen[str]:
    stand_in = folder / "python"
    stand_in.write_text(STANDS_IN)
    stand_in.chmod(0o755)
    env = {"PATH": "/usr/bin:/bin", "PYTHON": str(stand_in), "LOGS": str(folder), "RANK0": rank0, "RANK1": rank1}
    return subprocess.Popen(["bash", "-c", LAUNCH], cwd=REPO, env=env, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("rank0", "rank1", "status"),
    [("0", "0", 0), ("0", "1", 1), ("75", "75", 75), ("75", "1", 1), ("2", "2", 2)],
)
def test_the_status_of_what_ends_by_itself(tmp_path: Path, rank0: str, rank1: str, status: int) -> None:
    with launch(tmp_path, rank0, rank1) as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == status
    assert ("exited with status" in said) == (status not in (0, 75))


@pytest.mark.parametrize(
    ("rank0", "rank1", "status"),
    [("exit 75", "exit 75", 75), ("exit 0", "exit 0", 0), ("exit 75", "kill -9 $$", 128 + signal.SIGTERM)],
)
def test_the_status_of_what_is_stopped(tmp_path: Path, rank0: str, rank1: str, status: int) -> None:
    with launch(tmp_path, rank0, rank1) as process:
        deadline = time.monotonic() + 30
        while not all((tmp_path / f"waits{rank}").exists() for rank in (0, 1)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == status


@pytest.mark.parametrize("family", ["gptj", "gptneox", "llama"])
@pytest.mark.parametrize(
    ("tasks", "flag"), [("tasks.json", "--task-config"), ("a.jsonl:0.5,b.jsonl:0.5", "--task-name")]
)
def test_tasks_are_files_or_a_task_config(tmp_path: Path, family: str, tasks: str, flag: str) -> None:
    env = {"PATH": "/usr/bin:/bin", "PYTHON": "/bin/true", "CKPT": str(tmp_path), "STAGES": "1", "REPLICAS": "1"}
    script = ["bash", f"example_scripts/finetune_{family}.sh"]
    done = subprocess.run(
        script, cwd=REPO, env={**env, "TASKS": tasks}, capture_output=True, text=True, timeout=60, check=True
    )
    assert f" {flag} {tasks} " in done.stderr.replace("\\", "")
    assert ({"--task-name", "--task-config"} - {flag}).pop() not in done.stderr
    none = subprocess.run(script, cwd=REPO, env=env, capture_output=True, text=True, timeout=60)
    assert none.returncode == 2
    assert "set TASKS to the training data" in none.stderr
