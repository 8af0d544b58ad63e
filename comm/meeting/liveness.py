"""The first cause of a failure, known to every rank.

Each rank has a watcher thread with its own connection to the store. It counts a heartbeat there, looks at this
process's connections (`comm/meeting/neighbours.py`), and looks for the one key under which the first rank that fails
writes why. Gloo tells a dead peer's neighbours at once, and everybody else only that some connection closed: without
that key, each rank would name the tenth consequence instead of the cause.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable

import psutil

from ..errors import InterfaceError, PeerLost, PeerSilent, RemoteFailure, Stopped, StoreLost, line_of
from .interfaces import interface, interfaces
from .neighbours import Connection, Neighbours, connecting_to, endpoint, host_of
from .store import GONE, StoreClient

log = logging.getLogger("farspan")

_FAILURE = "failure"
_LATE_S, _DEAD_S = 5.0, 2.0
"""How long rank 0 waits for others to hear of a failure: those yet to come, and those whose heartbeat stands still."""


class Liveness:
    """Heartbeats and the first cause. `period_s`: seconds between two looks.

    Silence of `patience_s` seconds is a failure: of a rank's heartbeat in the store (rank 0 sees that), of the store
    itself, or of any connection between two ranks, whatever library opened it; but not while bytes still flow between
    this rank and that host, behind which the answers may be queueing.
    `on_hopeless` is called with one line when a failure has been known for `grace_s` seconds and the main thread has
    not ended the process: it is stuck in a call that nothing else can interrupt.
    """

    def __init__(
        self,
        store: StoreClient,
        rank: int,
        world: int,
        interface: str,
        on_hopeless: Callable[[str], None],
        *,
        period_s: float = 1.0,
        patience_s: float = 10.0,
        grace_s: float = 5.0,
    ) -> None:
        self.rank, self.world, self._interface = rank, world, interface
        self._store, self._on_hopeless = store, on_hopeless
        self._period_s, self._patience_s, self._grace_s = period_s, patience_s, grace_s
        self._store_at = endpoint(store.peer)
        self._neighbours = Neighbours(period_s, self._store_at)
        store.wait_while(self._patient_with_store, period_s)
        self._published: list[str] = []
        self._suspects: set[int] = set()
        # By rank: the last heartbeat seen, and for how many looks. Looks and not seconds, so that a pause of this very
        # process is not held against the others.
        self._seen: dict[int, tuple[int, int]] = {}
        self._answered = time.monotonic()
        self._lock = threading.Lock()
        self._cause: str | None = None
        self.stopped = False
        """Whether the first cause is a signal, and no failure."""
        self._lost: int | None = None
        self._deaf = self._leaving = False
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
            if isinstance(error, PeerLost) and error.peer is None and (gone := self._await_gone()) is not None:
                error = error.blaming(gone)
            line = line_of(self.rank, error)
            try:
                with self._lock:
                    # Who is silent on one connection may still hear rank 0, which must then wait for it.
                    lost = error.peer if isinstance(error, PeerLost) and not isinstance(error, PeerSilent) else None
                    mine = {"rank": self.rank, "line": line, "lost": lost, "stopped": isinstance(error, Stopped)}
                    first = self._store.compare_set(_FAILURE, "", json.dumps(mine))
                self._learn(first)
            except (StoreLost, TimeoutError) as trouble:
                # With the store gone, a broken connection has one explanation; any other error explains itself.
                broken = isinstance(error, (PeerLost, StoreLost))
                self.stopped = self._cause is None and isinstance(error, Stopped)
                self._cause = self._cause or (self._master_lost(trouble) if broken else line)
        return self._cause or line_of(self.rank, error)

    def await_news(self) -> None:
        """Give the watcher time to find a first cause, where an error may well be another consequence of it."""
        deadline = time.monotonic() + 3 * self._period_s
        while self._cause is None and time.monotonic() < deadline:
            time.sleep(0.05)

    def linger(self) -> None:
        """Before this process ends itself: rank 0 keeps the store open until all who can know of the failure do, also
        ranks that have yet to come, which would wait for it until their --join-timeout."""
        self._leaving = True
        if self.rank != 0:
            if self._deaf:
                time.sleep(3 * self._period_s)  # rank 0 finds out as we did, and tells the others before they miss us
            return
        start, beats = time.monotonic(), self._beats()
        missing = [rank for rank in range(1, self.world) if rank != self._lost]
        while missing and (passed_s := time.monotonic() - start) < max(_LATE_S, 2 * self._period_s):
            time.sleep(0.05)
            now = self._beats()
            given_up = passed_s > max(_DEAD_S, 3 * self._period_s)
            missing = [
                rank
                for rank in missing
                if not self._store.check([f"ack/{rank}"]) and not (given_up and now[rank] == beats[rank] > 0)
            ]

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _learn(self, text: bytes) -> None:
        failure = json.loads(text)
        line, self._lost, self.stopped = failure["line"], failure["lost"], failure["stopped"]
        if failure["rank"] != self.rank:
            line = f"rank {self.rank}: stopping with the others. First cause: {line}"
        self._cause = self._cause or line
        with self._lock:
            self._store.set(f"ack/{self.rank}", "")

    def _watch(self) -> None:
        while True:
            try:
                self._look()
            except (StoreLost, TimeoutError) as error:
                self._cause = self._cause or self._master_lost(error)
            except (OSError, psutil.Error) as error:  # all descriptors are in use for a moment, say
                log.debug("rank %d: nothing seen this time: %s", self.rank, error)
            except Exception as error:
                self._fail(RuntimeError(f"unexpected {type(error).__name__} in the watcher: {error}"))
            if self._cause is not None:
                if not self._stop.wait(self._grace_s) and not self._leaving:
                    self._on_hopeless(self._cause)
                return
            if self._stop.wait(self._period_s):
                return

    def _fail(self, error: RuntimeError) -> None:
        """The watcher itself cannot go on, and it is in one of its own exceptions."""
        log.debug("rank %d: the watcher failed", self.rank, exc_info=True)
        try:
            self.report(error)
        except Exception:
            log.debug("rank %d: nor could it tell the others", self.rank, exc_info=True)
        self._cause = self._cause or line_of(self.rank, error)

    def _patient_with_store(self, overdue_s: float) -> bool:
        self._neighbours.look()
        return overdue_s <= self._patience_s or self._flows(host_of(self._store_at))

    def _flows(self, *hosts: str) -> bool:
        """Whether bytes have flown between this process and one of the hosts within the patience."""
        return any(self._neighbours.idle_s(host) <= self._patience_s for host in hosts)

    def _look(self) -> None:
        self._neighbours.look()
        with self._lock:
            self._store.add(f"beat/{self.rank}", 1)
            if self._neighbours.endpoints not in ([], self._published):  # a look that failed changes nothing
                self._published = self._neighbours.endpoints
                self._store.set(f"endpoints/{self.rank}", json.dumps(self._published))
            text = self._store.get(_FAILURE) if self._store.check([_FAILURE]) else None
        self._answered = time.monotonic()
        if text is not None:
            self._learn(text)
        elif (trouble := self._silent_connection() or self._absent()) is not None:
            self.report(trouble)

    def _silent_connection(self) -> PeerLost | None:
        """A connection to another rank that has been silent for too long, at two looks in a row."""
        silent = self._neighbours.silent(self._patience_s)
        suspects, self._suspects = self._suspects, {c.inode for c in silent}
        for connection in silent:
            remote = connection.remote or connecting_to(connection.inode)
            if connection.inode not in suspects or self._flows(host_of(remote)):
                continue
            if ranks := self._ranks_at(remote):  # else it is no connection of this run
                return self._silent(ranks, connection, remote)
        return None

    def _silent(self, ranks: list[int], connection: Connection, remote: str) -> PeerSilent:
        local = host_of(connection.local)
        name = next((i.name for i in interfaces().values() if local in i.addresses), self._interface)
        way = f"TCP's probes on {connection.local} → {remote}" if connection.remote else f"connecting to {remote}"
        return PeerSilent(
            rank=self.rank,
            peer=ranks[0] if len(ranks) == 1 else None,
            interface=name,
            operation=way,
            seconds=connection.silent_s,
            detail=_trouble_with(name) or ("" if len(ranks) == 1 else f"one of the ranks {', '.join(map(str, ranks))}"),
        )

    def _ranks_at(self, remote: str) -> list[int]:
        """The other ranks that can be seen at `remote` (host:port), else those at its host."""
        seen = {rank: self._endpoints(rank) for rank in range(self.world) if rank != self.rank}
        exact = [rank for rank, places in seen.items() if remote in places]
        return exact or [rank for rank, places in seen.items() if host_of(remote) in map(host_of, places)]

    def _endpoints(self, rank: int) -> list[str]:
        key = f"endpoints/{rank}"
        with self._lock:
            return json.loads(self._store.get(key)) if self._store.check([key]) else []

    def _absent(self) -> PeerLost | None:
        """On rank 0: a rank that has come, and then left or fell silent without a word."""
        if self.rank != 0:
            return None
        if (gone := self._gone()) is not None:
            return self._lost_from_store(PeerLost, gone, "its connection to the store closed", 0.0)
        for rank, beat in enumerate(self._beats()):
            last, looks = self._seen.get(rank, (0, 0))
            looks = looks + 1 if beat == last else 0
            self._seen[rank], silent_s = (beat, looks), looks * self._period_s
            if (
                rank == 0
                or beat == 0
                or silent_s <= self._patience_s
                or self._flows(*map(host_of, self._endpoints(rank)))
            ):
                continue
            if not self._store.check([f"bye/{rank}"]):
                return self._lost_from_store(PeerSilent, rank, "waiting for its heartbeat in the store", silent_s)
        return None

    def _beats(self) -> list[int]:
        with self._lock:
            return [self._store.add(f"beat/{rank}", 0) for rank in range(self.world)]

    def _gone(self) -> int | None:
        """The first rank whose watcher's connection to the store closed without a farewell."""
        with self._lock:
            gone = self._store.get(GONE) if self._store.check([GONE]) else b""
        return next((int(rank) for rank in gone.decode().split(",") if rank and int(rank) != self.rank), None)

    def _await_gone(self) -> int | None:
        """The same, where a connection has broken just now: the store may hear of it a little later."""
        deadline = time.monotonic() + 3 * self._period_s
        try:
            while (gone := self._gone()) is None and self._cause is None and time.monotonic() < deadline:
                time.sleep(0.05)
        except (StoreLost, TimeoutError):
            return 0
        return gone

    def _master_lost(self, error: Exception) -> str:
        self._deaf = isinstance(error.__cause__, TimeoutError)
        kind = PeerSilent if self._deaf else PeerLost
        return str(self._lost_from_store(kind, 0, "asking its store", time.monotonic() - self._answered))

    def _lost_from_store(self, kind: type[PeerLost], peer: int, operation: str, seconds: float) -> PeerLost:
        return kind(
            rank=self.rank,
            peer=peer,
            interface=self._interface or "any",
            operation=operation,
            seconds=seconds,
            detail=_trouble_with(self._interface) if kind is PeerSilent else "",
        )


def _trouble_with(name: str) -> str:
    """What is wrong with this machine's own interface, if anything."""
    try:
        if name:
            interface(name)
    except InterfaceError as error:
        return str(error)
    return ""
