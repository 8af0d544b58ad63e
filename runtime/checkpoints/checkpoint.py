"""Training checkpoints: a Hugging Face folder plus the optimizer's state by layer and `trainer.json`.

    checkpoint_200/  config.json  model.safetensors.index.json  model-00001-of-00030.safetensors …
                     optimizer/state-00001-of-00030.safetensors …
                     trainer.json  manifest.json  and the tokenizer's files
    latest           the step of the newest complete checkpoint, in decimal digits
    best             the step of the one with the lowest held-out loss, likewise

Ranks that share a file system form a site and write one folder together, each layer once. A site holds what its
own ranks need: their layers, and for a tied head the embedding too. Where all ranks share one file system that is the
whole model, and `from_pretrained` loads it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...comm.meeting.rendezvous import Rendezvous
from ...comm.topology import Topology
from ...modules.checksums import checksum
from ...modules.json_file import Count, read_json, short
from ...modules.layers import hf_names
from ...modules.manifest import FORMAT, MANIFEST, Manifest, file_checksum
from ...modules.shards import (
    ShardStore,
    copy_generation_config,
    copy_tokenizer,
    old_state_file,
    opened,
    save_tensors,
    state_file,
    unit_file,
    write_index,
    write_unit,
)
from ...modules.spec import ModelSpec
from ...modules.vocabulary import grow_rows
from ..data.cached import flush
from .lineage import CheckpointError, Start, belongs, choose, damage, folder_of, inspect, survey
from ..optim.optimizer import Optimizer
from .retention import ALL, checkpoint_steps, doomed, prune, sweep
from ..data.mixture import Cursor

log = logging.getLogger("farspan")


Complete = Callable[[int, Tensor], object]


@dataclass(frozen=True)
class Progress:
    """Where a run stands: accumulation steps, updates and tokens done, and the data's cursor.

    The best evaluation (loss, step), how many have come since that did not improve on it, and the digest of the
    held-out text; with --nepochs, the sequences of one epoch. `skipped` of the updates did not touch the weights, since
    a gradient overflowed; `scaler` is the loss scale's state. `optimizer` is its kind, and
    `global_batch` the sequences of a step (None in checkpoints of before they were kept).
    """

    step: int = 0
    updates: int = 0
    tokens: int = 0
    data: dict[str, Any] | None = None
    best_loss: float | None = None
    best_step: int | None = None
    waited: int = 0
    epoch_sequences: int | None = None
    held_out: int | None = None
    skipped: int = 0
    scaler: dict[str, Any] | None = None
    optimizer: str | None = None
    global_batch: int | None = None

    @property
    def applied(self) -> int:
        """Updates of the weights so far; the learning rate and Adam's bias correction go by these."""
        return self.updates - self.skipped


_TASK = {**dict.fromkeys(vars(Cursor()), Count), "lines": Count, "size": Count, "made?": str, "order?": Count}
_SCALER = {"scale": float, "clean": Count, "left": Count, "in_vain": Count}
_TRAINER = {
    "step?": Count, "updates?": Count, "tokens?": Count, "waited?": Count, "skipped?": Count,
    "data?": (None, {"drawn": Count, "made?": {}, "tasks": {str: _TASK}}),
    "best_loss?": (None, float), "best_step?": (None, Count), "epoch_sequences?": (None, Count),
    "held_out?": (None, Count), "scaler?": (None, _SCALER), "optimizer?": (None, str), "global_batch?": (None, Count),
}  # fmt: skip


def read_progress(folder: Path) -> Progress:
    """What a checkpoint's trainer.json says. Raises `CheckpointError`."""
    path, advice = folder / "trainer.json", "--load-step names another checkpoint"
    trainer = read_json(path, {"format?": (Count, str)}, CheckpointError, advice)
    if trainer.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path} is not of format {FORMAT}; it was written by another version")
    read_json(path, _TRAINER, CheckpointError, advice)
    if unknown := sorted(trainer.keys() - vars(Progress()).keys()):
        raise CheckpointError(f"{path} is damaged: it has {short(repr(unknown[0]))}, which no version writes; {advice}")
    return Progress(**trainer)


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    return inspect(folder).fault or None


class Checkpoints:
    """This rank's part in writing and finding the checkpoints under `root`."""

    def __init__(
        self, root: Path, rendezvous: Rendezvous, topology: Topology, timeout_s: float, keep: int = ALL
    ) -> None:
        self._keep = keep
        self._start = Start(None, [], frozenset(), [])
        self.root, self._meeting, self._timeout_s = root, rendezvous, timeout_s
        self._topology = topology
        self._places: list[str] = []
        rank = rendezvous.rank
        root.mkdir(parents=True, exist_ok=True)
        # Who sees my mark shares my file system. Rank 0 may still be opening its data, and others reading their shards.
        nonce = rendezvous.exchange("site nonce", os.urandom(8).hex(), timeout_s)[0]
        mark = root / f".site-{nonce}-{rank}"
        mark.touch()
        rendezvous.exchange("site marked", "", timeout_s)
        self.site = [r for r in range(topology.world) if (root / f".site-{nonce}-{r}").exists()]
        sites = rendezvous.exchange("site seen", self.site, timeout_s)
        mark.unlink()
        self.leads = rank == min(self.site)
        stage = topology.coord(rank).stage
        self.writes = rank == min(r for r in self.site if topology.coord(r).stage == stage)
        # A site of the last stage without the first needs the embedding that a tied head shares.
        present = [{topology.coord(r).stage for r in site} for site in sites]
        last = topology.stages - 1
        self._lends = any(last in stages and 0 not in stages for stages in present)
        self._keeps_embedding = self.writes and last in present[rank] and 0 not in present[rank]

    def find(self, need: range, spec: ModelSpec, wanted: int | None = None) -> int | None:
        """The step to go on from, the same on every rank (`choose` says which); None: from nothing.

        Each rank reads the files that it will load, all at the same time; where one is damaged, all choose again.
        All ranks look together, also with `wanted` 0: what is there and left behind is not this run's own.
        Raises `CheckpointError`.
        """
        mine = {
            "root": str(self.root),
            "place": f"{os.uname().nodename}:{self.root.absolute()}",
            "latest": self._latest() if wanted is None else None,
            "found": [asdict(found) for found in survey(self.root, need, spec)],
            "new": os.urandom(8).hex(),
        }
        ranks = self._meeting.exchange("checkpoints", mine, self._timeout_s)
        self._places = [rank["place"] for rank in ranks]
        self._start = choose(ranks, wanted)
        while (step := self._start.step) is not None:
            fault = damage(folder_of(self.root, step), need, spec)
            faults = self._meeting.exchange(f"checkpoint_{step} read", fault, self._timeout_s)
            if not any(faults):
                break
            for rank, found in zip(ranks, faults, strict=True):
                next(row for row in rank["found"] if row["step"] == step)["fault"] = found
            self._start = choose(ranks, wanted)
        if self._meeting.rank == 0:
            for line in self._start.passed_over:
                log.warning("passing over %s", line)
        return self._start.step

    def elsewhere(self) -> dict[int, str]:
        """Of each stage that this site's folder lacks: its lowest rank, and `host:folder` of where that one writes."""
        stage = [self._topology.coord(rank).stage for rank in range(self._topology.world)]
        here = {stage[rank] for rank in self.site}
        lacking = sorted(set(stage) - here)
        return {rank: self._places[rank] for rank in (stage.index(s) for s in lacking)}

    def _latest(self) -> int | None:
        latest = self.root / "latest"
        if not latest.exists():
            return None
        text = latest.read_text(errors="replace").strip()
        if not (text.isascii() and text.isdigit()):
            raise CheckpointError(
                f"{latest} holds {text!r} instead of a step; write the step of a good checkpoint there"
            )
        return int(text)

    def save(
        self,
        progress: Progress,
        spec: ModelSpec,
        optimizer: Optimizer,
        dtype: torch.dtype,
        generation: Path,
        tokenizer: Path,
        complete: Complete | None = None,
    ) -> Path:
        """Write one checkpoint, all ranks together: files, then a manifest, then a rename, then `latest`.

        The folders `generation` and `tokenizer` give generation_config.json and the tokenizer's files.
        `complete` fills in the other replicas' shards of a tensor's state, where the optimizer has but one."""
        meeting, name = self._meeting, f"checkpoint_{progress.step}"
        final, temporary = self.root / name, self.root / f".{name}.tmp"
        if self.leads:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / "optimizer").mkdir(parents=True)
        save = meeting.exchange(f"{name} opened", os.urandom(8).hex(), self._timeout_s)[0]
        files = self._write_units(temporary, spec, optimizer, complete) if self.writes or complete else {}
        # Only rank 0 knows the data's cursor, and every site's folder needs it.
        mine = {"files": files, "progress": asdict(progress), "tied": _tied_checksum(optimizer)}
        answers = meeting.exchange(f"{name} written", mine, self._timeout_s)
        if len({answer["tied"] for answer in answers} - {None}) > 1:
            raise CheckpointError(f"{final} is not written: the copies of the tied embedding are no longer the same")
        if self.leads:
            write_index(temporary, spec, dtype)
            copy_tokenizer(tokenizer, temporary)
            copy_generation_config(generation, temporary)
            trainer = {"format": FORMAT, **answers[0]["progress"]}
            (temporary / "trainer.json").write_text(json.dumps(trainer, indent=1))
            present = sorted(str(path.relative_to(temporary)) for path in temporary.rglob("*") if path.is_file())
            sums = {name: crc for r in self.site for name, crc in answers[r]["files"].items()}
            missing = sorted(sums.keys() - set(present))
            if missing:
                raise CheckpointError(f"{temporary}: {missing[0]} vanished while the checkpoint was written")
            sums |= {file: file_checksum(temporary / file) for file in present if file not in sums}
            sizes = {file: (temporary / file).stat().st_size for file in present}
            manifest = Manifest(sizes, sums, save, self._start.branches)
            for file in present:
                flush(temporary / file)
            flush(temporary / "optimizer")
            _write_flushed(temporary / MANIFEST, manifest.text())
            flush(temporary)
            if final.exists():
                # Of a branch that was left, or broken. Its files go last, with the other leftovers: they may resist.
                os.replace(final, self.root / f".{name}.{save}.old")
            os.replace(temporary, final)
            flush(self.root)
        meeting.exchange(f"{name} complete", "", self._timeout_s)
        if self.leads:
            self._mark("latest", progress.step)
            self._mark("best", progress.best_step)
        meeting.exchange(f"{name} marked", "", self._timeout_s)
        if self.leads:
            # Only now does no site's `latest` name an older one any more.
            prune(self.root, doomed(self._own(), progress.step, progress.best_step, self._keep))
            sweep(self.root)
        return final

    def _write_units(
        self, folder: Path, spec: ModelSpec, optimizer: Optimizer, complete: Complete | None
    ) -> dict[str, int]:
        """Write the stage's units, one in memory at a time; where another rank does, only complete its shards.

        Returns the checksum of each file, by its name."""
        written: dict[str, int] = {}
        for owner in dict.fromkeys(t.owner for t in optimizer.tensors):
            own = [(i, t) for i, t in enumerate(optimizer.tensors) if t.owner == owner]
            lent = any(t.unit != owner for _, t in own)  # a tied head's weight: the embedding's file
            writes = self._keeps_embedding if lent else self.writes
            # All replicas complete shards together, whichever of them write.
            if not writes and (complete is None or (lent and not self._lends)):
                continue
            states = {}
            for i, t in own:
                for name, value in optimizer.state(i).items():
                    if complete is not None:
                        complete(i, value)
                    states[f"{t.hf_name}.{name}"] = value
            if not writes:
                continue
            names = {hf_name: name for name, hf_name in hf_names(spec, owner).items()}
            write_unit(folder, spec, owner, {names[t.hf_name]: t.parameter for _, t in own})
            save_tensors(folder / state_file(spec, owner), states)
            written |= {n: file_checksum(folder / n) for n in (unit_file(spec, owner), state_file(spec, owner))}
        return written

    def _own(self) -> list[int]:
        """The steps of this run's own good checkpoints at this site."""
        found = [(step, inspect(folder_of(self.root, step))) for step in checkpoint_steps(self.root)]
        return [
            step for step, seen in found if not seen.fault and belongs(step, seen.branches or [], self._start.branches)
        ]

    def _mark(self, name: str, step: int | None) -> None:
        """Let the file `name` say `step`, at one stroke; None: let there be no such file."""
        if step is None:
            (self.root / name).unlink(missing_ok=True)
        else:
            _write_flushed(self.root / f".{name}.tmp", str(step))
            os.replace(self.root / f".{name}.tmp", self.root / name)
        flush(self.root)

    def load(self, step: int, spec: ModelSpec, optimizer: Optimizer) -> Progress:
        """Fill the stage and its optimizer from the checkpoint of `step`, strictly. Raises `CheckpointError`."""
        folder = folder_of(self.root, step)
        progress = read_progress(folder)
        if progress.best_step is not None and progress.best_step not in self._start.own:
            # Deleted since, by the run that went on from here. All ranks see this alike.
            if self._meeting.rank == 0:
                log.warning("the best checkpoint, of step %d, is gone: looking for a best anew", progress.best_step)
            progress = replace(progress, best_loss=None, best_step=None, waited=0)
        load_weights(ShardStore(folder), optimizer)
        for index, tensor in enumerate(optimizer.tensors):
            path = folder / old_state_file(spec, tensor.owner)
            if not path.exists():
                path = folder / state_file(spec, tensor.owner)
            with opened(path) as file:
                have = set(file.keys())
                shapes = optimizer.state_shapes(index)
                missing = [f"{tensor.hf_name}.{name}" for name in shapes if name != "master"]
                if not have.issuperset(missing):
                    raise CheckpointError(
                        f"{path} has no {missing[0]}: it was written with another --optimizer, which a run cannot "
                        "change halfway"
                    )
                state = {
                    key.rpartition(".")[2]: file.get_tensor(key)
                    for key in have
                    if key.rpartition(".")[0] == tensor.hf_name
                }
            for key, value in state.items():
                want = shapes.get(key, tensor.parameter.shape)
                if value.shape != want:
                    raise CheckpointError(
                        f"{path}: {tensor.hf_name}.{key} is {list(value.shape)}, the model needs {list(want)}"
                    )
            optimizer.load_state(index, state, progress.applied)
        return progress

    def go_on(self, progress: Progress, taken_back: bool) -> None:
        """Mark, at this site, where the run is: `best`, and after `taken_back` by --load-step also `latest`, or a crash
        before the next save would lead back to the branch that was left. (What is passed over may be mended yet.)

        All ranks must exchange something before they train: no site may save while another has its old `latest`."""
        if self.leads:
            if taken_back:
                self._mark("latest", progress.step)
            self._mark("best", progress.best_step)


def load_weights(store: ShardStore, optimizer: Optimizer) -> None:
    """Copy a stage's weights from `store`, which checks names and shapes; rows of tokens it does not know are new."""
    unit = -1
    tensors: dict[str, Tensor] = {}
    for index, tensor in enumerate(optimizer.tensors):
        if tensor.unit != unit:
            tensors = {}  # of the unit before: never two at once
            unit, tensors = tensor.unit, store.read_unit(tensor.unit)
        weight, rows = tensors[tensor.name], len(tensor.parameter)
        optimizer.set_weight(index, weight if len(weight) == rows else grow_rows(weight, rows))


def _tied_checksum(optimizer: Optimizer) -> int | None:
    """Of this stage's copy of a tied embedding. All copies must be the same bits: a folder holds one."""
    for index, tensor in enumerate(optimizer.tensors):
        if tensor.shared:
            # Shards of the fp32 weights are cut in different places on the two stages: then the rounded ones must do.
            state = {} if optimizer.sharded else optimizer.state(index)
            return checksum(state.get("master", tensor.parameter))
    return None


def _write_flushed(path: Path, text: str) -> None:
    path.write_text(text)
    flush(path)
