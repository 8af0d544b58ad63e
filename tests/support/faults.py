"""What a test may do to a rank before it starts: `Run(…, faults={1: partial(inf_gradient, 3)})`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from farspan.comm.groups.gloo import GlooGroup
from farspan.comm.meeting.rendezvous import Rendezvous
from farspan.pipeline.executor import Executor
from farspan.pipeline.gradients import Gradients
from farspan.pipeline.stage import Stage
from farspan.runtime.checkpoints import checkpoint
from farspan.runtime.checkpoints.checkpoint import Checkpoints
from farspan.runtime.data.workers import WorkerLost
from farspan.runtime.setup import load, prepare
from farspan.runtime.training import trainer
from farspan.runtime.training.evaluation import Evaluation

PHASES: dict[str, tuple[Any, str, int]] = {
    "while loading": (load, "fill", 1),
    "while connecting": (GlooGroup, "__init__", 2),
    "in a step": (Executor, "step", 3),
    "in evaluation": (Evaluation, "loss", 1),
    "in a checkpoint": (Checkpoints, "save", 1),
}
"""Phase → whose function, and at which call of it a `signalled` rank is hit."""


def signalled(phase: str, number: int, told: str) -> None:
    """This rank sends itself signal `number` in a phase, and writes when (time.monotonic) to the file `told` before."""
    owner, name, due = PHASES[phase]

    def strike() -> None:
        Path(told).write_text(str(time.monotonic()))
        os.kill(os.getpid(), number)

    _before(owner, name, due, strike)


def worker_lost(phase: str) -> None:
    """A process of --data-workers is found dead in a phase."""

    def strike() -> None:
        raise WorkerLost("a process of --data-workers ended by itself (exit code -9)")

    _before(*PHASES[phase], strike)


def meets(other: int) -> None:
    """This rank's patience for the others begins when rank `other` is there, however busy the machine is."""
    real = Rendezvous.agree

    def agree(self: Rendezvous, values: dict[str, str]) -> None:
        self.store.wait([f"handshake/{other}"], timedelta(seconds=60))
        real(self, values)

    Rendezvous.agree = agree  # type: ignore[method-assign]


def slow_to_open(seconds: float) -> None:
    """This rank takes its time with its data, before the first step."""
    _before(load, "open_tasks", 1, lambda: time.sleep(seconds))


def slow_to_save(seconds: float) -> None:
    """This rank takes its time in every checkpoint."""
    _before(Checkpoints, "save", 0, lambda: time.sleep(seconds))


def killed_before_rename(step: int, other: str) -> None:
    """This rank, which leads its site, dies when all of its checkpoint is written and the site `other` has renamed."""
    real = checkpoint._write_flushed

    def write(path: Path, text: str) -> None:
        real(path, text)
        if path.parent.name == f".checkpoint_{step}.tmp":
            _die_once(lambda: not Path(other, path.parent.name).exists())

    checkpoint._write_flushed = write


def killed_before_marking(other: str) -> None:
    """This rank, which leads its site, dies before it marks its first checkpoint, when the site `other` has."""
    _before(Checkpoints, "_mark", 1, lambda: _die_once(Path(other, "latest").exists))


def other_version(version: str) -> None:
    """This rank has another farspan."""
    prepare.__version__ = version


def inf_gradient(updates: int) -> None:
    """After `updates` updates, one gradient of this rank is inf for one update."""
    real, seen = Gradients.zero, []

    def zero(self: Gradients) -> None:
        real(self)
        if len(seen) == updates:
            self.flat[5] = float("inf")
        seen.append(None)

    Gradients.zero = zero  # type: ignore[method-assign]


def slow_forward(seconds: float) -> None:
    """The first forward of this rank's stage takes so long."""
    _before(Stage, "forward", 1, lambda: time.sleep(seconds))


def talkative(seconds: float) -> None:
    """This rank says how far the run is so often."""
    trainer.TELL_S = seconds


def _die_once(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def _before(owner: Any, name: str, due: int, act: Callable[[], None]) -> None:  # noqa: ANN401 - a class or a module
    """Have `act` run before call number `due` (counted from 1; 0: every call) of a function."""
    real, calls = getattr(owner, name), []

    def wrapped(*words: Any, **options: Any) -> Any:  # noqa: ANN401 - whatever the function takes
        calls.append(None)
        if due in (0, len(calls)):
            act()
        return real(*words, **options)

    setattr(owner, name, wrapped)


def told_of_the_disk(log: str) -> None:
    """No fault: what is flushed, and what gets a name, is written to the file `log`, a line each."""
    fsync, replace = os.fsync, os.replace

    def told(what: str) -> None:
        with open(log, "a") as file:
            file.write(what + "\n")

    def flushing(handle: int) -> None:
        fsync(handle)
        told(f"flushed {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")

    def naming(source: Path, target: Path) -> None:
        replace(source, target)
        told(f"named {Path(target).name}")

    os.fsync, os.replace = flushing, naming  # type: ignore[assignment]
