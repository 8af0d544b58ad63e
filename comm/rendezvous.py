"""The only place where ranks meet: a TCP store that rank 0 serves at `--dist-url`, and a handshake through it."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from torch.distributed import TCPStore

from .errors import Mismatch, RemoteFailure, RendezvousError
from .liveness import Liveness

_ANSWER_S = 10.0
"""How long a store that accepts connections may take to answer."""


def parse_url(url: str) -> tuple[str, int]:
    """`tcp://host:port` → (host, port). Raises `RendezvousError`."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port or parts.scheme != "tcp":
        raise RendezvousError(f"--dist-url must look like tcp://host:port, with rank 0's host; got {url!r}")
    return host, port


class Rendezvous:
    """This rank's place at the meeting. Every wait ends after `timeout_s` seconds, or when a rank has failed."""

    def __init__(
        self, url: str, rank: int, world: int, *, timeout_s: float, on_hopeless: Callable[[str], None]
    ) -> None:
        self.rank, self.world, self.timeout_s = rank, world, timeout_s
        host, port = parse_url(url)
        self.where = f"{host}:{port}"
        self.store = self._serve(host, port) if rank == 0 else self._connect(host, port)
        twice = self.store.add(f"rank/{rank}", 1) > 1
        if twice and self.store.check(["running"]):
            raise Mismatch(f"a run at {self.where} has a rank {rank} already; this process leaves it alone")
        watch = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=_ANSWER_S))
        self.liveness = Liveness(watch, rank, world, self.where, on_hopeless)
        if twice:
            raise self.failed(Mismatch(f"two processes were started with --rank {rank}"))

    def exchange(self, topic: str, value: Any, timeout_s: float | None = None) -> list[Any]:  # noqa: ANN401 - JSON
        """Publish `value` (JSON) and wait for every rank's; returns them by rank. A topic serves once."""
        timeout_s = timeout_s or self.timeout_s
        self.store.set(f"{topic}/{self.rank}", json.dumps(value))
        keys = [f"{topic}/{rank}" for rank in range(self.world)]
        deadline = time.monotonic() + timeout_s
        while not self.store.check(keys):
            self.liveness.check()
            if time.monotonic() > deadline:
                missing = [str(rank) for rank, key in enumerate(keys) if not self.store.check([key])]
                raise RendezvousError(
                    f"rank {self.rank}: no sign of rank {', '.join(missing)} within {timeout_s:.0f} s "
                    f"at {self.where} ({topic}); were all {self.world} ranks started?"
                )
            time.sleep(0.02)
        return [json.loads(text) for text in self.store.multi_get(keys)]

    def agree(self, values: dict[str, str]) -> None:
        """Raises `Mismatch`, naming the flag and both values, unless every rank brings the same `values`."""
        for rank, theirs in enumerate(ranks := self.exchange("handshake", values)):
            for name in ranks[0].keys() | theirs.keys():
                ours, other = ranks[0].get(name, "(absent)"), theirs.get(name, "(absent)")
                if ours != other:
                    raise Mismatch(f"{name} differs: rank 0 has {ours}, rank {rank} has {other}")
        self.store.set("running", "")

    def failed(self, error: BaseException) -> RemoteFailure:
        """Tell the others, and let rank 0's store live until they know. The result carries the line to print."""
        line = self.liveness.report(error)
        self.liveness.linger(_ANSWER_S)
        return RemoteFailure(line)

    def close(self) -> None:
        """Leave in peace. Rank 0 goes last, since its store is everyone's."""
        if self.rank != 0:
            self.liveness.close()
            self.store.set(f"bye/{self.rank}", json.dumps(""))
        else:
            self.exchange("bye", "")
            self.liveness.close()

    def _serve(self, host: str, port: int) -> TCPStore:
        try:
            return TCPStore(
                host,
                port,
                is_master=True,
                timeout=timedelta(seconds=self.timeout_s),
                wait_for_workers=False,
            )
        except RuntimeError as error:
            taken = "EADDRINUSE" in str(error) or "address already in use" in str(error).lower()
            reason = "the port is in use" if taken else str(error).splitlines()[0]
            raise RendezvousError(
                f"rank 0 cannot serve the rendezvous at {self.where}: {reason}; choose another port in --dist-url"
            ) from error

    def _connect(self, host: str, port: int) -> TCPStore:
        deadline = time.monotonic() + self.timeout_s
        while True:
            try:
                # Only a connection that is made shows whether it is worth waiting for an answer.
                socket.create_connection((host, port), timeout=min(self.timeout_s, 5.0)).close()
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise RendezvousError(
                        f"rank {self.rank} cannot reach the master at {self.where} within {self.timeout_s:.0f} s "
                        f"({error}); is rank 0 running there, and the port open?"
                    ) from error
            time.sleep(0.2)
        # The constructor waits for an answer without a deadline: it gets a thread that can be left behind.
        pool = ThreadPoolExecutor(1)
        joining = pool.submit(TCPStore, host, port, is_master=False, timeout=timedelta(seconds=self.timeout_s))
        pool.shutdown(wait=False)
        try:
            return joining.result(timeout=_ANSWER_S)
        except (RuntimeError, TimeoutError) as error:
            raise RendezvousError(
                f"rank {self.rank}: whoever listens at {self.where} does not answer as farspan's rank 0 does; "
                "choose another port in --dist-url"
            ) from error
