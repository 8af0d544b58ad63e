"""Rank 0's end of the store: it answers those who have proved themselves, and lasts whatever strangers do."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import socket
import struct
import threading
from collections import Counter
from functools import partial

from .store import (
    ADD,
    CHECK,
    COMPARE_SET,
    DONE,
    GET,
    GONE,
    GREETING,
    LARGEST,
    NONCE,
    PROOF_S,
    REFUSAL,
    SET,
    TAKE,
    TIMEOUT,
    WAIT,
    pack,
    proof,
    unpack,
)

UNPROVEN, TURN_S = 128, 0.003
"""How many connections may be proving themselves at once. Beyond that, one is taken from the kernel's queue in each
turn, and the oldest has to go: a flood can neither use up descriptors nor lock anybody out, and takes little time."""
TOLD = 3
"""Refusals that get a line of their own in a second; of further ones there is a count."""

log = logging.getLogger("farspan")


class StoreServer:
    """Serves the keys from a thread of its own until `close`. Raises `OSError` where it cannot listen."""

    def __init__(self, address: str, port: int, secret: bytes) -> None:
        self._secret = secret
        self._values: dict[str, bytes] = {}
        self._awaited: dict[str, list[asyncio.Future[None]]] = {}
        self._taken: Counter[tuple[str, ...]] = Counter()
        self._unproven: dict[asyncio.Task[None], str] = {}  # oldest first
        self._refused = 0
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listening = socket.create_server((address, port), family=family, backlog=1024)
        self._listening.setblocking(False)
        self.port: int = self._listening.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._accepting = self._loop.create_task(self._accept())
        self._thread = threading.Thread(target=self._loop.run_forever, name="store", daemon=True)
        self._thread.start()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(PROOF_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        serving = asyncio.all_tasks() - {asyncio.current_task()}
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        self._listening.close()

    async def _accept(self) -> None:
        """asyncio's own servers accept whatever comes, at once."""
        while True:
            if len(self._unproven) >= UNPROVEN:
                await asyncio.sleep(TURN_S)
            try:
                connection, (host, port, *_) = await self._loop.sock_accept(self._listening)
                # asyncio sees to this for its own servers alone. Else an answer waits for the word that the one before
                # has arrived, which the other side puts off for 40 ms.
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                serve = partial(self._serve, f"{host}:{port}")
                reader = asyncio.StreamReader(loop=self._loop)
                await self._loop.connect_accepted_socket(
                    partial(asyncio.StreamReaderProtocol, reader, serve, self._loop), connection
                )
            except OSError as error:  # whoever knocked is gone, or no descriptor is free
                self._refuse("a connection", str(error))
                await asyncio.sleep(0.1)
            if len(self._unproven) > UNPROVEN:
                oldest = next(iter(self._unproven))
                self._refuse(self._unproven.pop(oldest), f"it proved nothing before {UNPROVEN} others came")
                oldest.cancel()

    def _refuse(self, who: str, why: str) -> None:
        self._refused += 1
        if self._refused == 1:
            self._loop.call_later(1.0, self._tell_more)
        if self._refused <= TOLD:
            log.warning("refused %s: %s", who, why)

    def _tell_more(self) -> None:
        if self._refused > TOLD:
            log.warning("refused %d more connections within a second", self._refused - TOLD)
        self._refused = 0

    async def _serve(self, who: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        waiting: set[asyncio.Task[None]] = set()
        rank, beats = None, False
        this = asyncio.current_task()
        assert this is not None
        self._unproven[this] = who
        try:
            async with asyncio.timeout(PROOF_S):
                rank = await self._prove(reader, writer)
            if rank is None:
                self._refuse(who, "it does not know the secret of this run (--secret-file)")
                return
            self._unproven.pop(this, None)
            while True:
                (size,) = struct.unpack("!I", await reader.readexactly(4))
                if not 1 <= size <= LARGEST:
                    raise ValueError(f"a request of {size} bytes")
                code, (tag, *fields) = unpack(await reader.readexactly(size))
                beats = beats or (code == ADD and fields[:1] == [f"beat/{rank}".encode()])
                if code in (GET, TAKE, WAIT):
                    timeout_s, keys = float(fields[0]), [f.decode() for f in fields[1:]]
                    task = asyncio.create_task(self._answer_later(writer, code, tag, keys, timeout_s))
                    waiting.add(task)
                    task.add_done_callback(waiting.discard)
                else:
                    writer.write(pack(DONE, tag, self._answer(code, fields)))
                    await writer.drain()
        except (TimeoutError, ValueError, IndexError) as error:
            self._refuse(who, f"it does not speak as a rank of this run does ({error or 'too slow'})")
        except (asyncio.IncompleteReadError, OSError, asyncio.CancelledError):
            log.debug("%s left", who)
        finally:
            self._unproven.pop(this, None)
            for task in waiting:
                task.cancel()
            writer.close()
            if beats and f"bye/{rank}" not in self._values:
                self._values[GONE] = b",".join(filter(None, (self._values.get(GONE), str(rank).encode())))

    async def _prove(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int | None:
        """The rank at the other end, or None where it cannot prove that it knows the secret."""
        ours = os.urandom(NONCE)
        writer.write(GREETING + ours)
        await writer.drain()
        try:
            said = await reader.readexactly(4 + NONCE + 32)
        except asyncio.IncompleteReadError as error:
            if not error.partial:
                raise  # somebody who only looked whether the port is open
            raise ValueError("cut short") from error
        rank, theirs, shown = said[:4], said[4 : 4 + NONCE], said[4 + NONCE :]
        if not hmac.compare_digest(shown, proof(self._secret, b"client", ours, theirs, rank)):
            writer.write(REFUSAL)
            return None
        writer.write(proof(self._secret, b"server", ours, theirs))
        return int.from_bytes(rank)

    def _answer(self, code: int, fields: list[bytes]) -> bytes:
        values = self._values
        if code == CHECK:
            return b"1" if all(f.decode() in values for f in fields) else b""
        if code not in (SET, ADD, COMPARE_SET):
            raise ValueError(f"request {code}")
        first, value, *rest = fields
        key = first.decode()
        if code == COMPARE_SET:
            expected, value = value, *rest
            if values.get(key, b"") != expected:
                return values.get(key, b"")
        elif code == ADD:
            value = str(int(values.get(key, b"0")) + int(value)).encode()
        values[key] = value
        for future in self._awaited.pop(key, ()):
            if not future.done():
                future.set_result(None)
        return value

    async def _answer_later(
        self, writer: asyncio.StreamWriter, code: int, tag: bytes, keys: list[str], timeout_s: float
    ) -> None:
        """Answer when all keys are there, or the time is over."""
        try:
            async with asyncio.timeout(timeout_s):
                for key in keys:
                    if key not in self._values:
                        future = self._loop.create_future()
                        living = [other for other in self._awaited.get(key, ()) if not other.done()]
                        self._awaited[key] = [*living, future]
                        await future
            answer = pack(DONE, tag, *(self._values[key] for key in keys if code != WAIT))
            if code == TAKE:
                self._forget_after_all(tuple(keys))
        except TimeoutError:
            answer = pack(TIMEOUT, tag, *(key.encode() for key in keys if key not in self._values))
        writer.write(answer)

    def _forget_after_all(self, keys: tuple[str, ...]) -> None:
        """One rank more has all of an exchange's keys: the last one clears them away."""
        self._taken[keys] += 1
        if self._taken[keys] == len(keys):
            del self._taken[keys]
            for key in keys:
                self._values.pop(key, None)
