"""A run with a secret: its ranks train as ever, whoever else knocks."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from farspan.comm.meeting import rendezvous
from launch import Run, read_metrics

Flags = Callable[..., dict[str, Any]]


def test_intruders_do_not_disturb_a_run(flags: Flags, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("among ourselves\n")
    with Run(2, 1, flags(total_steps=300, secret_file=tmp_path / "secret")) as run:
        done = threading.Event()
        refused = []

        def intrude() -> None:
            while not done.wait(0.01):
                try:
                    with socket.create_connection(("127.0.0.1", run.port), timeout=2) as stranger:
                        stranger.sendall(b"let me in, let me in, let me in, let me in, let me in, let me in")
                        while stranger.recv(100):
                            pass
                        refused.append(True)
                except OSError:
                    continue

        threads = [threading.Thread(target=intrude, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        run.succeed()
        done.set()
    assert len(refused) > 10
    assert "refused 127.0.0.1:" in run.err(0)
    assert read_metrics(tmp_path / "ck")[-1]["step"] == 300


def test_a_rank_with_another_secret_is_named_and_the_others_say_who_is_missing(flags: Flags, tmp_path: Path) -> None:
    for name in ("secret", "other"):
        (tmp_path / name).write_text(name)
    told = flags(secret_file=tmp_path / "secret", join_timeout=4)
    with Run(2, 1, told, by_rank={1: {"secret_file": tmp_path / "other"}}) as run:
        ended = run.wait(40)
    assert all(end.code == 1 for end in ended.values())
    assert "--secret-file" in ended[1].err
    assert "does not know the secret" in ended[0].err
    assert "no sign of rank 1" in ended[0].err


def other_key() -> None:
    """This rank's connections are not what its rank's should be."""
    rendezvous.Rendezvous.key = lambda self, nonces: b"guessed"  # type: ignore[method-assign]


def test_who_is_in_a_ranks_place_on_the_wire_is_found_out(flags: Flags) -> None:
    with Run(2, 1, flags(), faults={1: other_key}) as run:
        ended = run.wait(40)
    for end in ended.values():
        assert end.code == 1
        assert re.search(r"what came over lo in group .* was not sent by rank [01]: another process", end.err)


def test_a_secret_that_cannot_be_read(flags: Flags, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    for name, words in (("none", "No such file"), ("empty", "is empty")):
        with Run(1, 1, flags(secret_file=tmp_path / name)) as run:
            (end,) = run.wait(20).values()
        assert end.code == 1
        assert f"--secret-file {tmp_path / name}" in end.err
        assert words in end.err
