"""Contestants that train side by side, in turns of one step: whoever is not at work waits in a pipe or for its
neighbour. So the machine's moods meet all of them alike."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import psutil
import torch
from transformers.utils import logging

TOLERANCE = 1e-4  # of the losses, relative: rounding, amplified by the updates so far
PATIENCE_S = 300.0
QUIET = 0.03  # of all cores: what others may take without spoiling the times

# The server imports everything once; each rank is a fork of it.
server = multiprocessing.get_context("forkserver")


def _rank(target: Callable, rank: int, gate: Connection, folder: Path, *args: object) -> None:
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    target(rank, gate, *args)


@dataclass
class Contestant:
    """`ranks` processes that run `target`, each with its own arguments."""

    name: str
    folder: Path
    target: Callable
    ranks: list[tuple]
    peer: bool = True
    """Whether it is what others are measured by."""
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    others_cpu_s: list[float] = field(default_factory=list)

    def start(self) -> None:
        self.folder.mkdir(parents=True)
        self._gates, self._processes = [], []
        for rank, args in enumerate(self.ranks):
            ours, theirs = multiprocessing.Pipe()
            process = server.Process(target=_rank, args=(self.target, rank, theirs, self.folder, *args), daemon=True)
            process.start()
            theirs.close()
            self._gates.append(ours)
            self._processes.append(process)

    def finish_step(self) -> None:
        """Take down the step that is under way."""
        seconds, loss = self._hear(0)
        if loss is None:
            loss = self._hear(-1)[1]
        self.seconds.append(seconds)
        self.losses.append(loss)

    def step(self) -> None:
        own, all_busy = self._cpu(), busy_s()
        self._gates[0].send("your turn")
        self.finish_step()
        self.cpu_s.append(self._cpu() - own)
        self.others_cpu_s.append(busy_s() - all_busy - self.cpu_s[-1])

    def _cpu(self) -> float:
        """CPU seconds, user and system, of all ranks so far."""
        times = [psutil.Process(process.pid).cpu_times() for process in self._processes]
        return sum(time.user + time.system for time in times)

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def _hear(self, rank: int) -> tuple:
        gate = self._gates[rank]
        try:
            if gate.poll(PATIENCE_S):
                return gate.recv()
            reason = f"silent for {PATIENCE_S:.0f} s"
        except (EOFError, ConnectionResetError):
            reason = "has died"
        logs = "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(self.folder.glob("*.log")))
        raise SystemExit(f"{self.name}: rank {range(len(self._gates))[rank]} {reason}\n{logs}")


def busy_s() -> float:
    """CPU seconds that were not idle, of all cores since the machine's start."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq + times.steal


def compete(parts: dict[str, list[Contestant]], rounds: int) -> None:
    """A first step of all at once, to be warm, then `rounds` in which each has one step to itself."""
    everyone = [contestant for part in parts.values() for contestant in part]
    for contestant in everyone:
        contestant.start()
    try:
        for contestant in everyone:
            contestant.finish_step()
            contestant.seconds.clear()
        for number in range(rounds):
            for contestant in everyone if number % 2 == 0 else reversed(everyone):
                contestant.step()
            if sys.stderr.isatty():
                print(f"\rround {number + 1} of {rounds}", end="\n" * (number + 1 == rounds), file=sys.stderr)
        for losses in zip(*(contestant.losses for contestant in everyone), strict=True):
            if max(losses) - min(losses) > TOLERANCE * max(losses):
                seen = "\n".join(f"{contestant.name}: {contestant.losses}" for contestant in everyone)
                raise SystemExit(f"the contestants do not train the same:\n{seen}")
    finally:
        for contestant in everyone:
            contestant.kill()


def table(title: str, part: list[Contestant]) -> Iterator[str]:
    """The reference is the fastest of the peers."""
    best = min((contestant for contestant in part if contestant.peer), key=lambda c: median(c.seconds))
    yield f"{title:<28}{'median s':>9}{'fastest':>9}{'slowest':>9}{'CPU s':>9}   ÷ {best.name}"
    for contestant in part:
        times = contestant.seconds
        ratio = median(times) / median(best.seconds)
        by_round = median(own / other for own, other in zip(times, best.seconds, strict=True))
        yield (
            f"  {contestant.name:<26}{median(times):9.3f}{min(times):9.3f}{max(times):9.3f}"
            f"{median(contestant.cpu_s):9.3f}   {ratio:.3f}  (round by round {by_round:.3f})"
        )
    yield ""


def disturbance(everyone: list[Contestant]) -> str:
    spent = sum(sum(contestant.seconds) for contestant in everyone) * psutil.cpu_count()
    share = sum(sum(contestant.others_cpu_s) for contestant in everyone) / spent
    warning = ": these times say little; wait for an idle machine" if share > QUIET else ""
    return f"other processes took {share:.1%} of the cores meanwhile{warning}\n"
