"""One thread that looks after all NCCL communicators of a process: each call has a deadline, which NCCL does not know.

When a peer is lost, or another rank has failed, all communicators are aborted, so that no stream waits for ever, and no
host thread for a stream. The failure is told first: who reads what an aborted transfer left behind finds it known.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from .errors import WireError


class Watched(Protocol):
    """What the watchdog needs of a group."""

    name: str

    def trouble(self) -> WireError | None: ...

    def abort(self, error: WireError) -> None: ...


class Watchdog:
    """Looks every `period_s` seconds. `check` raises once some rank has failed; `on_error` is told what is found."""

    def __init__(
        self, check: Callable[[], None], on_error: Callable[[WireError], object], *, period_s: float = 0.1
    ) -> None:
        self.check, self._on_error, self._period_s = check, on_error, period_s
        self._groups: list[Watched] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, group: Watched) -> None:
        with self._lock:
            self._groups.append(group)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
                self._thread.start()

    def forget(self, group: Watched) -> None:
        with self._lock:
            self._groups.remove(group)

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            # The lock is held while looking: a group that was forgotten is not looked at any more.
            with self._lock:
                error = self._trouble()
                groups = list(self._groups)
            if error is None:
                continue
            # At once and each in its own thread: freeing one communicator waits for the device, which the transfers of
            # the others still occupy.
            for group in groups:
                threading.Thread(target=group.abort, args=(error,), name=f"aborting {group.name}", daemon=True).start()
            return

    def _trouble(self) -> WireError | None:
        try:
            self.check()
            found = next((error for group in self._groups if (error := group.trouble()) is not None), None)
        except WireError as news:
            return news
        except RuntimeError as broken:  # CUDA's own: the device is of no use any more
            found = WireError(f"the CUDA device has failed: {str(broken).partition(chr(10))[0]}")
        if found is not None:
            self._on_error(found)
        return found
