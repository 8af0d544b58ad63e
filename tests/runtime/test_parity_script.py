"""benchmarks/parity.py: a few steps on real data agree with transformers' loop, and a broken bound ends it with 1."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from launch import REPO
from pretrained import Pretrained

SCRIPT = REPO / "benchmarks" / "parity.py"


@pytest.fixture
def parity() -> ModuleType:
    spec = importlib.util.spec_from_file_location("parity", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["parity"] = module = importlib.util.module_from_spec(spec)  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_five_steps_of_two_stages(tmp_path: Path, pretrained: Pretrained, problems: Path) -> None:
    told = ["--model", pretrained.folder, "--task", problems, "--steps", "5", "--grids", "2x1", "--held-out", "8"]
    script = [sys.executable, SCRIPT, *told, "--docs", tmp_path / "docs"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    text = (tmp_path / "docs" / "parity.md").read_text()
    (row,) = (line.split("|") for line in text.splitlines() if line.startswith("| 2×1"))
    assert 0 <= float(row[2]) < 1e-4
    assert float(row[4]) < float(row[3])  # five steps did something
    assert float(row[6]) < float(row[5])
    assert "5 steps in fp32" in text
    assert (tmp_path / "docs" / "parity.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("losses", "before", "after", "broken"),
    [
        ([3.00005, 2.0], 2.5, 2.0, ""),
        ([3.0, 2.0002], 2.5, 2.0, "the loss of a step is 2.0e-04"),
        ([3.0, float("nan")], 2.5, 2.0, "the loss of a step is nan"),
        ([3.0, 2.0], 2.5002, 2.0, "the held-out loss is 2.0e-04"),
        ([3.0, 2.0], 2.5, 1.9998, "the held-out loss is 2.0e-04"),
        ([3.0, 2.0], 2.5, 2.5, "did not fall"),
    ],
)
def test_a_broken_bound_ends_it_with_1(
    parity: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    losses: list[float],
    before: float,
    after: float,
    broken: str,
) -> None:
    (tmp_path / "task.jsonl").write_text("{}\n" * 3)
    reference = parity.Outcome([3.0, 2.0], 2.5, 2.0)
    monkeypatch.setattr(parity, "hugging_face", lambda *_: reference)
    monkeypatch.setattr(parity, "train", lambda *_: parity.Outcome(losses, before, after))
    monkeypatch.setattr(parity, "draw", lambda *_: None)
    told = ["--model", str(tmp_path), "--task", str(tmp_path / "task.jsonl"), "--held-out", "1", "--grids", "1x1"]
    monkeypatch.setattr(sys, "argv", ["parity.py", *told, "--docs", str(tmp_path)])
    assert parity.main() == bool(broken)
    assert broken in capsys.readouterr().err
