"""Tasks that were tokenised before the run, in a folder:

meta.json      {"format": 2, "dtype": "uint16", "documents": …, "tokens": …, "tokenizer": digest, "masked": …,
                "made": what decided the tokens, as of `Recipe.makes`}
tokens.bin     all tokens, one document after another, little-endian
ends.npy       int64 [documents]: where each document ends in tokens.bin
targets.bin    one byte a token, 1 where the loss counts it; only if `masked`
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from .recipe import Block
from .task_spec import DataError, TaskSpec

FORMAT = 2
META = "meta.json"


def is_pretokenized(path: Path) -> bool:
    return os.path.isfile(path / META)  # False also for what can be no path at all, which pathlib may raise at


class TokenFolder:
    """The documents of one folder, memory-mapped. `tokenizer`: the digest of the run's tokenizer, to compare."""

    stamp = ""  # its tokens are counted in a moment

    def __init__(self, path: Path, tokenizer: str) -> None:
        self.path = path
        try:
            meta: dict[str, Any] = json.loads((path / META).read_text())
            if meta["format"] != FORMAT:
                raise DataError(f"{path} is of format {meta['format']}, this version reads {FORMAT}: preprocess again")
            self.rows, self.size, masked = meta["documents"], meta["tokens"], meta["masked"]
            self._tokens = np.memmap(path / "tokens.bin", dtype=np.dtype(meta["dtype"]), mode="r")
            self._ends = np.load(path / "ends.npy", mmap_mode="r")
            self._targets = np.memmap(path / "targets.bin", dtype=bool, mode="r") if masked else None
            theirs, self._made = meta["tokenizer"], dict(meta["made"])
            self._made["loss_on"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path} is not a whole pre-tokenised task ({error}): preprocess again") from error
        sizes = {len(self._tokens), self.size} | ({len(self._targets)} if self._targets is not None else set())
        if len(sizes) > 1 or len(self._ends) != self.rows or not self.rows or self._ends[-1] != self.size:
            raise DataError(f"{path} is not a whole pre-tokenised task (its files differ in length): preprocess again")
        if theirs != tokenizer:
            raise DataError(
                f"{path} was tokenised by another tokenizer (or other --special-tokens) than this run's: "
                "preprocess again, or name that one by --tokenizer-name"
            )

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
        targets = np.concatenate([self._targets[s] for s in slices]) if self._targets is not None else None
        return Block(tokens, targets, np.cumsum(ends - starts))

    def where(self, number: int) -> str:
        return f"{self.path}, document {number + 1}"


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
        meta = {**self._meta, "dtype": self._dtype.name, "documents": self.documents, "tokens": self.tokens}
        (self.partial / META).write_text(json.dumps(meta, indent=1))
        os.replace(self.partial, self._path)

    def abandon(self) -> None:
        """Leave nothing of it."""
        for file in self._files:
            with suppress(OSError):  # what could not be written before cannot be now: it has been told
                file.close()
        shutil.rmtree(self.partial, ignore_errors=True)
