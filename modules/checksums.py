"""Are two copies the same? SHA256SUMS beside weights on a disk, as for `sha256sum -c`; a CRC of those in memory."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path

import torch
from torch import Tensor

from .shards import ShardError

SUMS = "SHA256SUMS"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path) -> None:
    """Of all files that lie in `folder` now."""
    files = sorted(p for p in Path(folder).iterdir() if p.is_file() and p.name != SUMS)
    (Path(folder) / SUMS).write_text("".join(f"{sha256(p)}  {p.name}\n" for p in files), encoding="utf-8")


def read_sums(folder: Path) -> dict[str, str]:
    """File name → digest; empty where the folder has no sums. Raises `ShardError`."""
    path = Path(folder) / SUMS
    if not path.is_file():
        return {}
    sums = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        digest, separator, name = line.partition(" ")
        if not separator or len(digest) != 64:
            raise ShardError(f"{path}:{number}: not a line of sha256sum: make the file again")
        sums[name.lstrip(" *")] = digest
    return sums


def checksum(x: Tensor) -> int:
    """CRC-32 of a tensor's bits: 4 GB/s, where SHA-256 would take minutes of a large stage's start."""
    return zlib.crc32(x.detach().cpu().contiguous().view(torch.uint8).numpy().data)
