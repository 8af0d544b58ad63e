"""A folder of tokens that is damaged is refused with one line, or gives the tokens that were written."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from farspan.runtime.data import cached
from farspan.runtime.data.recipe import Block
from farspan.runtime.data.sources.pretokenized import META, TokenFolder, TokenWriter
from farspan.runtime.data.task_spec import DataError, read_task_config

VOCAB, DOCUMENTS = 500, 40


def write(path: Path) -> Path:
    made = {"template": "{q}{a}", "loss_on": "completion", "--bos": [1]}
    writer = TokenWriter(path, VOCAB, "digest", made)
    rng = np.random.default_rng(1)
    for _ in range(4):
        ends = np.cumsum(rng.integers(1, 9, DOCUMENTS // 4))
        tokens = rng.integers(0, VOCAB, ends[-1]).astype(np.uint32)
        writer.write(Block(tokens, rng.random(len(tokens)) < 0.5, ends))
    writer.close()
    return path


def tokens_of(path: Path) -> list[list[int]]:
    block = TokenFolder(path, "digest", VOCAB).block(np.arange(DOCUMENTS))
    assert block.targets is not None
    return [block.tokens.tolist(), block.targets.tolist(), block.ends.tolist()]


def older(path: Path) -> Path:
    """As it was before there were sums."""
    meta = json.loads((path / META).read_text())
    del meta["files"], meta["crc32"]
    (path / META).write_text(json.dumps(meta))
    return path


def mutated(rng: random.Random, content: bytes) -> bytes:
    at, some = rng.randrange(len(content)), bytes(rng.randrange(256) for _ in range(rng.randint(1, 8)))
    return rng.choice([
        content[:at],
        content[:at] + some + content[at + len(some) :],
        content[:at] + some + content[at:],
        content[:at] + content[at + len(some) :],
        content[:at] + b"[" * 100_000 + content[at:],
        content[:at] + content[:at],
        bytes(len(content)),
    ])  # fmt: skip


@pytest.mark.parametrize("sums", [True, False], ids=["with sums", "of before"])
def test_a_damaged_folder_is_one_line(tmp_path: Path, sums: bool) -> None:
    whole = write(tmp_path / "whole")
    if not sums:
        older(whole)
    want, rng, refused = tokens_of(whole), random.Random(1), 0
    for file in sorted(whole.iterdir()):
        for number in range(75):
            copy = tmp_path / f"{file.name}-{number}"
            shutil.copytree(whole, copy)
            (copy / file.name).write_bytes(mutated(rng, file.read_bytes()))
            try:
                got = tokens_of(copy)
            except DataError as error:
                refused += 1
                line = str(error).replace(str(tmp_path), "")
                assert "preprocess again" in line
                assert "\n" not in line
                assert len(line) < 500
            else:
                assert got == want or not sums, copy
            shutil.rmtree(copy)
    assert refused > (280 if sums else 150)  # a changed blank in the JSON does no harm


def test_a_large_folder_is_checked_where_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading 100 GB at the start would cost minutes: sizes are compared, and an id that cannot be is found."""
    monkeypatch.setattr(cached, "CHECKED", 0)
    path = write(tmp_path / "a")
    want = tokens_of(path)
    monkeypatch.undo()
    assert tokens_of(path) == want  # a sum that was not taken is not missed
    tokens = np.memmap(path / "tokens.bin", dtype=np.uint16)
    tokens[7] = VOCAB
    tokens.flush()
    with pytest.raises(DataError, match=r"tokens\.bin is damaged"):
        tokens_of(path)


def test_brackets_without_end_in_a_task_config(tmp_path: Path) -> None:
    (tmp_path / "tasks.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"tasks\.json: its brackets are nested too deeply"):
        read_task_config(tmp_path / "tasks.json")
