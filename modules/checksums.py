"""SHA256SUMS beside the weights: what `sha256sum -c SHA256SUMS` checks as well."""

from __future__ import annotations

import hashlib
from pathlib import Path

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
