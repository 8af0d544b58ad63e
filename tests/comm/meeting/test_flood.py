"""Far more strangers at the store's port than this process may have descriptors."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from farspan.comm.meeting.store import StoreClient
from farspan.comm.meeting.store_server import TOLD, UNPROVEN, StoreServer
from launch import free_port
from peers import Peer, play

CONNECTS, DESCRIPTORS = 2000, 1024


class Lines(logging.Handler):
    """Everything that is logged in this process."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        logging.getLogger().addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name} {record.getMessage()}")


def flooded(me: Peer) -> Any:  # noqa: ANN401 - what rank 0 saw
    """Rank 1 opens connections, says nothing and keeps them; rank 0's store has a client, and then one more."""
    if me.rank == 1:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, CONNECTS + 200), most))
        port = int(me.store.get("port"))
        with contextlib.ExitStack() as held:
            for _ in range(CONNECTS):
                stranger = held.enter_context(socket.socket())
                stranger.setblocking(False)
                stranger.connect_ex(("127.0.0.1", port))
            me.say("flooded")
            me.hear("done")
        return None
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    logged, port = Lines(), free_port()
    server = StoreServer("127.0.0.1", port, b"among ourselves")
    running = StoreClient("127.0.0.1", port, 0, b"among ourselves", 20.0)
    start = time.monotonic()
    me.store.set("port", str(port))
    me.hear("flooded")
    answers = [running.add("n", 1) for _ in range(500)]
    late = StoreClient("127.0.0.1", port, 1, b"among ourselves", 60.0)
    answers += [late.add("n", 1)]
    descriptors = len(os.listdir("/proc/self/fd"))
    seconds = time.monotonic() - start
    me.say("done")
    late.close()
    running.close()
    server.close()
    return {"answers": answers, "descriptors": descriptors, "lines": logged.lines, "seconds": seconds}


@pytest.mark.skipif(
    resource.getrlimit(resource.RLIMIT_NOFILE)[1] < CONNECTS + 200, reason="the intruder needs more descriptors"
)
def test_a_flood_neither_disturbs_a_rank_nor_keeps_one_out(tmp_path: Path) -> None:
    seen = play(flooded, (0, 1), tmp_path)[0]
    assert seen["answers"] == list(range(1, 502))
    assert seen["descriptors"] < 3 * UNPROVEN
    assert all(line.startswith("farspan ") for line in seen["lines"]), seen["lines"][-3:]
    refusals = [line for line in seen["lines"] if "refused" in line]
    assert any("proved nothing" in line for line in refusals)
    assert len(refusals) <= (TOLD + 1) * (seen["seconds"] + 1)
