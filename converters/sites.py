"""One folder from those of several sites, which each hold the layers of their own ranks."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from ..modules.manifest import MANIFEST, Manifest, read_manifest
from ..modules.shards import INDEX, ShardStore
from .hf import ConvertError, Whole, export_hf, refuse_filled

SAME = ("config.json", INDEX, "trainer.json", ".safetensors")
"""How names end of files that all sites of one save have alike; tokenizers' may differ, and the first counts."""


def assemble(folders: Sequence[str | Path], target: Path, model_only: bool = False) -> Path:
    """Link (or copy, across file systems) what the folders hold into `target`, where all layers must be then.

    A folder is a local one or `host:path`, which rsync fetches. Checkpoints must be of one save, and what they hold as
    it was written; the result is a checkpoint too, unless `model_only` leaves the optimizer's state behind.
    Raises `ConvertError`, `ShardError`, `SpecError` or `OSError`.
    """
    refuse_filled(target, "it would be lost: move it away, or name another --save-path")
    partial = target.with_name(f".{target.name}.partial")
    with Whole(partial, target):
        fetched = partial / ".fetched"
        sites = [_local(folder, fetched / str(i), model_only) for i, folder in enumerate(folders)]
        manifests = [_manifest(folder, told, model_only) for folder, told in zip(sites, folders, strict=True)]
        _one_save(manifests, folders)
        files: dict[str, int] = {}
        sums: dict[str, int] = {}
        for folder, told, manifest in zip(sites, folders, manifests, strict=True):
            for name, size in manifest.files.items():
                if model_only and _of_training(name):
                    continue
                if name in files:
                    if name.endswith(SAME) and (size, manifest.crc32.get(name)) != (files[name], sums.get(name)):
                        raise ConvertError(f"{told} and a folder before it hold different files {name}: not one save")
                    continue
                files[name] = size
                _bring(folder / name, partial / name)
                if name in manifest.crc32:
                    sums[name] = manifest.crc32[name]
        merged = Manifest(files, sums, manifests[0].save, manifests[0].branches)
        if damage := merged.damage(partial, files):
            raise ConvertError(f"{damage}: copy it from its site again")
        store = ShardStore(partial)
        if missing := store.missing_units():
            names = ", ".join(store.spec.unit_name(unit) for unit in missing)
            raise ConvertError(f"no folder given holds {names}: name the other sites' folders too")
        if not model_only and merged.save is not None:
            (partial / MANIFEST).write_text(merged.text())
        shutil.rmtree(fetched, ignore_errors=True)
    return target


def export_sites(
    family: str, told: Sequence[str], target: Path, dtype: torch.dtype | None = None, overwrite: bool = False
) -> Path:
    """`export_hf` of one folder or of several sites' together; `overwrite` replaces `target` once all is written.

    Raises as `assemble` does."""
    folders = [checkpoint_folder(folder) for folder in told]
    if overwrite and any(target.resolve() in (f.resolve(), *f.resolve().parents) for f in folders):
        raise ConvertError(f"--overwrite: {target} holds what is to be converted")
    replaces = overwrite and target.exists()
    if not replaces:
        refuse_filled(target, "it would be lost: move it away, name another --save-path, or give --overwrite")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as made:
        source = folders[0] if len(folders) == 1 else assemble(folders, Path(made) / "all", model_only=True)
        if not replaces:
            return export_hf(family, source, target, dtype)
        fresh = export_hf(family, source, Path(made) / "exported", dtype)
        target.rename(Path(made) / "replaced")
        return fresh.rename(target)


def checkpoint_folder(told: str) -> Path:
    """The folder that is meant: `run/200` is `run/checkpoint_200`, and a run's folder its `latest`."""
    folder = Path(told)
    if not folder.is_dir() and folder.name.isdigit():
        return folder.with_name(f"checkpoint_{folder.name}")
    latest = folder / "latest"
    if latest.is_file() and not (folder / "config.json").exists():
        return folder / f"checkpoint_{latest.read_text().strip()}"
    return folder


def _local(folder: str | Path, into: Path, model_only: bool) -> Path:
    """The folder itself, or what rsync brings of `host:path`."""
    if Path(folder).is_dir():
        return Path(folder)
    host, colon, path = str(folder).partition(":")
    if not colon or "/" in host or path.startswith("//"):
        raise ConvertError(f"{folder} is no folder here: name a checkpoint's folder, or host:path")
    into.mkdir(parents=True)
    skip = ["--exclude=optimizer/", "--exclude=*.optim.safetensors"] if model_only else []
    try:
        done = subprocess.run(
            ["rsync", "-a", *skip, "--", f"{folder}/", str(into)], stderr=subprocess.PIPE, text=True, check=False
        )
    except FileNotFoundError as error:
        raise ConvertError("host:path needs rsync: install it, or copy the folder here") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[0]
        raise ConvertError(f"{folder} cannot be fetched by rsync: {reason}")
    return into


def _manifest(folder: Path, told: str | Path, model_only: bool) -> Manifest:
    """A checkpoint's; of a shard folder, what lies there."""
    if not (folder / MANIFEST).is_file():
        if (folder / "trainer.json").is_file():
            raise ConvertError(f"{told} is a checkpoint without its {MANIFEST}: it was never finished")
        return Manifest({path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()})
    try:
        manifest = read_manifest(folder)
    except (ValueError, KeyError, TypeError) as error:
        raise ConvertError(f"{told}/{MANIFEST} is damaged ({error.__class__.__name__}): copy it again") from error
    kept = {name: size for name, size in manifest.files.items() if not (model_only and _of_training(name))}
    if fault := Manifest(kept).fault(folder):
        raise ConvertError(f"{told}: {fault}: copy it again")
    return manifest


def _one_save(manifests: Sequence[Manifest], folders: Sequence[str | Path]) -> None:
    for manifest, folder in zip(manifests, folders, strict=True):
        if manifest.save != manifests[0].save:
            raise ConvertError(
                f"{folders[0]} and {folder} are not one save of one run: give the folders of the same step"
            )


def _of_training(name: str) -> bool:
    return name.startswith("optimizer/") or name.endswith(".optim.safetensors") or name == "trainer.json"


def _bring(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
