"""Recipes at work: here, or ahead of the run in processes of their own. Who does it changes no result."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Protocol

from .recipe import Block, Raw, Recipe
from .task_spec import DataError


class WorkerLost(DataError):
    """A process of --data-workers is gone. Who ended it may have ended others too, this very process in a moment."""


class Pending(Protocol):
    def get(self) -> Block: ...


class Pool(Protocol):
    """Takes raw rows of a task (by its number) and gives their block later. `ahead`: blocks worth asking for early."""

    ahead: int

    def submit(self, task: int, raws: Sequence[Raw]) -> Pending: ...

    def close(self) -> None: ...


class _Done:
    def __init__(self, block: Block) -> None:
        self._block = block

    def get(self) -> Block:
        return self._block


class Inline:
    """In the calling thread, when asked."""

    ahead = 0

    def __init__(self, recipes: Sequence[Recipe | None]) -> None:
        self._recipes = recipes

    def submit(self, task: int, raws: Sequence[Raw]) -> Pending:
        recipe = self._recipes[task]
        assert recipe is not None
        return _Done(recipe(raws))

    def close(self) -> None:
        pass


class _Later:
    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._done = threading.Event()
        self._result: Block | DataError | None = None

    def settle(self, result: Block | DataError) -> None:
        self._result = result
        self._done.set()

    def get(self) -> Block:
        if not self._done.wait(self._timeout_s):
            raise DataError(f"--data-workers: no tokens came within {self._timeout_s:.0f} s; try more or fewer workers")
        if isinstance(self._result, DataError):
            raise self._result
        assert self._result is not None
        return self._result


class Workers:
    """`count` processes. Each has a pipe and a thread that feeds it one job at a time, so no pipe can fill up from both
    ends. A process ends when its pipe closes: at `close`, and just as well when this process is killed."""

    def __init__(self, recipes: Sequence[Recipe | None], count: int, timeout_s: float) -> None:
        self.ahead = 2 * count
        self._timeout_s = timeout_s
        self._jobs: queue.SimpleQueue[tuple[int, Sequence[Raw], _Later] | None] = queue.SimpleQueue()
        context = multiprocessing.get_context("spawn")
        packed = bytes(ForkingPickler.dumps(list(recipes)))
        self._threads: list[threading.Thread] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []
        with _unheeded():
            for number in range(count):
                ours, theirs = context.Pipe()
                who = (theirs, os.getpid())
                process = context.Process(target=_serve, args=who, name=f"tokens-{number}", daemon=True)
                process.start()
                theirs.close()
                # A daemon: a thread that waits for a process must not keep a failed run alive.
                thread = threading.Thread(target=self._feed, args=(process, ours, packed), daemon=True)
                self._processes.append(process)
                self._threads.append(thread)
        for thread in self._threads:
            thread.start()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes if process.pid is not None]

    def submit(self, task: int, raws: Sequence[Raw]) -> Pending:
        pending = _Later(self._timeout_s)
        self._jobs.put((task, raws, pending))
        return pending

    def close(self) -> None:
        """End all processes, what they are at included."""
        for _ in self._threads:
            self._jobs.put(None)
        for process in self._processes:
            process.kill()  # they hold nothing, and heed no other signal
        for process in self._processes:
            process.join()

    def _feed(self, process: multiprocessing.process.BaseProcess, pipe: Connection, recipes: bytes) -> None:
        broken = False
        try:
            pipe.send_bytes(recipes)
        except OSError:
            broken = True
        while (job := self._jobs.get()) is not None:
            task, raws, pending = job
            try:
                if broken:
                    raise EOFError
                pipe.send((task, raws))
                pending.settle(pipe.recv())
            except (EOFError, OSError):
                broken = True
                process.join(1.0)
                pending.settle(
                    WorkerLost(
                        f"a process of --data-workers ended by itself (exit code {process.exitcode}); "
                        "if the machine is short of memory, use fewer"
                    )
                )
            except Exception as error:  # a row that cannot be sent: it is told where its block is wanted
                pending.settle(DataError(f"--data-workers: {type(error).__name__}: {error}"))
        pipe.close()


@contextmanager
def _unheeded() -> Iterator[None]:
    """What is started here heeds neither Ctrl-C nor a launcher's SIGTERM, from its first moment on: these go to the
    whole group of processes, and what they mean is the run's to say. (A process inherits what is blocked.)"""
    resource_tracker.ensure_running()  # else the first start would, and unblock both
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _serve(pipe: Connection, parent: int) -> None:
    """A worker's life: recipes, then jobs, until the pipe closes."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process, one core
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    try:
        recipes: list[Recipe | None] = pipe.recv()
        while True:
            task, raws = pipe.recv()
            recipe = recipes[task]
            assert recipe is not None
            try:
                result: Block | DataError = recipe(raws)
            except DataError as error:
                result = error
            except Exception as error:  # it is told where the block was wanted
                result = DataError(f"--data-workers: {type(error).__name__} while tokenising: {error}")
            pipe.send(result)
    except (EOFError, OSError):
        return


def _leave_with(parent: int) -> None:
    """End with the parent even in the middle of a long block."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)
