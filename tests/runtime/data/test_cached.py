"""Whatever is a cache may be damaged, by a power cut or a bad disk: the run goes on, and makes it anew."""

from __future__ import annotations

import gc
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard
from farspan.runtime.data import cached
from farspan.runtime.data.open_tasks import open_source
from farspan.runtime.data.task_spec import TaskSpec

ROWS = [{"text": f"text {i}", "n": i} for i in range(300)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def flip(content: bytes) -> bytes:
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda _: b"",
    "cut short": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "flipped": flip,
    "longer": lambda content: content + b"x" * 8,
}


def make(folder: Path, kind: str) -> str:
    path = folder / f"a.{kind}"
    if kind == "jsonl":
        path.write_bytes(LINES)
    elif kind == "gz":
        path.write_bytes(gzip.compress(LINES))
    elif kind == "zst":
        path.write_bytes(zstandard.compress(LINES))
    else:
        import datasets

        table = datasets.Dataset.from_list(ROWS)
        table.to_csv(path) if kind == "csv" else table.to_parquet(path)
    return str(path)


def rows_of(path: str, cache: Path) -> list[dict[str, object]]:
    source = open_source(TaskSpec(path, text="text"), cache)
    return [json.loads(raw) if isinstance(raw, bytes) else dict(raw) for raw in source.read(np.arange(source.rows))]


@pytest.mark.parametrize("kind", ["jsonl", "gz", "zst", "parquet", "csv"])
def test_a_damaged_cache_is_made_anew(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    path, cache = make(tmp_path, kind), tmp_path / "cache"
    assert rows_of(path, cache) == ROWS
    files = [
        file for file in cache.rglob("*") if file.is_file() and file.suffix in (".npy", ".lines", ".arrow", ".seal")
    ]
    assert len(files) == {"jsonl": 2, "gz": 4, "zst": 4}.get(kind, 2)
    for file in files:
        whole = file.read_bytes()
        for name, damage in DAMAGES.items():
            gc.collect()  # what an open table has mapped may not be cut short
            file.write_bytes(damage(whole))
            caplog.clear()
            assert rows_of(path, cache) == ROWS, (file, name)
            assert "making it anew" in caplog.text, (file, name)
            assert file.stat().st_size == len(whole), (file, name)
    caplog.clear()
    assert rows_of(path, cache) == ROWS
    assert caplog.text == ""


def test_large_files_are_checked_by_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached, "CHECKED", 10)
    for name, size in (("small", 10), ("large", 11)):
        file = tmp_path / name
        with cached.making(file) as out:
            out.write(b"a" * size)
        assert cached.is_whole(file)
        file.write_bytes(b"b" * size)
        assert cached.is_whole(file) == (name == "large")
        file.write_bytes(b"a" * (size - 1))
        assert not cached.is_whole(file)


def test_a_file_is_flushed_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the folder after: else a power cut could leave the name and not what was written."""
    done: list[str] = []

    def told(name: str) -> Callable[..., None]:
        real = getattr(os, name)

        def call(*what: object) -> None:
            where = os.readlink(f"/proc/self/fd/{what[0]}") if name == "fsync" else str(what[1])
            done.append(f"{name} {Path(where).name}")
            real(*what)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, told(name))
    with cached.making(tmp_path / "a") as out:
        out.write(b"a")
    own = f"{os.getpid()}.partial"
    assert done == [
        f"fsync a.{own}", f"fsync a.seal.{own}", "replace a.seal", "replace a", f"fsync {tmp_path.name}",
    ]  # fmt: skip
    with pytest.raises(ZeroDivisionError), cached.making(tmp_path / "b") as out:
        out.write(bytes([1 // 0]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a.seal"]
