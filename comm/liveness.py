"""The first cause of a failure, known to every rank.

Each rank has a watcher thread with its own connection to the store. It counts a heartbeat there, and looks for the one
key under which the first rank that fails writes why. Gloo tells a dead peer's neighbours at once, and everybody else
only that some connection closed: without that key, each rank would name the tenth consequence instead of the cause.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable

from .errors import PeerLost, RemoteFailure, StoreLost, WireError
from .store import StoreClient

_FAILURE = "failure"


class Liveness:
    """Heartbeats and the first cause. `period_s`: seconds between two looks.

    Rank 0 gives up a rank whose heartbeat stands still for `patience_s` seconds.
    `on_hopeless` is called with one line when a failure has been known for `grace_s` seconds and the main thread has
    not ended the process: it is stuck in a call that nothing else can interrupt.
    """

    def __init__(
        self,
        store: StoreClient,
        rank: int,
        world: int,
        where: str,
        on_hopeless: Callable[[str], None],
        *,
        period_s: float = 0.5,
        patience_s: float = 8.0,
        grace_s: float = 5.0,
    ) -> None:
        self.rank, self.world, self._where = rank, world, where
        self._store, self._on_hopeless = store, on_hopeless
        self._period_s, self._patience_s, self._grace_s = period_s, patience_s, grace_s
        # By rank: the last heartbeat seen, and for how many looks. Looks and not seconds, so that a pause of this very
        # process is not held against the others.
        self._seen: dict[int, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._cause: str | None = None
        self._lost: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="liveness", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises `RemoteFailure` once some rank has failed."""
        if self._cause is not None:
            raise RemoteFailure(self._cause)

    def report(self, error: BaseException) -> str:
        """Tell all ranks that this one fails; returns the line to print: the first cause, whoever had it."""
        if self._cause is None and not isinstance(error, RemoteFailure):
            if isinstance(error, PeerLost) and error.peer is None and (lost := self._silent_rank()) is not None:
                error = error.blaming(lost)
            line = str(error) if isinstance(error, WireError) else f"rank {self.rank}: {error}"
            try:
                with self._lock:
                    lost = error.peer if isinstance(error, PeerLost) else None
                    mine = {"rank": self.rank, "line": line, "lost": lost}
                    first = self._store.compare_set(_FAILURE, "", json.dumps(mine))
                self._learn(first)
            except (StoreLost, TimeoutError):
                # With the store gone, a broken connection has one explanation; any other error explains itself.
                self._cause = self._cause or (self._master_lost() if isinstance(error, PeerLost) else line)
        return self._cause or str(error)

    def linger(self, timeout_s: float) -> None:
        """Rank 0 keeps the store open until all who can know of the failure do, at most `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        acks = [f"ack/{rank}" for rank in range(1, self.world) if rank != self._lost]
        while self.rank == 0 and acks and time.monotonic() < deadline:
            with self._lock:
                if self._store.check(acks):
                    return
            time.sleep(0.05)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _learn(self, text: bytes) -> None:
        failure = json.loads(text)
        line, self._lost = failure["line"], failure["lost"]
        if failure["rank"] != self.rank:
            line = f"rank {self.rank}: stopping with the others. First cause: {line}"
        self._cause = self._cause or line
        with self._lock:
            self._store.set(f"ack/{self.rank}", "")

    def _watch(self) -> None:
        while not self._stop.wait(self._period_s):
            try:
                with self._lock:
                    self._store.add(f"beat/{self.rank}", 1)
                    text = self._store.get(_FAILURE) if self._store.check([_FAILURE]) else None
                if text is not None:
                    self._learn(text)
                elif self.rank == 0 and (silent := self._overdue()) is not None:
                    self.report(
                        PeerLost(
                            rank=0,
                            peer=silent,
                            interface=self._where,
                            operation="waiting for its heartbeat",
                            seconds=self._patience_s,
                        )
                    )
            except (StoreLost, TimeoutError):
                self._cause = self._cause or self._master_lost()
            if self._cause is not None:
                if not self._stop.wait(self._grace_s):
                    self._on_hopeless(self._cause)
                return

    def _overdue(self) -> int | None:
        """The rank that has come, has not left, and has been silent for too long."""
        for rank in range(1, self.world):
            with self._lock:
                beat = self._store.add(f"beat/{rank}", 0)
            last, looks = self._seen.get(rank, (0, 0))
            self._seen[rank] = (beat, looks + 1 if beat == last else 0)
            overdue = beat > 0 and (looks + 1) * self._period_s > self._patience_s
            if overdue and not self._store.check([f"bye/{rank}"]):
                return rank
        return None

    def _master_lost(self) -> str:
        return str(PeerLost(rank=self.rank, peer=0, interface=self._where, operation="asking the store", seconds=0.0))

    def _silent_rank(self) -> int | None:
        """The rank whose heartbeat stands still; takes a few periods."""

        def beats() -> list[int]:
            with self._lock:
                return [self._store.add(f"beat/{rank}", 0) for rank in range(self.world)]

        try:
            before = beats()
            time.sleep(3 * self._period_s)
            after = beats()
        except (StoreLost, TimeoutError):
            return 0
        return next((r for r in range(self.world) if r != self.rank and before[r] == after[r]), None)
