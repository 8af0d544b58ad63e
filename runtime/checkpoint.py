"""Training checkpoints: a Hugging Face folder plus the optimizer's state by layer and `trainer.json`.

    checkpoint_200/  config.json  model.safetensors.index.json  embed.safetensors  block-00000.safetensors …
                     embed.optim.safetensors  block-00000.optim.safetensors …
                     trainer.json  manifest.json  and the tokenizer's files
    latest           the step of the newest complete checkpoint, in decimal digits

Ranks that share a file system form a site and write one folder together, each layer once. A site holds the layers of
its own ranks; where all ranks share one file system that is the whole model, and `from_pretrained` loads it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..comm.rendezvous import Rendezvous
from ..comm.topology import Topology
from ..modules.shards import ShardStore, copy_tokenizer, save_tensors, unit_file, write_index, write_unit
from ..modules.spec import ModelSpec
from ..modules.vocabulary import grow_rows
from .optim import MOMENTS, Optimizer

MANIFEST = "manifest.json"
FORMAT = 1

log = logging.getLogger("farspan")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or must not be loaded."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands: accumulation steps, updates and tokens done, and the data's cursor."""

    step: int = 0
    updates: int = 0
    tokens: int = 0
    data: dict[str, Any] | None = None


def folder_of(root: Path, step: int) -> Path:
    return root / f"checkpoint_{step}"


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None: its manifest must be there, and each file with its size."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"no valid {MANIFEST} ({error.__class__.__name__})"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes and should have {size}"
    return None


class Checkpoints:
    """This rank's part in writing and finding the checkpoints under `root`."""

    def __init__(self, root: Path, rendezvous: Rendezvous, topology: Topology, timeout_s: float) -> None:
        self.root, self._meeting, self._timeout_s = root, rendezvous, timeout_s
        rank = rendezvous.rank
        root.mkdir(parents=True, exist_ok=True)
        # Who sees my mark shares my file system.
        nonce = rendezvous.exchange("site nonce", os.urandom(8).hex())[0]
        mark = root / f".site-{nonce}-{rank}"
        mark.touch()
        rendezvous.exchange("site marked", "")
        self.site = [r for r in range(topology.world) if (root / f".site-{nonce}-{r}").exists()]
        rendezvous.exchange("site seen", "")
        mark.unlink()
        self.leads = rank == min(self.site)
        stage = topology.coord(rank).stage
        self.writes = rank == min(r for r in self.site if topology.coord(r).stage == stage)

    def find(self, need: range, spec: ModelSpec) -> int | None:
        """The newest step, not past `latest`, whose checkpoint is complete for every rank; None where no rank has any.

        Raises `CheckpointError` where some ranks have one and others do not, or none is whole.
        """
        latest = self.root / "latest"
        named: int | None = None
        if latest.exists():
            text = latest.read_text().strip()
            if not text.isdigit():
                raise CheckpointError(
                    f"{latest} holds {text!r} instead of a step; write the step of a good checkpoint there"
                )
            named = int(text)
        steps, faults = self._usable(named, need, spec) if named is not None else ([], [])
        answers = self._meeting.exchange("checkpoints", {"named": named, "steps": steps, "faults": faults})
        if all(answer["named"] is None for answer in answers):
            return None
        common = set.intersection(*(set(answer["steps"]) for answer in answers))
        if not common:
            without = [str(rank) for rank, answer in enumerate(answers) if not answer["steps"]]
            fault = next((f for answer in answers for f in answer["faults"]), "their --checkpoint-path has none")
            raise CheckpointError(
                f"no checkpoint is complete for every rank (rank {', '.join(without) or 'all'}: {fault}); "
                "copy the missing files there, or start over with --load-checkpoint false and another --checkpoint-path"
            )
        for fault in faults:
            log.warning("passing over %s", fault)
        return max(common)

    def _usable(self, named: int, need: range, spec: ModelSpec) -> tuple[list[int], list[str]]:
        steps, faults = [], []
        for folder in self.root.glob("checkpoint_*"):
            digits = folder.name.removeprefix("checkpoint_")
            if not digits.isdigit() or int(digits) > named:
                continue
            fault = problem(folder)
            if fault is None:
                missing = [f for u in need if not (folder / (f := unit_file(spec, u))).exists()]
                fault = f"{missing[0]} is not there" if missing else None
            if fault is None:
                steps.append(int(digits))
            else:
                faults.append(f"{folder}: {fault}")
        if named not in steps and not faults:
            faults.append(f"{folder_of(self.root, named)} is not there")
        return steps, faults

    def save(
        self, progress: Progress, spec: ModelSpec, optimizer: Optimizer, dtype: torch.dtype, tokenizer: Path
    ) -> Path:
        """Write one checkpoint, all ranks together: files, then a manifest, then a rename, then `latest`."""
        meeting, name = self._meeting, f"checkpoint_{progress.step}"
        final, temporary = self.root / name, self.root / f".{name}.tmp"
        if self.leads:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        meeting.exchange(f"{name} opened", "", self._timeout_s)
        files = _write_units(temporary, spec, optimizer) if self.writes else []
        # Only rank 0 knows the data's cursor, and every site's folder needs it.
        mine = {"files": files, "progress": asdict(progress), "tied": _tied_checksum(optimizer)}
        answers = meeting.exchange(f"{name} written", mine, self._timeout_s)
        if len({answer["tied"] for answer in answers} - {None}) > 1:
            raise CheckpointError(f"{final} is not written: the copies of the tied embedding are no longer the same")
        if self.leads:
            write_index(temporary, spec, dtype)
            copy_tokenizer(tokenizer, temporary)
            trainer = {"format": FORMAT, **answers[0]["progress"]}
            (temporary / "trainer.json").write_text(json.dumps(trainer, indent=1))
            present = sorted(path.name for path in temporary.iterdir())
            missing = sorted({f for r in self.site for f in answers[r]["files"]} - set(present))
            if missing:
                raise CheckpointError(f"{temporary}: {missing[0]} vanished while the checkpoint was written")
            manifest = {"format": FORMAT, "files": {f: (temporary / f).stat().st_size for f in present}}
            for file in present:
                _flush(temporary / file)
            _write_flushed(temporary / MANIFEST, json.dumps(manifest, indent=1))
            _flush(temporary)
            if final.exists():
                # Left over from a run that was taken back to an earlier step, or broken.
                os.replace(final, doomed := self.root / f".{name}.old")
                shutil.rmtree(doomed)
            os.replace(temporary, final)
            _flush(self.root)
        meeting.exchange(f"{name} complete", "", self._timeout_s)
        if self.leads:
            _write_flushed(self.root / ".latest.tmp", str(progress.step))
            os.replace(self.root / ".latest.tmp", self.root / "latest")
            _flush(self.root)
        return final

    def load(self, step: int, spec: ModelSpec, optimizer: Optimizer) -> Progress:
        """Fill the stage and its optimizer from the checkpoint of `step`, strictly. Raises `CheckpointError`."""
        folder = folder_of(self.root, step)
        trainer = json.loads((folder / "trainer.json").read_text())
        if trainer.pop("format", None) != FORMAT:
            raise CheckpointError(f"{folder}/trainer.json is not of format {FORMAT}; it was written by another version")
        progress = Progress(**trainer)
        load_weights(ShardStore(folder), optimizer)
        for index, tensor in enumerate(optimizer.tensors):
            path = folder / _optim_file(spec, tensor.owner)
            with safe_open(path, "pt") as file:
                have = set(file.keys())
                wanted = [f"{tensor.hf_name}.{moment}" for moment in MOMENTS]
                if not have.issuperset(wanted):
                    raise CheckpointError(f"{path} has no {wanted[0]}")
                state = {
                    key.rpartition(".")[2]: file.get_tensor(key)
                    for key in have
                    if key.rpartition(".")[0] == tensor.hf_name
                }
            want = tensor.parameter.shape
            for key, value in state.items():
                if value.shape != want:
                    raise CheckpointError(
                        f"{path}: {tensor.hf_name}.{key} is {list(value.shape)}, the model needs {list(want)}"
                    )
            optimizer.load_state(index, state, progress.updates)
        return progress


@torch.no_grad()
def load_weights(store: ShardStore, optimizer: Optimizer) -> None:
    """Copy a stage's weights from `store`, which checks names and shapes; rows of tokens it does not know are new."""
    unit, tensors = -1, {}
    for tensor, master in zip(optimizer.tensors, optimizer.masters, strict=True):
        if tensor.unit != unit:
            unit, tensors = tensor.unit, store.read_unit(tensor.unit)
        weight = tensors[tensor.name]
        master.copy_(weight if len(weight) == len(master) else grow_rows(weight, len(master)))
    optimizer.refresh()


def _optim_file(spec: ModelSpec, unit: int) -> str:
    return unit_file(spec, unit).replace(".safetensors", ".optim.safetensors")


def _write_units(folder: Path, spec: ModelSpec, optimizer: Optimizer) -> list[str]:
    written = []
    for unit in dict.fromkeys(t.unit for t in optimizer.tensors):
        own = [(i, t) for i, t in enumerate(optimizer.tensors) if t.unit == unit]
        write_unit(folder, spec, unit, {t.name: t.parameter for _, t in own})
        states = {
            f"{t.hf_name}.{name}": value
            for i, t in own
            if t.owner == unit
            for name, value in optimizer.state(i).items()
        }
        save_tensors(folder / _optim_file(spec, unit), states)
        written += [unit_file(spec, unit), _optim_file(spec, unit)]
    return written


def _tied_checksum(optimizer: Optimizer) -> int | None:
    """Of this stage's copy of a tied embedding. All copies must be the same bits: only the first stage's is saved."""
    for tensor, master in zip(optimizer.tensors, optimizer.masters, strict=True):
        if tensor.shared:
            return zlib.crc32(master.detach().cpu().contiguous().numpy().data)
    return None


def _write_flushed(path: Path, text: str) -> None:
    path.write_text(text)
    _flush(path)


def _flush(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
