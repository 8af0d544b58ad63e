"""Who waits says for whom, now and then."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from farspan.comm.meeting import waiting
from farspan.comm.meeting.rendezvous import Rendezvous
from farspan.comm.meeting.store import StoreClient
from farspan.comm.meeting.store_server import StoreServer
from launch import free_port


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[str], None]:
    """Waits until a line was said."""
    monkeypatch.setattr(waiting, "WAITING_S", 0.1)
    caplog.set_level(logging.INFO, "farspan")

    def wait(line: str) -> None:
        deadline = time.monotonic() + 30
        while line not in caplog.text:
            assert time.monotonic() < deadline, caplog.text
            time.sleep(0.02)

    return wait


def test_ranks_that_meet(told: Callable[[str], None]) -> None:
    url = f"tcp://127.0.0.1:{free_port()}"
    pool = ThreadPoolExecutor(4)

    def come(rank: int) -> Future[Rendezvous]:
        def meet() -> Rendezvous:
            made = Rendezvous(url, rank, 4, timeout_s=30, on_hopeless=print)
            made.agree({})
            return made

        return pool.submit(meet)

    coming = [come(0), come(2)]
    for rank in (0, 2):
        told(f"rank {rank}: waiting at {url} for ranks 1, 3 (2 of 4 are here)")
    coming.append(come(1))
    told(f"rank 1: waiting at {url} for rank 3 (3 of 4 are here)")
    coming.append(come(3))
    ranks = [future.result(30) for future in coming]
    late = ranks.pop()
    trades = [pool.submit(rank.exchange, "loaded", "") for rank in ranks]
    told("rank 2: waiting at 'loaded' for rank 3 (3 of 4 are here)")
    late.exchange("loaded", "")
    assert [trade.result(30) for trade in trades] == [[""] * 4] * 3
    for closing in [pool.submit(rank.close) for rank in [*ranks, late]]:
        closing.result(30)
    pool.shutdown()


def test_a_master_that_is_not_there_yet(told: Callable[[str], None], caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        clients = [pool.submit(StoreClient, "127.0.0.1", port, rank, b"", 30.0, quiet=rank == 2) for rank in (1, 2)]
        told(f"rank 1: waiting for the master at tcp://127.0.0.1:{port} ([Errno 111] Connection refused), ")
        server = StoreServer("127.0.0.1", port, b"")
        for client in clients:
            client.result(30).close()
    assert "rank 2" not in caplog.text
    server.close()
