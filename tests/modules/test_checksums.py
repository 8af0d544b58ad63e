"""SHA256SUMS: written by conversions, understood by sha256sum."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from farspan.converters.hf import import_hf
from farspan.modules.checksums import SUMS, read_sums, sha256, write_sums
from farspan.modules.shards import ShardError
from tiny import make_model


def test_sums_are_those_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"farspan")
    (tmp_path / "b c.bin").write_bytes(b"")
    write_sums(tmp_path)
    write_sums(tmp_path)  # does not sum itself
    assert read_sums(tmp_path) == {name: sha256(tmp_path / name) for name in ("a.bin", "b c.bin")}
    subprocess.run(["sha256sum", "-c", "--strict", SUMS], cwd=tmp_path, check=True, capture_output=True)


def test_a_folder_without_sums_has_none(tmp_path: Path) -> None:
    assert read_sums(tmp_path) == {}


def test_a_broken_list_is_named(tmp_path: Path) -> None:
    (tmp_path / SUMS).write_text(f"{'0' * 64}  a.bin\nnonsense\n")
    with pytest.raises(ShardError, match=f"{SUMS}:2: not a line of sha256sum"):
        read_sums(tmp_path)


def test_a_conversion_leaves_the_sums_of_all_its_files(tmp_path: Path) -> None:
    shards = import_hf("gptneox", str(make_model(tmp_path / "hf")), tmp_path / "shards")
    sums = read_sums(shards)
    assert sums.keys() == {path.name for path in shards.iterdir()} - {SUMS}
    assert sums["model-00003-of-00007.safetensors"] == sha256(shards / "model-00003-of-00007.safetensors")
