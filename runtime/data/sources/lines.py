"""Files of lines, read in any order: an index of line starts, made once, cached and memory-mapped.

    <cache>/<digest of the path>-<digest of size and time>.index.npy   int64 starts (bytes) of all lines not blank
    <cache>/<digest of the path>-<digest of size and time>.lines       the content of a .gz or .zst

A file that changed has another digest, so its index is made anew; what an older state of it left is removed. Both are
sealed (`cached.py`), and made anew where they are damaged.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..cached import is_whole, making
from ..task_spec import DataError

CHUNK = 1 << 24  # bytes looked at in one go
BOM = b"\xef\xbb\xbf"
SPACE = np.frombuffer(b" \t\r\n\v\f", dtype=np.uint8)

log = logging.getLogger("farspan")


class LineFile:
    """The lines of one file that are not blank, by number from 0. `.gz` and `.zst` are decompressed into `cache` first.

    The file may be removed or appended to while it is open: what was there at the start goes on being read.
    """

    def __init__(self, path: Path, cache: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                stamp = os.fstat(file.fileno())
        except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
            raise DataError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from error
        key = _digest(str(path.resolve()))
        name = f"{key}-{_digest(f'{stamp.st_size} {stamp.st_mtime_ns} {path.suffix}')}"
        self.stamp, plain = name, path
        try:
            if path.suffix in (".gz", ".zst"):
                plain = cache / f"{name}.lines"
                if not is_whole(plain):
                    _forget(cache, key, name)
                    _decompress(path, plain)
            self._file = os.open(plain, os.O_RDONLY)
            index = cache / f"{name}.index.npy"
            if not is_whole(index):
                _forget(cache, key, name)
                _write_index(plain, index)
        except OSError as error:
            reason = error.strerror or error  # numpy's have no strerror
            raise DataError(f"{path}: {reason} ({error.filename or cache}); see --data-cache") from error
        self.starts: np.ndarray = np.load(index, mmap_mode="r")
        self.rows = len(self.starts) - 1  # the last start is the end of the file
        self.size = int(self.starts[-1])
        if not self.rows:
            raise DataError(f"{path} is empty")
        self._mapped = mmap.mmap(self._file, self.size, prot=mmap.PROT_READ)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def read(self, numbers: np.ndarray) -> list[bytes]:
        """Lines with what blank lines follow them. Raises `DataError` if the file was cut short meanwhile."""
        # Reading past the end of a mapped file would kill the process without a word.
        if os.fstat(self._file).st_size < self.size:
            raise DataError(f"{self.path} was cut short while it was read: put it back and start again")
        mapped = self._mapped
        starts, ends = self.starts[numbers].tolist(), self.starts[numbers + 1].tolist()
        return [mapped[start:end] for start, end in zip(starts, ends, strict=True)]

    def where(self, number: int) -> str:
        """`file:line`, counted from 1 with the blank lines, for an error."""
        position, end, line = 0, int(self.starts[number]), 1
        while position < end:
            chunk = os.pread(self._file, min(CHUNK, end - position), position)
            if not chunk:
                break
            line += chunk.count(b"\n")
            position += len(chunk)
        return f"{self.path}:{line}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _forget(cache: Path, key: str, name: str) -> None:
    """Remove what another state of this file left in the cache."""
    cache.mkdir(parents=True, exist_ok=True)
    for old in cache.glob(f"{key}-*"):
        if not old.name.startswith(name):
            old.unlink(missing_ok=True)


def _write_index(path: Path, index: Path) -> None:
    with path.open("rb") as file, making(index) as out:
        starts = [*_starts(file)]
        end = np.array([file.tell()], dtype=np.int64)
        np.save(out, np.concatenate([*starts, end]))


def _starts(file: BinaryIO) -> Iterator[np.ndarray]:
    """Starts of the lines that are not blank, in pieces."""
    offset = 0
    fresh = True  # the next byte begins a line
    if file.read(len(BOM)) == BOM:
        offset = len(BOM)
    file.seek(offset)
    while chunk := file.read(CHUNK):
        data = np.frombuffer(chunk, dtype=np.uint8)
        starts = np.flatnonzero(data == 10) + 1
        if fresh:
            starts = np.concatenate([[0], starts])
        fresh = chunk.endswith(b"\n")
        if fresh:
            starts = starts[:-1]
        # A line that begins with a space may be blank: the few of them are looked at one by one.
        doubtful = np.isin(data[starts], SPACE)
        if doubtful.any():
            blank = [i for i in np.flatnonzero(doubtful) if _is_blank(file, chunk, offset, int(starts[i]))]
            starts = np.delete(starts, blank)
        yield starts.astype(np.int64) + offset
        offset += len(chunk)


def _is_blank(file: BinaryIO, chunk: bytes, offset: int, start: int) -> bool:
    end = chunk.find(b"\n", start)
    if end >= 0:
        return chunk[start:end].isspace() or end == start
    here = file.tell()  # the line goes on in the next chunk
    file.seek(offset + start)
    blank = not file.readline().strip()
    file.seek(here)
    return blank


def _decompress(path: Path, plain: Path) -> None:
    """Once, whole or not at all. Raises `DataError` for a file that is cut off or broken."""
    log.info("notice: decompressing %s (%s) into --data-cache", path, _gigabytes(path.stat().st_size))
    with path.open("rb") as file, making(plain) as out:
        for piece in _gunzip(file, path) if path.suffix == ".gz" else _unzstd(file, path):
            out.write(piece)
    log.info("notice: %s takes %s in %s", path.name, _gigabytes(plain.stat().st_size), plain.parent)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(1 << 20):
        yield piece


def _gunzip(file: BinaryIO, path: Path) -> Iterator[bytes]:
    import gzip

    try:
        with gzip.GzipFile(fileobj=file) as stream:
            while piece := stream.read(1 << 20):
                yield piece
    except EOFError as error:
        raise DataError(f"{path} is cut off: its last gzip stream has no end; fetch it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is not good gzip data ({error}); fetch it again") from error


def _unzstd(file: BinaryIO, path: Path) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise DataError(f"{path}: .zst files need the package: pip install zstandard") from error
    # Not its stream_reader: that takes a cut-off file for a short one.
    frames = zstandard.ZstdDecompressor()
    frame = None
    try:
        for piece in _pieces(file):
            while piece:
                frame = frame or frames.decompressobj()
                yield frame.decompress(piece)
                piece, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        raise DataError(f"{path} is not good zstd data ({error}); fetch it again") from error
    if frame is not None:
        raise DataError(f"{path} is cut off: its last zstd frame has no end; fetch it again")
