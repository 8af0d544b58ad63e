"""One thread that looks after all NCCL communicators of a process: each call has a deadline, which NCCL does not know.

When a peer is lost, or another rank has failed, all communicators are aborted, so that no stream waits for ever, and no
host thread for a stream. The failure is told first: who reads what an aborted transfer left behind finds it known.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from ..errors import WireError


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
                error, known = self._trouble()
                groups = list(self._groups)
            if error is None:
                continue
            try:
                if not known:
                    self._on_error(error)
            finally:
                # At once and each in its own thread: freeing one communicator waits for the device, which the
                # transfers of the others still occupy.
                for group in groups:
                    name = f"aborting {group.name}"
                    threading.Thread(target=group.abort, args=(error,), name=name, daemon=True).start()
            return

    def _trouble(self) -> tuple[WireError | None, bool]:
        """What is wrong, and whether all ranks know it already. Whatever comes up in here is trouble: with this thread
        gone, NCCL would wait for ever."""
        try:
            self.check()
            return next((error for group in self._groups if (error := group.trouble()) is not None), None), False
        except WireError as news:
            return news, True
        except Exception as error:
            kind = "the CUDA device has failed" if isinstance(error, RuntimeError) else f"NCCL: {type(error).__name__}"
            return WireError(f"{kind}: {str(error).partition(chr(10))[0]}"), False
