"""A few real processes that play one scenario over a real wire, with a hard deadline; none outlives the call."""

from __future__ import annotations

import importlib.util
import multiprocessing
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import launch  # its server forks these processes too
import torch
from farspan.comm.errors import WireError
from farspan.comm.groups.gloo import GlooGroup
from torch.distributed import FileStore

_context = multiprocessing.get_context("forkserver")
assert launch.REPO.is_dir()


@dataclass
class Peer:
    """What a scenario sees: its rank, all ranks, and a place to meet."""

    rank: int
    ranks: tuple[int, ...]
    store: FileStore

    @property
    def other(self) -> int:
        (other,) = set(self.ranks) - {self.rank}
        return other

    def group(self, name: str, timeout_s: float = 20.0) -> GlooGroup:
        return GlooGroup(self.store, name, self.ranks, self.rank, "lo", timeout_s)

    def say(self, word: str) -> None:
        self.store.set(word, "")

    def hear(self, word: str) -> None:
        self.store.wait([word], timedelta(seconds=60))


@dataclass
class Told:
    """A wire error, as one process tells it to another."""

    kind: str
    line: str
    facts: dict[str, Any]


def error_of(work: Callable[[], object]) -> Told | None:
    """The wire error that `work` raises, if it does."""
    try:
        work()
    except WireError as error:
        return Told(type(error).__name__, str(error), {k: v for k, v in vars(error).items() if not k.startswith("_")})
    return None


def play(
    scenario: Callable[[Peer], Any],
    ranks: tuple[int, ...],
    folder: Path,
    *,
    dying: Collection[int] = (),
    deadline_s: float = 90.0,
    places: dict[int, Callable[[], None]] | None = None,
) -> dict[int, Any]:
    """Run `scenario`, a function at the top of its file, once in a process for each of `ranks`; what each returned.

    `places`: what a rank's process does first, to be somewhere else.

    Fails where a process raises, ends without an answer (but for the `dying`) or has not ended at the deadline.
    """
    processes, pipes = {}, {}
    end = time.monotonic() + deadline_s
    try:
        for rank in ranks:
            pipes[rank], theirs = _context.Pipe(duplex=False)
            what = scenario.__code__.co_filename, scenario.__name__, rank, ranks, str(folder / "meeting")
            place = (places or {}).get(rank)
            processes[rank] = _context.Process(target=_act, args=(*what, theirs, place))
            processes[rank].start()
            theirs.close()
        answers = {}
        for rank, pipe in pipes.items():
            assert pipe.poll(max(end - time.monotonic(), 0)), f"rank {rank} is silent after {deadline_s} s"
            try:
                answers[rank], trouble = pipe.recv()
            except EOFError:
                assert rank in dying, f"rank {rank} died"
                continue
            assert not trouble, f"rank {rank}:\n{trouble}"
        for rank, process in processes.items():
            process.join(max(end - time.monotonic(), 0))
            assert process.exitcode == 0 or rank in dying, f"rank {rank} ended with {process.exitcode}"
        return answers
    finally:
        for process in processes.values():
            process.kill()
            process.join()


def _act(
    file: str,
    name: str,
    rank: int,
    ranks: tuple[int, ...],
    meeting: str,
    pipe: Connection,
    place: Callable[[], None] | None,
) -> None:
    torch.set_num_threads(1)
    answer, trouble = None, ""
    try:
        if place is not None:
            place()
        spec = importlib.util.spec_from_file_location("scenarios", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        answer = getattr(module, name)(Peer(rank, ranks, FileStore(meeting, len(ranks))))
    except BaseException:
        trouble = traceback.format_exc()
    pipe.send((answer, trouble))
