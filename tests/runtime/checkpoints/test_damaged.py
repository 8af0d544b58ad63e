"""Damaged JSON files: each is taken, or refused by an error of ours with one line that names it and is not too long."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from farspan.modules.json_file import Count, misfits
from farspan.modules.shards import ShardStore, weight_map
from farspan.modules.spec import ModelSpec
from farspan.runtime.checkpoints.checkpoint import Progress, read_progress
from farspan.runtime.checkpoints.lineage import CheckpointError, inspect
from farspan.runtime.data.sources.pretokenized import FORMAT, META, TokenFolder
from farspan.runtime.data.task_spec import read_task_config
from farspan.runtime.data.mixture import Cursor
from farspan.runtime.data.tokenizer import special_tokens
from farspan.runtime.train import EXPECTED
from tiny import make_model

CASES, LONGEST = 250, 300
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 3, 10**30, 0.5, -0.0, float("nan"), float("inf"), "", "x", "x" * 5000, "é\n\x00", "\ud800", [],
    {}, [1], ["x"], [[]], {"x": 1}, {"x" * 5000: "x" * 5000},
)  # fmt: skip
DEEP = 100_000  # brackets

Case = tuple[Path, Callable[[], object]]


def load_manifest(folder: Path) -> None:
    if fault := inspect(folder).fault:
        raise CheckpointError(fault if folder.name in fault else f"{folder}: {fault}")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Case]:
    """File → where it lies, whole, and what reads it."""
    model = make_model(tmp_path / "model", "llama")
    names = weight_map(ModelSpec.from_folder(model))
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    checkpoint = tmp_path / "checkpoint_4"
    checkpoint.mkdir()
    (checkpoint / "latest").write_text("4")
    manifest = {"format": 1, "save": "af", "branches": [[2, "b1"]], "files": {"latest": 1}}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    task = {**vars(Cursor(1, 2, 3)), "lines": 4, "size": 5, "made": "ab"}
    data = {"drawn": 8, "made": {"--seed": 1}, "tasks": {"a.jsonl": task}}
    scaler = {"scale": 2.0, "clean": 3, "left": 1, "in_vain": 0}
    progress = Progress(4, 4, 64, data, 2.5, 4, scaler=scaler, optimizer="adamw", global_batch=4)
    (checkpoint / "trainer.json").write_text(json.dumps({"format": 1, **asdict(progress)}))
    tokens = tmp_path / "a.tokens"
    tokens.mkdir()
    np.arange(6, dtype=np.uint16).tofile(tokens / "tokens.bin")
    np.save(tokens / "ends.npy", np.array([2, 6]))
    made = {"text": "text", "loss_on": "all", "--bos": False}
    meta = {"format": FORMAT, "dtype": "uint16", "documents": 2, "tokens": 6, "tokenizer": "d", "masked": False}
    (tokens / META).write_text(json.dumps({**meta, "made": made}))
    tasks = tmp_path / "tasks.json"
    template = {"path": "b", "template": "{q}\n{a}", "loss_on": "completion", "repeats": 3}
    tasks.write_text(json.dumps([{"path": "a", "weight": 0.2, "text": "story"}, template]))
    special = tmp_path / "special.json"
    special.write_text(json.dumps({"tokens": ["<a>", "<b>"]}))
    return {
        "config.json": (model / "config.json", lambda: ModelSpec.from_folder(model)),
        "index": (model / "model.safetensors.index.json", lambda: ShardStore(model)),
        "manifest.json": (checkpoint / "manifest.json", lambda: load_manifest(checkpoint)),
        "trainer.json": (checkpoint / "trainer.json", lambda: read_progress(checkpoint)),
        "meta.json": (tokens / META, lambda: TokenFolder(tokens, "d", 9)),
        "task config": (tasks, lambda: read_task_config(tasks)),
        "special tokens": (special, lambda: special_tokens(str(special))),
    }


def places(value: object) -> Iterator[tuple[Any, Any]]:
    """Each (container, key) in `value`."""
    for key, one in list(value.items() if isinstance(value, dict) else enumerate(value)):  # type: ignore[arg-type]
        yield value, key
        if isinstance(one, dict | list):
            yield from places(one)


def mutated(whole: bytes, rng: random.Random) -> bytes:
    """Another value somewhere, or a key less or more; or other bytes."""
    kind = rng.randrange(8)
    if kind < 5:
        value = copy.deepcopy(json.loads(whole))
        holder, key = rng.choice(list(places(value)))
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(["x", "", "x" * 5000, "\n"])] = holder.pop(key)
        else:
            holder[key] = rng.choice(ODD)
        return json.dumps(value if rng.random() > 0.05 else rng.choice(ODD)).encode()
    at, more = rng.randrange(len(whole)), rng.randrange(1, 9)
    if kind == 5:
        return whole[:at]
    if kind == 6:
        return whole[:at] + rng.randbytes(more) + whole[at + more :]
    return whole[:at] + rng.choice([b"[", b'{"x":']) * DEEP + whole[at:]


@pytest.mark.parametrize(
    "name", ["config.json", "index", "manifest.json", "trainer.json", "meta.json", "task config", "special tokens"]
)
def test_a_damaged_file_is_taken_or_refused_in_one_line(files: dict[str, Case], name: str, tmp_path: Path) -> None:
    path, read = files[name]
    whole, rng, refused = path.read_bytes(), random.Random(name), 0
    read()
    for number in range(CASES):
        path.write_bytes(damaged := mutated(whole, rng))
        try:
            read()
        except EXPECTED as error:
            line = str(error).replace(str(tmp_path), "")
            where = f"case {number}: {damaged[:300]!r}: {line}"
            assert len(line) <= LONGEST, where
            assert len(line.splitlines()) == 1, where
            assert path.name in line or path.parent.name in line, where
            refused += 1
        except Exception as error:
            raise AssertionError(f"case {number}: {damaged[:300]!r}") from error
    assert refused > CASES // 4


@pytest.mark.parametrize(
    ("value", "shape", "said"),
    [
        ({"a": 1, "b": None}, {"a": Count, "b?": (None, str), "c?": str}, []),
        ({"a": -1}, {"a": Count}, ["a is -1, not a number of 0 or more"]),
        ({"a": True}, {"a": Count}, ["a is true, not a number of 0 or more"]),
        ({}, {"a": Count}, ["the whole of it has no a"]),
        ({"a": [{"b": 1}, {"b": "x"}]}, {"a": [{"b": int}]}, ['a[1].b is "x"']),
        ({"a": 1, "b": 2.5}, {str: float}, []),
        ({"a": float("nan")}, {str: float}, ["a is NaN"]),
        ([1], {"a": int}, ["the whole of it is [1], not an object"]),
    ],
)
def test_shapes(value: object, shape: object, said: list[str]) -> None:
    assert list(misfits(value, shape)) == said
