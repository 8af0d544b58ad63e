"""The keys through which ranks meet: served by rank 0, to those alone who can prove that they share its secret.

torch's TCPStore listens on all interfaces and lets anyone read and write, and it cannot be guarded from outside without
relaying every byte. What farspan needs of a store is small, so it is served here, and Gloo takes any
`torch.distributed.Store`.

A connection begins with a proof both ways (HMAC-SHA256 over fresh nonces: the secret itself never travels):

    server → client   GREETING, 16 random bytes s
    client → server   rank (4 bytes), 16 random bytes c, HMAC(secret, "client" + s + c + rank)
    server → client   HMAC(secret, "server" + s + c), or REFUSAL, and it closes

A server that closes before that has only too much to do: dial again.

Then requests and answers: length (4 bytes), a code (1 byte), fields (each with a length of 4 bytes). The first field is
a number by which the client knows the answer to its request: a request may wait for a key while others are answered.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import itertools
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from datetime import timedelta
from typing import Any

from torch.distributed import Store

from ..errors import Occupied, RendezvousError, StoreLost
from .interfaces import Interface, connect_from
from .waiting import NowAndThen

GREETING = b"farspan store 1\n"
NONCE = 16
REFUSAL = bytes(32)
"""Stands for the server's proof where the client's was wrong."""
PROOF_S = 5.0
"""How long a connection may take to prove itself."""
LARGEST = 64 * 2**20
"""Bytes of the largest request or answer."""
GONE = "gone"
"""The key under which stand the ranks, by commas, whose beating connection closed without a farewell (`bye/RANK`)."""
SET, GET, ADD, CHECK, WAIT, COMPARE_SET, DONE, TIMEOUT, TAKE = range(9)
"""TAKE is a GET of as many keys as there are ranks: when it was answered as often, the keys are forgotten."""

log = logging.getLogger("farspan")


class KeysMissing(TimeoutError):
    """Some `keys` were not set in time."""

    def __init__(self, rank: int, keys: list[str], seconds: float) -> None:
        super().__init__(f"rank {rank}: no {', '.join(keys)} in {seconds:.0f} s")
        self.keys = keys


def proof(secret: bytes, role: bytes, *parts: bytes) -> bytes:
    return hmac.new(secret, role + b"".join(parts), hashlib.sha256).digest()


def pack(code: int, *fields: bytes) -> bytes:
    body = bytes([code]) + b"".join(struct.pack("!I", len(f)) + f for f in fields)
    return struct.pack("!I", len(body)) + body


def unpack(body: bytes) -> tuple[int, list[bytes]]:
    """Raises `ValueError` for what `pack` did not make."""
    fields, at = [], 1
    while at < len(body):
        if at + 4 > len(body):
            raise ValueError("cut short")
        (size,) = struct.unpack_from("!I", body, at)
        if at + 4 + size > len(body):
            raise ValueError("cut short")
        fields.append(body[at + 4 : at + 4 + size])
        at += 4 + size
    return body[0], fields


class StoreClient(Store):
    """One rank's connection; also the `Store` that Gloo's groups meet through.

    Any number of threads may ask at once: none waits for the answer of another, so groups can be made side by side.
    It leaves by the interface `via` [by the route]. Dials until `timeout_s`, also where the other side closes or is
    late with its proof, and says so now and then unless it is `quiet`. Raises `RendezvousError` if nobody answers in
    time; at once if whoever answers is no farspan store, or one with another secret; later, `StoreLost` when the
    connection is gone and `TimeoutError` for a key that did not come.
    """

    def __init__(
        self,
        host: str,
        port: int,
        rank: int,
        secret: bytes,
        timeout_s: float,
        via: Interface | None = None,
        *,
        quiet: bool = False,
    ) -> None:
        super().__init__()
        self.where = f"{host}:{port}"
        self._rank, self._timeout_s = rank, timeout_s
        self._lock = threading.Lock()
        self._tags = itertools.count()
        self._asked: dict[bytes, futures.Future[tuple[int, list[bytes]]]] = {}
        self._gone: Exception | None = None
        self._patient: Callable[[float], bool] = lambda seconds: seconds < timeout_s
        self._look_s = 0.2
        self._socket = self._dial(host, port, via, secret, quiet)
        # Waiting for an answer has a deadline of its own, and so must the sending of a request.
        self._socket.settimeout(None)
        limit = struct.pack("@ll", max(int(timeout_s), 1), 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        threading.Thread(target=self._listen, name="store answers", daemon=True).start()

    def _dial(self, host: str, port: int, via: Interface | None, secret: bytes, quiet: bool) -> socket.socket:
        deadline, waiting = time.monotonic() + self._timeout_s, NowAndThen()
        stranger = Occupied(
            f"rank {self._rank}: {self.where} does not answer as farspan's rank 0 does, or has another secret "
            "(--secret-file); is another program, or another run, at --dist-url?"
        )
        while True:
            wait_s = min(PROOF_S, max(deadline - time.monotonic(), 0.5))
            connection = None
            try:
                connection = connect_from(host, port, via, wait_s)
                self._prove(connection, secret)
                return connection
            except UnicodeError as error:
                raise RendezvousError(f"--dist-url: {host!r} cannot be the name of a host") from error
            except ValueError as error:
                raise stranger from error
            except (OSError, EOFError) as error:
                if time.monotonic() > deadline:
                    if connection is not None:
                        raise stranger from error
                    raise RendezvousError(
                        f"rank {self._rank} cannot reach the master at {self.where} "
                        f"{f'over {via.name} ' if via else ''}within {self._timeout_s:.0f} s "
                        f"({error}); is rank 0 running there, and the port open?"
                    ) from error
                if connection is not None:
                    connection.close()
                if waiting.due() and not quiet:
                    trouble = error if connection is None else "what listens there does not answer"
                    log.info(
                        "rank %d: waiting for the master at tcp://%s (%s), %.0f s more at most",
                        self._rank, self.where, trouble, deadline - time.monotonic(),
                    )  # fmt: skip
            time.sleep(0.2)

    def _prove(self, connection: socket.socket, secret: bytes) -> None:
        """Raises `ValueError` for what cannot be rank 0 of this run, `OSError` or `EOFError` for what still can."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if _read(connection, len(GREETING)) != GREETING:
            raise ValueError("another greeting")
        theirs, ours, rank = _read(connection, NONCE), os.urandom(NONCE), self._rank.to_bytes(4)
        connection.sendall(rank + ours + proof(secret, b"client", theirs, ours, rank))
        if not hmac.compare_digest(_read(connection, 32), proof(secret, b"server", theirs, ours)):
            raise ValueError("another secret")

    def _listen(self) -> None:
        """Hand out the answers, until the connection ends."""
        try:
            while True:
                (size,) = struct.unpack("!I", _read(self._socket, 4))
                code, (tag, *values) = unpack(_read(self._socket, size))
                self._asked.pop(tag).set_result((code, values))
        except (OSError, EOFError, ValueError, KeyError) as error:
            with self._lock:
                self._gone, asked = self._gone or error, list(self._asked.values())
            for future in asked:
                future.set_exception(error)

    def _post(self, code: int, *fields: bytes) -> futures.Future[tuple[int, list[bytes]]]:
        """Send a request; its answer will come."""
        future: futures.Future[tuple[int, list[bytes]]] = futures.Future()
        with self._lock:
            if self._gone is not None:
                raise self._lost(self._gone) from self._gone
            tag = next(self._tags).to_bytes(8)
            self._asked[tag] = future
            try:
                self._socket.sendall(pack(code, tag, *fields))
            except OSError as error:
                self._gone = error  # half a request may be on its way: nothing that follows would be understood
                raise self._lost(error) from error
        return future

    def _result(
        self,
        answer: futures.Future[tuple[int, list[bytes]]],
        patience_s: float = 0.0,
        check: Callable[[], None] = lambda: None,
    ) -> list[bytes]:
        """What was answered; it may wait `patience_s` for keys."""
        looks = 0  # and not seconds: a pause of this very process is not held against the store
        try:
            while not futures.wait([answer], self._look_s).done:
                check()
                looks += 1
                if not self._patient(looks * self._look_s - patience_s):
                    raise TimeoutError("no answer")
            code, values = answer.result()
        except (OSError, EOFError, ValueError, KeyError) as error:
            raise self._lost(error) from error
        if code == TIMEOUT:
            raise KeysMissing(self._rank, [value.decode() for value in values], patience_s)
        return values

    def _lost(self, error: Exception) -> StoreLost:
        return StoreLost(
            f"rank {self._rank}: the store at {self.where} is gone: {error}; see rank 0's last line for why"
        )

    def _ask(self, code: int, *fields: bytes, patience_s: float = 0.0) -> list[bytes]:
        return self._result(self._post(code, *fields), patience_s)

    def trade(
        self, key: str, value: str, keys: Sequence[str], timeout_s: float, check: Callable[[], None]
    ) -> list[bytes]:
        """Set `key` and get all `keys`, one a rank, in one round trip from when the last is set. The store forgets them
        when every rank has them. `check` is called now and then.

        Raises `KeysMissing`, `StoreLost`, and whatever `check` does.
        """
        self._post(SET, key.encode(), value.encode())
        answer = self._post(TAKE, str(timeout_s).encode(), *_encode(keys))
        return self._result(answer, timeout_s, check)

    # The names and meanings are those of torch.distributed.Store, so that Gloo's groups can use it.

    def set(self, key: str, value: str | bytes) -> None:
        self._ask(SET, key.encode(), value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        return self.multi_get([key])[0]

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return self._ask(GET, str(self._timeout_s).encode(), *_encode(keys), patience_s=self._timeout_s)

    def add(self, key: str, amount: int) -> int:
        return int(self._ask(ADD, key.encode(), str(amount).encode())[0])

    def check(self, keys: Sequence[str]) -> bool:
        return bool(self._ask(CHECK, *_encode(keys))[0])

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        seconds = timeout.total_seconds() if timeout is not None else self._timeout_s
        self._ask(WAIT, str(seconds).encode(), *_encode(keys), patience_s=seconds)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        return self._ask(COMPARE_SET, key.encode(), expected.encode(), desired.encode())[0]

    def has_extended_api(self) -> bool:
        return True  # that is, `multi_get`: one question for all members of a group

    @property
    def peer(self) -> tuple[Any, ...]:
        """The store's address, as this connection has it."""
        address: tuple[Any, ...] = self._socket.getpeername()
        return address

    def wait_while(self, patient: Callable[[float], bool], look_s: float) -> None:
        """From now on, an answer is waited for as long as `patient(seconds it is overdue)`, asked every `look_s`, is
        true; it may raise. After either, the connection is of no use any more."""
        self._patient, self._look_s = patient, look_s

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the other side was faster
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _encode(keys: Sequence[str]) -> list[bytes]:
    return [key.encode() for key in keys]


def _read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise EOFError("closed")
        data += part
    return data
