"""Tasks that were tokenised before the run, in a folder:

meta.json      {"format": 2, "dtype": "uint16", "documents": …, "tokens": …, "tokenizer": digest, "masked": …,
                "made": what decided the tokens, as of `Recipe.makes`, "files": file → its `cached.seal_of`,
                "crc32": of all else that is in meta.json}
tokens.bin     all tokens, one document after another, little-endian
ends.npy       int64 [documents]: where each document ends in tokens.bin
targets.bin    one byte a token, 1 where the loss counts it; only if `masked`
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ....modules.json_file import Count, read_json, short
from ..cached import flush, seal_of
from ..recipe import Block
from ..task_spec import FORMS, DataError, TaskSpec, checked

FORMAT = 2
META = "meta.json"
DTYPES = ("uint16", "uint32")
SHAPE = {
    "dtype": str, "documents": Count, "tokens": Count, "tokenizer": str, "masked": bool, "made": {"loss_on": str},
    "files?": {str: {"bytes": Count, "crc32?": Count}}, "crc32?": Count,
}  # fmt: skip


def is_pretokenized(path: Path) -> bool:
    return os.path.isfile(path / META)  # False also for what can be no path at all, which pathlib may raise at


class TokenFolder:
    """The documents of one folder, memory-mapped. `tokenizer`: the digest of the run's tokenizer, to compare."""

    stamp = ""  # its tokens are counted in a moment

    def __init__(self, path: Path, tokenizer: str, vocab: int) -> None:
        """`vocab`: ids that there are. Raises `DataError` where it is damaged, or of another tokenizer."""
        self.path, self._vocab = path, vocab
        try:
            self._open()
        except DataError:
            raise
        except (OSError, ValueError) as error:
            reason = short(f"{type(error).__name__}: {error}")
            raise DataError(f"{path} is not a whole pre-tokenised task ({reason}): preprocess again") from error
        if self._tokenizer != tokenizer:
            raise DataError(
                f"{path} was tokenised by another tokenizer (or other --special-tokens) than this run's: "
                "preprocess again, or name that one by --tokenizer-name"
            )

    def _open(self) -> None:
        again = "preprocess again"
        found = read_json(self.path / META, {"format": Count}, DataError, again)["format"]
        if found != FORMAT:
            raise DataError(f"{self.path} is of format {found}, this version reads {FORMAT}: {again}")
        meta: dict[str, Any] = read_json(self.path / META, SHAPE, DataError, again)
        # Folders of before have no sums.
        if meta.pop("crc32", None) not in (None, _crc_of(meta)):
            raise self._damaged(META)
        for name, there in meta.get("files", {}).items():
            if any(there.get(key, value) != value for key, value in seal_of(self.path / name).items()):
                raise self._damaged(name)
        self.rows, self.size, self._tokenizer = meta["documents"], meta["tokens"], meta["tokenizer"]
        if meta["dtype"] not in DTYPES:
            raise ValueError(f"dtype {meta['dtype']}")
        self._tokens = np.memmap(self.path / "tokens.bin", dtype=np.dtype(meta["dtype"]), mode="r")
        self._ends = _ends_of(self.path / "ends.npy")
        self._targets = np.memmap(self.path / "targets.bin", dtype=bool, mode="r") if meta["masked"] else None
        self._made = dict(meta["made"])
        form = {key: self._made[key] for key in (*FORMS, "loss_on") if key in self._made}
        try:
            checked({"path": str(self.path), **form, "loss_on": self._made["loss_on"]}, str(self.path / META))
        except DataError as error:
            raise self._damaged(META) from error
        sizes = {len(self._tokens), self.size} | ({len(self._targets)} if self._targets is not None else set())
        if len(sizes) > 1 or self._ends.shape != (self.rows,) or not self.rows or self._ends[-1] != self.size:
            raise ValueError("its files differ in length")
        if self._ends.dtype != np.int64 or self._ends[0] < 0 or (self._ends[1:] < self._ends[:-1]).any():
            raise self._damaged("ends.npy")

    def _damaged(self, name: str) -> DataError:
        return DataError(f"{self.path / name} is damaged (it is not what was written): preprocess again")

    def says(self, spec: TaskSpec) -> TaskSpec:
        """`spec`, with this folder's form and `loss_on` where it says none itself."""
        return spec if spec.told else spec.formed(self._made)

    def check(self, wanted: dict[str, Any]) -> None:
        """`wanted`: `Recipe.makes` of the task. Raises `DataError` where these tokens were made otherwise."""
        if self._made != wanted:
            made, told = (
                ", ".join(f"{k} {json.dumps(v, ensure_ascii=False)}" for k, v in one.items() if other.get(k) != v)
                for one, other in ((self._made, wanted), (wanted, self._made))
            )
            raise DataError(
                f"{self.path} was tokenised with {made}, and this run says {told}: say the same, or preprocess again"
            )

    def block(self, numbers: np.ndarray) -> Block:
        ends = self._ends[numbers]
        starts = np.where(numbers > 0, self._ends[numbers - 1], 0)
        slices = [slice(a, b) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
        tokens = np.concatenate([self._tokens[s] for s in slices]).astype(np.uint32)
        if len(tokens) and tokens.max() >= self._vocab:
            raise self._damaged("tokens.bin")
        targets = np.concatenate([self._targets[s] for s in slices]) if self._targets is not None else None
        return Block(tokens, targets, np.cumsum(ends - starts))

    def where(self, number: int) -> str:
        return f"{self.path}, document {number + 1}"


def _ends_of(path: Path) -> np.ndarray:
    try:
        ends = np.load(path, mmap_mode="r")
    except Exception as error:  # its reader raises what it likes at a header that makes no sense
        raise ValueError(f"{path.name}: {type(error).__name__}") from error
    if not isinstance(ends, np.ndarray):
        raise ValueError(f"{path.name} is no array")
    return ends


def _crc_of(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


class TokenWriter:
    """Writes such a folder beside `path`, and gives it its name when it is whole."""

    def __init__(self, path: Path, vocab: int, tokenizer: str, made: dict[str, Any]) -> None:
        masked = made["loss_on"] == "completion"
        self._path, self.partial = path, path.with_name(f".{path.name}.partial")
        self._meta = {"format": FORMAT, "tokenizer": tokenizer, "masked": masked, "made": made}
        self._dtype = np.dtype(np.uint16 if vocab <= 1 << 16 else np.uint32)
        if path.exists():
            raise DataError(f"--output {path} is there already: remove it or choose another name")
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        self._tokens = (self.partial / "tokens.bin").open("wb")
        self._targets = (self.partial / "targets.bin").open("wb") if masked else None
        self._files = [file for file in (self._tokens, self._targets) if file is not None]
        self._ends: list[np.ndarray] = []
        self.tokens = self.documents = 0

    def write(self, block: Block) -> None:
        """Append a block's documents; those that gave no token are left out."""
        ends = block.ends[np.diff(block.ends, prepend=0) > 0]
        self._tokens.write(block.tokens.astype(self._dtype).tobytes())
        if self._targets is not None:
            assert block.targets is not None
            self._targets.write(block.targets.tobytes())
        self._ends.append(ends + self.tokens)
        self.tokens += len(block.tokens)
        self.documents += len(ends)

    def close(self) -> None:
        """Raises `DataError` where nothing was written."""
        for file in self._files:
            file.close()
        if not self.documents:
            raise DataError("no line gives any token: nothing was written")
        np.save(self.partial / "ends.npy", np.concatenate(self._ends))
        files = {file.name: seal_of(file) for file in sorted(self.partial.iterdir())}
        told = {"dtype": self._dtype.name, "documents": self.documents, "tokens": self.tokens, "files": files}
        meta = {**self._meta, **told}
        (self.partial / META).write_text(json.dumps({**meta, "crc32": _crc_of(meta)}, indent=1))
        for path in (*self.partial.iterdir(), self.partial):
            flush(path)
        os.replace(self.partial, self._path)
        flush(self._path.parent)

    def abandon(self) -> None:
        """Leave nothing of it."""
        for file in self._files:
            with suppress(OSError):  # what could not be written before cannot be now: it has been told
                file.close()
        shutil.rmtree(self.partial, ignore_errors=True)
