"""Which checkpoint a run goes on from, and which ones are its own. Pure functions of what all ranks found, so that all
come to the same answer.

Each manifest.json says which save it is of, and which branches led there: `modules/manifest.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...modules.manifest import MANIFEST, read_manifest
from ...modules.shards import INDEX, old_state_file, old_unit_file, state_file, unit_file
from ...modules.spec import ModelSpec
from .retention import checkpoint_steps

Branches = list[list[Any]]


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or must not be loaded."""


@dataclass(frozen=True)
class Found:
    """A checkpoint as one rank sees it. `fault`: why that rank cannot use it, or ""; `branches` is None where the
    manifest cannot be read."""

    step: int
    save: str | None = None
    branches: Branches | None = None
    fault: str = ""


@dataclass(frozen=True)
class Start:
    """Where a run starts: the step [from nothing], its branches from there on, the steps of its own checkpoints up to
    there, and a line for each newer one that does not count."""

    step: int | None
    branches: Branches
    own: frozenset[int]
    passed_over: list[str]


def folder_of(root: Path, step: int) -> Path:
    return root / f"checkpoint_{step}"


def inspect(folder: Path) -> Found:
    """What a checkpoint is: its manifest must be there, and each file with its size."""
    step = int(folder.name.removeprefix("checkpoint_"))
    try:
        manifest = read_manifest(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Found(step, fault=f"no valid {MANIFEST} ({error.__class__.__name__})")
    return Found(step, manifest.save, manifest.branches, manifest.fault(folder))


def survey(root: Path, need: range, spec: ModelSpec) -> list[Found]:
    """All checkpoints in `root`, for a rank that needs the units `need`."""
    found = []
    for step in checkpoint_steps(root):
        folder = folder_of(root, step)
        seen = inspect(folder)
        missing = [names[0] for names in needed_files(spec, need) if not any((folder / n).exists() for n in names)]
        if missing and not seen.fault:
            seen = replace(seen, fault=f"{missing[0]} is not there")
        found.append(seen)
    return found


def needed_files(spec: ModelSpec, need: range) -> list[tuple[str, str]]:
    """What a rank with the units `need` reads of a checkpoint: of each file its name, and what it was named before."""
    units = [*need, *([0] if spec.tied and spec.head_unit in need and 0 not in need else [])]
    kinds = ((unit_file, old_unit_file), (state_file, old_state_file))
    return [(new(spec, unit), old(spec, unit)) for unit in units for new, old in kinds]


def damage(folder: Path, need: range, spec: ModelSpec) -> str:
    """Which file that a rank with the units `need` will read is not as it was written, in words; "" for none."""
    names = {name for names in needed_files(spec, need) for name in names}
    return read_manifest(folder).damage(folder, names | {"config.json", INDEX, "trainer.json"})


def belongs(step: int, branches: Branches, run: Branches) -> bool:
    """Whether the checkpoint of `step`, made on `branches`, lies on the way to where a run on the branches `run` is."""
    return branches == [branch for branch in run if branch[0] < step]


def choose(ranks: Sequence[dict[str, Any]], wanted: int | None) -> Start:
    """Where the run starts. `ranks`: of each its "root", "latest" (a step, or None), "found" (`Found`'s fields), and an
    id that nobody can guess, "new".

    The newest step, not past any site's `latest`, that is whole for every rank, of one save, and this run's own; none
    where no site has a `latest`. With `wanted`, that step and no other, past `latest` or not; with 0, none.
    Raises `CheckpointError`.
    """
    found = [{row["step"]: Found(**row) for row in rank["found"]} for rank in ranks]
    steps = sorted(set().union(*found))
    faults = {step: fault for step in steps if (fault := _fault(step, found, ranks))}
    whole = {step: found[0][step].branches or [] for step in steps if step not in faults}
    marked = [rank["latest"] for rank in ranks if rank["latest"] is not None]
    step, passed_over = wanted or 0, []
    if wanted and wanted not in whole:
        raise CheckpointError(
            f"--load-step {wanted}: no such checkpoint is complete for every rank"
            f"{f' ({faults[wanted]})' if wanted in faults else ''}. "
            f"Those that are: {', '.join(map(str, whole)) or 'none'}"
        )
    if wanted is None and marked:
        # A site without `latest` crashed before its first: that any has moved it proves that all sites have renamed.
        last = min(marked)
        step = _newest(last, whole, found, faults.get(last) or _fault(last, found, ranks))
        passed_over = [
            faults.get(other, f"{ranks[0]['root']}/checkpoint_{other}: it is of a branch that this run has left")
            for other in steps
            if step < other <= last
        ]
    branches = whole.get(step, [])
    own = frozenset(other for other in whole if other <= step and belongs(other, whole[other], branches))
    if steps and steps[-1] > step:
        branches = [*branches, [step, ranks[0]["new"]]]
    return Start(step or None, branches, own, passed_over)


def _newest(last: int, whole: dict[int, Branches], found: Sequence[dict[int, Found]], fault: str) -> int:
    """The newest of the `whole` ones that leads to the checkpoint of step `last`, which may have a `fault`."""
    options = [step for step in whole if step <= last]
    if not options:
        raise CheckpointError(
            f"no checkpoint is complete for every rank ({fault}); copy the missing files there, go on with the "
            "--layer-split of before, or start over with --load-checkpoint false and another --checkpoint-path"
        )
    seen = [rank[last].branches for rank in found if last in rank]
    known = [branches for i, branches in enumerate(seen) if branches is not None and branches not in seen[:i]]
    line = known[0] if len(known) == 1 else whole[options[-1]]
    own = [step for step in options if belongs(step, whole[step], line)]
    if not own or (len(known) != 1 and own != options):
        raise CheckpointError(
            f"{fault}; those before it may be of branches that this run has left: choose one with --load-step "
            f"({', '.join(map(str, options))})"
        )
    return own[-1]


def _fault(step: int, found: Sequence[dict[int, Found]], ranks: Sequence[dict[str, Any]]) -> str:
    """Why the checkpoint of `step` does not serve all ranks, or ""."""
    for rank, seen in enumerate(found):
        if step not in seen:
            return f"rank {rank} has no {ranks[rank]['root']}/checkpoint_{step}"
        if seen[step].fault:
            return f"{ranks[rank]['root']}/checkpoint_{step} (rank {rank}): {seen[step].fault}"
        if seen[step].save != found[0][step].save:
            return f"{ranks[rank]['root']}/checkpoint_{step}: rank 0 and rank {rank} hold different saves of this step"
    return ""
