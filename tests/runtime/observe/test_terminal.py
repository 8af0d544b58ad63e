"""What a person sees of a run while it goes: the bar of a terminal, and lines where there is none."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import struct
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from farspan.runtime.flags.config import parse
from farspan.runtime.observe import terminal as module
from farspan.runtime.observe.metrics import Metrics

EVALUATED = {"eval_loss": 2.3456, "eval_perplexity": 10.44}


def opened(folder: Path, total: int, log_steps: int = 0) -> Metrics:
    words = f"--checkpoint-path {folder} --total-steps {total} --log-steps {log_steps}".split()
    return Metrics(parse(words, {})[0], 0)


def row(step: int, **more: float) -> dict[str, Any]:
    shown = {"step": step, "loss": 12.3456, "lr": 1e-5, "grad_norm": 1.0, "tokens_per_s": 123_456.0, "step_s": 1.0}
    return {**shown, "tokens": step, **more}


class Screen:
    """A terminal, as a pair of files."""

    def __init__(self) -> None:
        self._main, side = pty.openpty()
        self.stderr = open(side, "w")  # noqa: SIM115 - closed below

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def lines(self) -> list[str]:
        self.stderr.flush()
        shown = b""
        while select.select([self._main], [], [], 0)[0]:
            shown += os.read(self._main, 1 << 16)
        return [line for line in re.split("[\r\n]+", shown.decode()) if line.strip()]

    def close(self) -> None:
        self.stderr.close()
        os.close(self._main)


@pytest.fixture
def screen() -> Iterator[Screen]:
    made = Screen()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (60, "loss 12.346"),
        (80, "loss 12.346, 123k tok/s, eval 2.346"),
        (110, "loss 12.346, 123k tok/s, eval 2.346, lr 1.0e-05"),
    ],
)
def test_the_bar_fits_the_terminal(
    screen: Screen, columns: int, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    screen.resize(columns)
    monkeypatch.setattr(sys, "stderr", screen.stderr)
    shown = opened(tmp_path, 20_000)
    shown._terminal._bar.start_t -= 5 * 3600
    for step in (1, 2, 19_000):
        shown.write(row(step, **(EVALUATED if step == 2 else {})))
    shown.close()
    lines = screen.lines()
    assert max(map(len, lines)) < columns
    assert re.fullmatch(rf" 95%\|[█▏▎▍▌▋▊▉ ]{{8,}}\| 19000/20000 5:\d\d:\d\d<.*, {re.escape(told)}", lines[-1])
    assert sum("held-out loss" in line for line in lines) == 1


def piped(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """stderr, into a file."""
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    return stderr


def steps_told(text: str) -> list[int]:
    assert "\r" not in text
    assert "%|" not in text
    lines = text.splitlines()
    assert all(line.startswith("step ") for line in lines)
    return [int(re.findall(r"\d+", line)[0]) for line in lines if "held-out" not in line]


def test_without_a_terminal_there_is_a_line_a_minute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pipe = piped(monkeypatch)
    shown = opened(tmp_path, 10)
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    for step in range(1, 11):
        shown.write(row(step, **(EVALUATED if step == 6 else {})))
        now += 25.0
    shown.close()
    assert steps_told(pipe.getvalue()) == [1, 4, 7, 10]
    assert [line for line in pipe.getvalue().splitlines() if "held-out" in line] == [
        "step 6/10  held-out loss 2.3456 (perplexity 10.44)"
    ]


def test_without_a_terminal_log_steps_say_when(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pipe = piped(monkeypatch)
    shown = opened(tmp_path, 10, log_steps=4)
    for step in range(1, 11):
        shown.write(row(step))
    shown.close()
    assert steps_told(pipe.getvalue()) == [1, 4, 8, 10]


def test_the_last_update_of_a_stopped_run_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pipe = piped(monkeypatch)
    shown = opened(tmp_path, 10)
    for step in (1, 2, 3):
        shown.write(row(step))
    shown.close()
    assert steps_told(pipe.getvalue()) == [1, 3]


def test_on_a_terminal_log_steps_are_lines_above_the_bar(
    screen: Screen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    screen.resize(80)
    monkeypatch.setattr(sys, "stderr", screen.stderr)
    shown = opened(tmp_path, 4, log_steps=2)
    for step in range(1, 5):
        shown.write(row(step))
    shown.close()
    assert [line[:8] for line in screen.lines() if line.startswith("step ")] == ["step 2/4", "step 4/4"]
