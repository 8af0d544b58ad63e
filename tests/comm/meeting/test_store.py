"""The store's keys, its deadlines, and what strangers get: nothing."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from farspan.comm.errors import LinkTimeout, RendezvousError, StoreLost
from farspan.comm.groups.gloo import GlooGroup
from farspan.comm.meeting import store
from farspan.comm.meeting.store import (
    GET,
    GREETING,
    LARGEST,
    NONCE,
    REFUSAL,
    SET,
    KeysMissing,
    StoreClient,
    pack,
    proof,
    unpack,
)
from farspan.comm.meeting.store_server import StoreServer
from launch import free_port

SECRET = b"among ourselves"


@pytest.fixture
def server() -> Iterator[tuple[StoreServer, int]]:
    port = free_port()
    made = StoreServer("127.0.0.1", port, SECRET)
    yield made, port
    made.close()


def client(port: int, rank: int = 0, secret: bytes = SECRET, timeout_s: float = 5.0) -> StoreClient:
    return StoreClient("127.0.0.1", port, rank, secret, timeout_s)


def test_answers_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nagle's algorithm against delayed acknowledgements: 40 ms a request."""
    seen = []
    serve = StoreServer._serve

    async def watched(self: StoreServer, who: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        await serve(self, who, reader, writer)

    monkeypatch.setattr(StoreServer, "_serve", watched)
    made = StoreServer("127.0.0.1", port := free_port(), SECRET)
    mine = client(port)
    seen.append(mine._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
    mine.close()
    made.close()
    assert len(seen) == 2
    assert all(seen)


def test_keys(server: tuple[StoreServer, int]) -> None:
    a, b = client(server[1]), client(server[1], 1)
    a.set("x", "one")
    assert b.get("x") == b"one"
    assert (a.add("n", 2), b.add("n", 3), a.add("n", 0)) == (2, 5, 5)
    assert a.check(["x", "n"])
    assert not a.check(["x", "none"])
    assert a.compare_set("first", "", "a") == b"a"
    assert b.compare_set("first", "", "b") == b"a"
    large = os.urandom(3_000_000)
    a.set("large", large)
    assert b.multi_get(["large", "x"]) == [large, b"one"]


def test_waiting_ends_with_the_key_or_the_deadline(server: tuple[StoreServer, int]) -> None:
    a, b = client(server[1]), client(server[1], 1)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(a.get, "late")
        time.sleep(0.2)
        assert not waiting.done()
        b.set("late", "here")
        assert waiting.result(5) == b"here"
    with pytest.raises(TimeoutError, match="no never, nowhere"):
        a.wait(["late", "never", "nowhere"], timedelta(seconds=0.2))
    assert a.check(["late"])  # the connection is as good as before


def test_one_thread_waits_while_another_sets_over_the_same_connection(server: tuple[StoreServer, int]) -> None:
    a = client(server[1])
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(a.get, "late"), pool.submit(a.multi_get, ["later", "late"])]
        assert a.add("n", 1) == 1
        a.set("late", "here")
        assert waiting[0].result(5) == b"here"
        assert not waiting[1].done()
        a.set("later", "too")
        assert waiting[1].result(5) == [b"too", b"here"]


def test_a_key_that_was_compared_in_vain_is_not_there(server: tuple[StoreServer, int]) -> None:
    a = client(server[1])
    assert a.compare_set("x", "something", "else") == b""
    assert not a.check(["x"])


def test_a_trade_sets_and_gets(server: tuple[StoreServer, int]) -> None:
    clients = [client(server[1], rank) for rank in range(3)]
    keys = ["t/0", "t/1", "t/2"]
    with ThreadPoolExecutor(3) as pool:
        trades = [pool.submit(c.trade, keys[r], f"of {r}", keys, 5.0, lambda: None) for r, c in enumerate(clients)]
        for trade in trades:
            assert trade.result(5) == [b"of 0", b"of 1", b"of 2"]


def test_an_exchange_that_all_have_read_is_forgotten(server: tuple[StoreServer, int]) -> None:
    clients = [client(server[1], rank) for rank in range(3)]
    clients[0].set("stays", "here")

    def trades(rank: int) -> None:
        for number in range(100):
            keys = [f"checkpoint_{number}/{each}" for each in range(3)]
            got = clients[rank].trade(keys[rank], f"{number} of {rank}", keys, 20.0, lambda: None)
            assert got == [f"{number} of {each}".encode() for each in range(3)]

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(trades, range(3)))
    assert list(server[0]._values) == ["stays"]
    assert not server[0]._taken


def test_an_exchange_is_kept_for_who_has_yet_to_read_it(server: tuple[StoreServer, int]) -> None:
    early, late = client(server[1]), client(server[1], 1)
    keys = ["t/0", "t/1"]
    late.set("t/1", "of 1")
    early.trade("t/0", "of 0", keys, 5.0, lambda: None)
    assert server[0]._values.keys() == set(keys)
    assert late.trade("t/1", "of 1", keys, 5.0, lambda: None) == [b"of 0", b"of 1"]
    assert not server[0]._values


def test_a_trade_names_the_keys_that_did_not_come(server: tuple[StoreServer, int]) -> None:
    a = client(server[1])
    with pytest.raises(KeysMissing, match=r"^rank 0: no t/1, t/2 in 0 s$") as caught:
        a.trade("t/0", "", ["t/0", "t/1", "t/2"], 0.1, lambda: None)
    assert caught.value.keys == ["t/1", "t/2"]


def test_bad_news_ends_a_trade(server: tuple[StoreServer, int]) -> None:
    def check() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        client(server[1]).trade("t/0", "", ["t/1"], 60.0, check)


def test_a_store_that_does_not_answer_is_gone_at_the_deadline(server: tuple[StoreServer, int]) -> None:
    a = client(server[1], timeout_s=0.3)
    server[0]._loop.call_soon_threadsafe(time.sleep, 1)
    with pytest.raises(StoreLost, match="is gone: no answer; see rank 0"):
        a.add("n", 1)


def test_a_member_asks_the_store_twice_for_a_group_of_any_size(
    server: tuple[StoreServer, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    post = StoreClient._post

    def count(self: StoreClient, code: int, *fields: bytes) -> object:
        asked.append((self._rank, code))
        return post(self, code, *fields)

    clients = [client(server[1], rank) for rank in range(4)]
    monkeypatch.setattr(StoreClient, "_post", count)
    with ThreadPoolExecutor(4) as pool:
        made = [pool.submit(GlooGroup, c, "all", (0, 1, 2, 3), r, "lo", 20.0) for r, c in enumerate(clients)]
        for group in made:
            group.result(20).close()
    assert sorted(asked) == [(rank, code) for rank in range(4) for code in (SET, GET)]


def test_a_group_whose_member_does_not_come_is_a_timeout(server: tuple[StoreServer, int]) -> None:
    with pytest.raises(
        LinkTimeout, match=r"^rank 3: timed out waiting for rank 7 \(interface lo, connecting, after 0"
    ) as e:
        GlooGroup(client(server[1], timeout_s=0.3), "3→7", (3, 7), 3, "lo", 0.3)
    assert "3→7/0/1" in str(e.value)


def test_counting_from_many_threads_at_once(server: tuple[StoreServer, int]) -> None:
    clients = [client(server[1], rank) for rank in range(4)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: clients[i % 4].add("n", 1), range(200)))
    assert clients[0].add("n", 0) == 200


def test_a_store_that_is_gone_is_said_to_be() -> None:
    port = free_port()
    server = StoreServer("127.0.0.1", port, SECRET)
    a = client(port)
    server.close()
    with pytest.raises(StoreLost, match="is gone"):
        a.set("x", "y")


@pytest.mark.parametrize("secret", [b"", b"guessed", SECRET + b"!"])
def test_another_secret_is_refused(
    server: tuple[StoreServer, int], secret: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RendezvousError, match="another secret") as caught:
        client(server[1], secret=secret)
    assert isinstance(caught.value.__cause__, ValueError)  # at the first answer, and not at the deadline
    deadline = time.monotonic() + 5
    while "does not know the secret" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "refused 127.0.0.1:" in caplog.text
    assert client(server[1]).add("still here", 1) == 1


def test_a_server_that_does_not_know_the_secret_is_refused_too() -> None:
    """A program that took rank 0's port and speaks the protocol cannot have a rank tell it anything."""
    with socket.create_server(("127.0.0.1", 0)) as impostor:
        heard: list[bytes] = []

        def serve() -> None:
            connection, _ = impostor.accept()
            connection.sendall(GREETING + os.urandom(NONCE) + os.urandom(32))
            heard.append(connection.recv(1000))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        with pytest.raises(RendezvousError, match="another secret"):
            client(impostor.getsockname()[1])
        thread.join(5)
        assert SECRET not in heard[0]


@pytest.mark.parametrize("heard", [0, 4 + NONCE + 32])
def test_a_server_with_too_much_to_do_is_dialled_again(
    server: tuple[StoreServer, int], heard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It closes before it has proved itself, also where it has heard the proof of the client."""
    prove, busy = server[0]._prove, iter(range(2))

    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int | None:
        if next(busy, None) is None:
            return await prove(reader, writer)
        writer.write(GREETING + os.urandom(NONCE))
        await reader.readexactly(heard)
        raise ConnectionError

    monkeypatch.setattr(server[0], "_prove", late)
    assert client(server[1], timeout_s=20.0).add("n", 1) == 1
    assert next(busy, None) is None


def test_a_server_that_pauses_for_longer_than_a_proof_may_take(
    server: tuple[StoreServer, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "PROOF_S", 0.3)
    server[0]._loop.call_soon_threadsafe(time.sleep, 1)
    assert client(server[1], timeout_s=20.0).add("n", 1) == 1


def test_another_program_that_accepts_and_never_answers() -> None:
    silent = socket.create_server(("127.0.0.1", 0))
    with silent, pytest.raises(RendezvousError, match="does not answer as farspan's rank 0 does"):
        client(silent.getsockname()[1], timeout_s=0.3)


def test_another_program_that_talks_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        threading.Thread(target=lambda: other.accept()[0].sendall(b"SSH-2.0-OpenSSH_9.6\r\n"), daemon=True).start()
        with pytest.raises(RendezvousError, match="does not answer as farspan's rank 0 does") as caught:
            client(other.getsockname()[1], timeout_s=60.0)
        assert str(caught.value.__cause__) == "another greeting"


def test_nothing_follows_half_a_request(server: tuple[StoreServer, int]) -> None:
    a = client(server[1], timeout_s=1.0)
    awake = threading.Event()
    server[0]._loop.call_soon_threadsafe(awake.wait, 20)
    with pytest.raises(StoreLost, match="is gone"):
        a.set("large", os.urandom(LARGEST - 1000))
    awake.set()
    with pytest.raises(StoreLost, match="temporarily unavailable"):  # the first cause, and no wait for an answer
        a.add("n", 1)


def test_replaying_what_a_rank_once_said_does_not_help(server: tuple[StoreServer, int]) -> None:
    with socket.create_connection(("127.0.0.1", server[1])) as first:
        nonce = first.recv(len(GREETING) + NONCE)[len(GREETING) :]
        said = b"\0\0\0\1" + b"c" * NONCE
        said += proof(SECRET, b"client", nonce, b"c" * NONCE, b"\0\0\0\1")
        first.sendall(said)
        assert len(first.recv(32)) == 32
    with socket.create_connection(("127.0.0.1", server[1])) as second:
        second.recv(len(GREETING) + NONCE)
        second.sendall(said)
        assert read_to_end(second) in (REFUSAL, b"")
        assert read_to_end(second) == b""


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n" + b"x" * 100, b"\xff" * 1000, b"\0" * 52])
def test_garbage_is_refused(server: tuple[StoreServer, int], garbage: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server[1])) as stranger:
        stranger.settimeout(10)
        stranger.recv(len(GREETING) + NONCE)
        stranger.sendall(garbage)
        assert read_to_end(stranger) in (REFUSAL, b"")
        assert read_to_end(stranger) == b""
    assert client(server[1]).add("still here", 1) == 1


@pytest.mark.parametrize(
    "request_bytes",
    [
        struct.pack("!I", LARGEST + 1),
        struct.pack("!I", 0),
        pack(99, b"x"),
        struct.pack("!I", 9) + b"\0" + b"\xff" * 8,
        pack(2, b"tag", b"key", b"not a number"),
        pack(1, b"tag", b"not a number", b"key"),
        pack(0, b"tag"),
        pack(1, b"tag"),
        pack(2, b"tag"),
        pack(0),
    ],
)
def test_a_proven_rank_that_talks_nonsense_hurts_nobody(server: tuple[StoreServer, int], request_bytes: bytes) -> None:
    a = client(server[1])
    a._socket.sendall(request_bytes)
    a._socket.settimeout(5)
    assert read_to_end(a._socket) == b""
    assert client(server[1]).add("still here", 1) == 1


def read_to_end(connection: socket.socket) -> bytes:
    """What still comes before the other side closes, by FIN or RST."""
    try:
        return connection.recv(10_000)
    except ConnectionResetError:
        return b""


def test_two_hundred_half_open_connections(server: tuple[StoreServer, int]) -> None:
    idle = [socket.create_connection(("127.0.0.1", server[1])) for _ in range(200)]
    try:
        a = client(server[1])
        assert a.add("n", 1) == 1
        idle[0].settimeout(15)
        while idle[0].recv(100):  # the greeting, and then the end: nobody may sit there for ever
            pass
        assert a.add("n", 1) == 2
    finally:
        for connection in idle:
            connection.close()


def test_it_listens_on_one_address_alone(server: tuple[StoreServer, int]) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", server[1]), timeout=2)


def test_packing_round_trip() -> None:
    fields = [b"", b"x", os.urandom(1000)]
    assert unpack(pack(5, *fields)[4:]) == (5, fields)
    for cut in (6, 9, 20):
        with pytest.raises(ValueError, match="cut short"):
            unpack(pack(5, *fields)[4:-cut])
