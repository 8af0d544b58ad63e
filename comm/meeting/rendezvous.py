"""The only place where ranks meet: the store that rank 0 serves at `--dist-url`, and a handshake through it."""

from __future__ import annotations

import errno
import json
import logging
import socket
from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from ..errors import Mismatch, Occupied, RemoteFailure, RendezvousError
from ..lanes.lane import ThreadLane
from .interfaces import Interface, interfaces
from .liveness import Liveness
from .store import KeysMissing, StoreClient, proof
from .store_server import StoreServer
from .waiting import NowAndThen, ranks_in_words

log = logging.getLogger("farspan")


def parse_url(url: str) -> tuple[str, int]:
    """`tcp://host:port` → (host, port); port 0 is for a run of one rank. Raises `RendezvousError`."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or port is None or parts.scheme != "tcp":
        raise RendezvousError(f"--dist-url must look like tcp://host:port, with rank 0's host; got {url!r}")
    return host, port


class Rendezvous:
    """This rank's place at the meeting. Every wait ends after `timeout_s` seconds, or when a rank has failed.

    Rank 0 serves the store at one address alone: the one that `url` names, where this machine has it, else (behind a
    translating router) that of the interface `leave_by`. `secret`: what all ranks must share to be let in.
    Connections to the store leave by `leave_by` [by the route]; errors name `via`.
    `heartbeat_s`: period and patience of `Liveness`.
    """

    def __init__(
        self,
        url: str,
        rank: int,
        world: int,
        *,
        timeout_s: float,
        on_hopeless: Callable[[str], None],
        secret: bytes = b"",
        via: Interface | None = None,
        leave_by: Interface | None = None,
        heartbeat_s: tuple[float, float] = (1.0, 10.0),
    ) -> None:
        self.rank, self.world, self.timeout_s = rank, world, timeout_s
        self._met = False
        host, port = parse_url(url)
        if port == 0 and world > 1:
            raise RendezvousError(f"--dist-url {url} names no port: give one that is free on rank 0's host")
        self.where = f"{host}:{port}"
        self._secret = secret
        self._server: StoreServer | None = None
        if rank == 0:
            host = self._own_address(host, leave_by)
            self._server = self._serve(host, port, secret)
            port = self._server.port
        # Two connections, made at once, since each takes three round trips: heartbeats must not wait behind anything.
        dialling = ThreadLane("dialling")
        watching = dialling.submit(partial(StoreClient, host, port, rank, secret, timeout_s, leave_by, quiet=True))
        self.store = StoreClient(host, port, rank, secret, timeout_s, leave_by)
        self._watch = watching.get()
        dialling.close()
        twice = self.store.add(f"rank/{rank}", 1) > 1
        if twice and self.store.check(["running"]):
            raise Mismatch(f"a run at {self.where} has a rank {rank} already; this process leaves it alone")
        period_s, patience_s = heartbeat_s
        name = via.name if via is not None else ""
        self.liveness = Liveness(self._watch, rank, world, name, on_hopeless, period_s=period_s, patience_s=patience_s)
        # News of a failure ends every wait for the store, also Gloo's while it connects.
        self.store.wait_while(self._patient, min(period_s, 0.5))
        if twice:
            raise self.failed(
                Mismatch(f"two processes were started with --rank {rank}; see your hosts' launch scripts")
            )

    def _patient(self, overdue_s: float) -> bool:
        self.liveness.check()
        return overdue_s <= self.timeout_s

    def exchange(self, topic: str, value: Any, timeout_s: float | None = None) -> list[Any]:  # noqa: ANN401 - JSON
        """Publish `value` (JSON) and wait for every rank's; returns them by rank. A topic serves once.

        `timeout_s`: --wire-timeout, for what waits for a rank's disk or data [--join-timeout].
        """
        flag = "--wire-timeout" if timeout_s else "--join-timeout"
        timeout_s = timeout_s or self.timeout_s
        keys = [f"{topic}/{rank}" for rank in range(self.world)]
        waiting = NowAndThen()

        def look() -> None:
            self.liveness.check()
            if waiting.due():
                self._tell_whom_it_waits_for(topic, keys)

        try:
            texts = self.store.trade(keys[self.rank], json.dumps(value), keys, timeout_s, look)
        except KeysMissing as error:
            missing = ", ".join(str(rank) for rank, key in enumerate(keys) if key in error.keys)
            if self._met:
                raise RendezvousError(
                    f"rank {self.rank}: rank {missing} has not come to {topic!r} within {timeout_s:.0f} s; is its disk "
                    f"or its data slow? A longer {flag} waits for it"
                ) from error
            raise RendezvousError(
                f"rank {self.rank}: no sign of rank {missing} within {timeout_s:.0f} s "
                f"at {self.where} ({topic}); were all {self.world} ranks started?"
            ) from error
        return [json.loads(text) for text in texts]

    def _tell_whom_it_waits_for(self, topic: str, keys: list[str]) -> None:
        missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
        if missing and self.rank not in missing:  # else all have come, and the answer is on its way
            where = repr(topic) if self._met else f"tcp://{self.where}"
            log.info(
                "rank %d: waiting at %s for %s (%d of %d are here)",
                self.rank, where, ranks_in_words(missing), self.world - len(missing), self.world,
            )  # fmt: skip

    def agree(self, values: dict[str, str]) -> None:
        """Raises `Mismatch`, naming the flag and both values, unless every rank brings the same `values`."""
        for rank, theirs in enumerate(ranks := self.exchange("handshake", values)):
            for name in ranks[0].keys() | theirs.keys():
                ours, other = ranks[0].get(name, "(absent)"), theirs.get(name, "(absent)")
                if ours != other:
                    raise Mismatch(
                        f"{name} differs: rank 0 has {ours}, rank {rank} has {other}; give all ranks the same"
                    )
        self._met = True
        if self.rank == 0:
            self.store.set("running", "")

    def key(self, nonces: str) -> bytes:
        """What only who knows this run's secret, and `nonces` that came through the store, can make."""
        return proof(self._secret, b"session", nonces.encode())

    def failed(self, error: BaseException, say: Callable[[str], object] = lambda line: None) -> RemoteFailure:
        """Tell the others, and let rank 0's store live until they know. `say` gets the line to print at once; the
        result carries it too."""
        line = self.liveness.report(error)
        say(line)
        self.liveness.linger()
        return RemoteFailure(line)

    def close(self) -> None:
        """Leave in peace. Rank 0 goes last, since its store is everyone's."""
        if self.rank != 0:
            self.liveness.close()
            self.store.set(f"bye/{self.rank}", json.dumps(""))
        else:
            self.exchange("bye", "")
            self.liveness.close()
            if self._server is not None:
                self._server.close()
        for client in (self._watch, self.store):
            client.close()

    def _own_address(self, host: str, named: Interface | None) -> str:
        try:
            found = [info[4][0] for info in socket.getaddrinfo(host, None)]
        except (OSError, UnicodeError):
            found = []
        local = {address for each in interfaces().values() for address in each.addresses}
        own = named.addresses if named is not None else ()
        for address in sorted(found, key=lambda address: address not in own):
            if address in local:
                return str(address)
        if named is None:
            raise RendezvousError(
                f"rank 0 cannot serve the rendezvous at {self.where}: that is no address of this machine. Start rank 0 "
                "on the host that --dist-url names; behind a router, name --net-interface"
            )
        return named.addresses[0]

    def _serve(self, address: str, port: int, secret: bytes) -> StoreServer:
        try:
            return StoreServer(address, port, secret)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            raise (Occupied if taken else RendezvousError)(
                f"rank 0 cannot serve the rendezvous at {self.where}: "
                f"{'the port is in use' if taken else error.strerror}; choose another port in --dist-url"
            ) from error
