"""Files that can be made again: whole and flushed before they get their names, and checked when they are opened.

    <file>        what was cached
    <file>.seal   {"bytes": …, "crc32": …}; the checksum of files up to `CHECKED` bytes alone, as it takes reading them

A power cut may leave a file empty or short, or a disk may spoil it. Then it is made anew, and a line says so.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ...modules.manifest import file_checksum

CHECKED = 1 << 30  # a second's reading

log = logging.getLogger("farspan")


def is_whole(path: Path) -> bool:
    """Whether `path` is there and as it was sealed. Says so where it is there and is not."""
    if not path.exists():
        return False
    if seal_of(path) == _kept_seal(path):
        return True
    log.info("notice: %s is damaged, or of an older version: making it anew", path)
    return False


@contextmanager
def making(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which becomes `path` with its seal if all goes well."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as out:
            yield out
        flush(partial)
        _write_seal(path, partial)
        os.replace(partial, path)
        flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def seal(path: Path) -> None:
    """Seal a file that another library has written."""
    flush(path)
    _write_seal(path, path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_seal(path: Path, content: Path) -> None:
    whole, partial = _seal_path(path), path.with_name(f"{path.name}.seal.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(seal_of(content)))
        flush(partial)
        os.replace(partial, whole)
    finally:
        partial.unlink(missing_ok=True)


def _seal_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.seal")


def _kept_seal(path: Path) -> object:
    try:
        return json.loads(_seal_path(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def seal_of(path: Path) -> dict[str, int]:
    """A file's size and, up to `CHECKED` bytes, its checksum."""
    size = path.stat().st_size
    return {"bytes": size} if size > CHECKED else {"bytes": size, "crc32": file_checksum(path)}
