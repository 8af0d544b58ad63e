"""Which checkpoints stay: the newest few and the best. A crash at any moment leaves no half folder that looks whole."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

log = logging.getLogger("farspan")

ALL = -1
"""--keep-checkpoints' value for every one."""


def checkpoint_steps(root: Path) -> list[int]:
    """The steps of the checkpoint folders in `root`, whole or not, in order."""
    names = (folder.name.removeprefix("checkpoint_") for folder in root.glob("checkpoint_*"))
    return sorted(int(digits) for digits in names if digits.isdigit())


def doomed(steps: list[int], newest: int, best: int | None, keep: int) -> list[int]:
    """Which of `steps`, those of good checkpoints, are to go once that of step `newest` is complete.

    Later ones are left of a run that was taken back to an earlier step, and none of this one's to judge.
    """
    if keep == ALL:
        return []
    own = [step for step in sorted(steps) if step <= newest]
    return [step for step in own[: max(0, len(own) - keep)] if step != best]


def remove(folder: Path) -> None:
    """Delete a checkpoint. It loses its name first: what a crash leaves of it is no checkpoint to anyone."""
    nameless = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(nameless, ignore_errors=True)
    os.replace(folder, nameless)
    shutil.rmtree(nameless)


def sweep(root: Path) -> None:
    """Delete what crashes have left: checkpoints half written or half deleted, the marks of ranks that were starting.
    What cannot be deleted is named and left."""
    for pattern in (".checkpoint_*.old", ".checkpoint_*.tmp", ".site-*"):
        for leftover in root.glob(pattern):
            try:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            except OSError as error:
                log.warning("cannot delete %s: %s", leftover, error.strerror)


def prune(root: Path, steps: list[int]) -> None:
    """Delete the checkpoints of `steps`. What cannot be deleted is named and left: it harms nobody but the disk."""
    for step in steps:
        folder = root / f"checkpoint_{step}"
        try:
            remove(folder)
        except OSError as error:
            log.warning("cannot delete %s: %s", folder, error.strerror)
