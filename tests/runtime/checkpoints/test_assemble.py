"""The folders of two sites become one model, which loads and resumes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from farspan.converters.command import main_assemble, main_to
from farspan.modules.manifest import file_checksum
from farspan.modules.shards import ShardStore
from launch import Run, read_metrics
from tiny import make_model
from transformers import AutoModelForCausalLM

Flags = Callable[..., dict[str, Any]]

FAKE_RSYNC = """#!/bin/bash
# rsync -a [--exclude=…] -- host:path/ target, where every host is this machine
[ "$1" = -a ] || exit 3
target="${@: -1}"; source="${@: -2:1}"
cp -r "${source#*:}." "$target"
"""


def test_two_sites_are_brought_together(
    flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = [tmp_path / f"site{rank}" for rank in range(2)]
    by_rank = {rank: {"checkpoint_path": site} for rank, site in enumerate(sites)}
    with Run(2, 1, flags(checkpoint_steps=3, checkpoint_path=tmp_path / "logs"), by_rank=by_rank) as run:
        run.succeed()
        said = run.err(0)
    assert "that folder holds embedding + layers 0–2 alone. The rest: rank 1, " in said
    assert f":{sites[1]}: layers 3–4 + head. To bring them together: python converters/assemble.py " in said
    assert f"{sites[0]}/checkpoint_6 {os.uname().nodename}:{sites[1]}/checkpoint_6 --save-path" in said
    curve = [row["loss"] for row in read_metrics(sites[0])]
    parts = [str(site / "checkpoint_3") for site in sites]

    def refused(words: list[str], says: str) -> None:
        assert main_assemble([*words, "--save-path", str(tmp_path / "bad")]) == 1
        err = capsys.readouterr().err
        assert says in err
        assert err.count("\n") == 1
        assert not list(tmp_path.glob("*bad*"))

    refused(parts[:1], "no folder given holds block-00003, block-00004, head")
    refused([parts[0], str(sites[1] / "checkpoint_6")], "are not one save of one run")
    refused([parts[0], "nowhere"], "nowhere is no folder here")

    whole = tmp_path / "new" / "checkpoint_3"
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "rsync").write_text(FAKE_RSYNC)
    (bin_folder / "rsync").chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(bin_folder), prepend=":")
        assert main_assemble([parts[0], f"far:{parts[1]}", "--save-path", str(whole)]) == 0
    assert not list(whole.glob(".*"))
    _, info = AutoModelForCausalLM.from_pretrained(whole, output_loading_info=True)
    assert not info["missing_keys"]
    with Run(1, 1, flags(checkpoint_path=tmp_path / "new", load_step=3)) as run:
        run.succeed()
    assert [row["loss"] for row in read_metrics(tmp_path / "new")] == pytest.approx(curve[3:], rel=1e-5)

    out = ["--save-path", str(tmp_path / "exported")]
    assert main_to("gptneox", ["--ckpt-path", parts[0], *out]) == 1
    assert "bring them together with converters/assemble.py" in capsys.readouterr().err
    assert main_to("gptneox", ["--ckpt-path", *(str(site / "3") for site in sites), *out]) == 0
    want, found = ShardStore(whole), ShardStore(tmp_path / "exported")
    for unit in range(want.spec.unit_count):
        for name, tensor in want.read_unit(unit).items():
            assert tensor.equal(found.read_unit(unit)[name]), name
    # Again, from the run's folder, which means its latest: refused, and then replaced.
    latest = ["--ckpt-path", *map(str, sites), *out, "--config-name", "any"]
    assert main_to("gptneox", latest) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main_to("gptneox", [*latest, "--overwrite"]) == 0
    newest = ShardStore(sites[0] / "checkpoint_6").read_unit(1)
    assert all(t.equal(ShardStore(tmp_path / "exported").read_unit(1)[name]) for name, t in newest.items())

    spoiled = tmp_path / "spoiled"
    shutil.copytree(parts[1], spoiled)
    file = spoiled / "model-00005-of-00007.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    refused([parts[0], str(spoiled)], f"{file.name} is damaged")
    told = json.loads((whole / "manifest.json").read_text())
    assert told["save"] == json.loads((sites[0] / "checkpoint_3" / "manifest.json").read_text())["save"]


@pytest.mark.parametrize(
    ("sites", "changes"),
    [("ab", {}), ("aabc", {"dp_mode": "zero1", "bf16": True})],  # the second: of two last stages, one is alone
)
def test_a_tied_model_goes_on_at_each_site(
    flags: Flags, tmp_path: Path, sites: str, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """A head that shares the embedding needs it where the embedding's own stage is at another site."""
    model = make_model(tmp_path / "tied", "llama", tie_word_embeddings=True)
    by_rank = {rank: {"checkpoint_path": tmp_path / site} for rank, site in enumerate(sites)}
    told = flags(model_name=model, checkpoint_steps=3, checkpoint_path=tmp_path / "logs", **changes)

    def train() -> tuple[list[float], dict[str, bytes]]:
        with Run(2, len(sites) // 2, told, by_rank=by_rank) as run:
            run.succeed()
        files = {str(f): f.read_bytes() for f in tmp_path.glob("?/checkpoint_6/**/*.safetensors")}
        return [row["loss"] for row in read_metrics(tmp_path / "a")], files

    whole = train()
    for site in set(sites):
        shutil.rmtree(tmp_path / site / "checkpoint_6")
        (tmp_path / site / "latest").write_text("3")
    assert train() == whole

    folders = [str(tmp_path / site / "checkpoint_6") for site in sorted(set(sites))]
    out = tmp_path / "whole"
    assert main_assemble([*folders, "--save-path", str(out)]) == 0
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    # Another embedding at the last stage's site, whose checksum is right, is another model.
    shared, manifest = "model-00001-of-00007.safetensors", Path(folders[-1], "manifest.json")
    (tmp_path / "other").write_bytes(Path(folders[-1], shared).read_bytes()[:-1] + b"?")
    os.replace(tmp_path / "other", Path(folders[-1], shared))
    written = json.loads(manifest.read_text())
    written["crc32"][shared] = file_checksum(Path(folders[-1], shared))
    manifest.write_text(json.dumps(written))
    assert main_assemble([*folders, "--save-path", str(tmp_path / "bad")]) == 1
    assert f"hold different files {shared}" in capsys.readouterr().err
