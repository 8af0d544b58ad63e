"""manifest.json: what a checkpoint consists of and whose it is. It is written last; without it, a folder is none.

    files     name → bytes, of every file at this site
    crc32     name → checksum of its bytes; those of before have none
    save      an id that no other save has: sites that crashed while they renamed hold one step of different saves
    branches  [[step, id] …], where the run began anew beside checkpoints that were there: a run that starts at a step
              beyond which any are leaves them behind, and begins a branch

Checkpoints of before there were ids have neither: that is one id, and no branch.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .json_file import Count, read_json, short

MANIFEST = "manifest.json"
FORMAT = 1
SHAPE = {"files": {str: Count}, "crc32?": {str: Count}, "save?": (None, str), "branches?": [[(Count, str)]]}
_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Manifest:
    files: dict[str, int]
    crc32: dict[str, int] = field(default_factory=dict)
    save: str | None = None
    branches: list[list[Any]] = field(default_factory=list)

    def fault(self, folder: Path) -> str:
        """The first file that is missing from `folder` or has another size, in words; "" for none."""
        for name, size in self.files.items():
            path = folder / name
            if not os.path.isfile(path):  # False also for what can be no name at all, at which pathlib raises
                return f"{short(name)} is missing"
            if path.stat().st_size != size:
                return f"{short(name)} has {path.stat().st_size} bytes and should have {size}"
        return ""

    def damage(self, folder: Path, names: Iterable[str]) -> str:
        """The first of `names` whose bytes are not those that were written, in words; "" for none. Reads them all."""
        for name in sorted(self.crc32.keys() & set(names)):
            if file_checksum(folder / name) != self.crc32[name]:
                return f"{name} is damaged: its checksum is not what {MANIFEST} says"
        return ""

    def text(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)


def read_manifest(folder: Path) -> Manifest:
    """Raises `ValueError` for one that is missing or damaged."""
    told = read_json(folder / MANIFEST, SHAPE, ValueError, "without it the folder is no checkpoint")
    return Manifest(dict(told["files"]), dict(told.get("crc32", {})), told.get("save"), told.get("branches", []))


def file_checksum(path: Path) -> int:
    """CRC-32 of a file's bytes: any flipped byte changes it."""
    found, buffer = 0, memoryview(bytearray(_AT_ONCE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            found = zlib.crc32(buffer[:count], found)
    return found
