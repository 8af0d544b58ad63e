"""Ordered asynchronous work. On CPU a lane is a thread, and waiting for a ticket makes the host wait."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor

Recorder = Callable[[str, str, float, float], None]
"""Takes lane, name, start and end of one piece of work; seconds of `time.perf_counter`."""


class Ticket:
    """The promise of a result. `get` waits for it, and raises what the work raised."""

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check
        self._done = threading.Event()
        self._value: Any = None
        self._error: BaseException | None = None

    def get(self) -> Any:  # noqa: ANN401 - a ticket carries whatever the work returned
        # Waking up now and then lets the news that another rank has failed end a wait that the wire would not.
        while not self._done.wait(0.2):
            self._check()
        if self._error is not None:
            raise self._error
        return self._value

    def _settle(self, value: object, error: BaseException | None) -> None:
        self._value, self._error = value, error
        self._done.set()


class Lane(Protocol):
    """Work submitted to one lane runs in the order of submission."""

    name: str

    def submit(
        self, fn: Callable[[], Any], *, label: str = "", uses: Tensor | None = None, after_caller: bool = True
    ) -> Ticket:
        """Queue `fn`. `uses`: a tensor that it reads, whose memory is kept until then though the submitter lets go.
        `after_caller`: on a device, it begins when what the submitter has queued there is done; without, at once, so
        it must use nothing that the submitter has made."""
        ...

    def close(self) -> None: ...


class ThreadLane:
    """A lane with a thread of its own. A failure is told to `on_error` at once: the main thread may be computing."""

    def __init__(
        self,
        name: str,
        *,
        check: Callable[[], None] = lambda: None,
        on_error: Callable[[BaseException], object] = lambda error: None,
        record: Recorder | None = None,
    ) -> None:
        self.name, self._check, self._on_error, self._record = name, check, on_error, record
        self._queue: queue.SimpleQueue[tuple[Callable[[], Any], str, Ticket] | None] = queue.SimpleQueue()
        # A daemon, since a thread that is stuck in the wire must not keep a failed process alive.
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(
        self, fn: Callable[[], Any], *, label: str = "", uses: Tensor | None = None, after_caller: bool = True
    ) -> Ticket:
        ticket = Ticket(self._check)  # `fn` holds what it uses
        self._queue.put((fn, label, ticket))
        return ticket

    def close(self) -> None:
        """Finish what was submitted and end the thread."""
        last = self.submit(lambda: None)
        self._queue.put(None)
        last.get()
        self._thread.join()

    def _place(self) -> AbstractContextManager[object]:
        """Where the thread works: entered by it before the first piece of work."""
        return nullcontext()

    def _work(self) -> None:
        try:
            with self._place():
                while (item := self._queue.get()) is not None:
                    self._do(*item)
                    del item  # a lane that waits must hold neither its last message nor what came of it
        except Exception as error:  # no work is done here: who has submitted some, or will, hears why
            self._on_error(error)
            while (item := self._queue.get()) is not None:
                item[-1]._settle(None, error)

    def _do(self, fn: Callable[[], Any], label: str, ticket: Ticket) -> None:
        start = time.perf_counter()
        try:
            value = fn()
            if self._record is not None and label:
                self._record(self.name, label, start, time.perf_counter())
        except Exception as error:  # whatever it was, it reaches the one who holds the ticket
            ticket._settle(None, error)
            self._on_error(error)
        else:
            ticket._settle(value, None)
