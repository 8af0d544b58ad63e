"""How much a task holds, for --nepochs: tokenised once, and kept in the data cache."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from .cached import is_whole, making
from .continuity import digest
from .mixture import Task

log = logging.getLogger("farspan")


@dataclass(frozen=True)
class Count:
    """Task → the tokens of one epoch; if rows are not `packed`, its rows of `length` tokens.

    What it found is kept in <cache>/<the source's stamp>-<digest of recipe, tokenizer and rows>.count.
    """

    cache: Path
    tokenizer: str  # its digest
    packed: bool
    length: int

    def __call__(self, task: Task) -> int:
        if not task.source.stamp:
            return self._count(task)
        told = [task.made, self.tokenizer, "packed" if self.packed else self.length]
        kept = self.cache / f"{task.source.stamp}-{digest(json.dumps(told))}.count"
        if is_whole(kept):
            return int(kept.read_bytes())
        count = self._count(task)
        with making(kept) as out:
            out.write(str(count).encode())
        return count

    def _count(self, task: Task) -> int:
        log.info("counting the tokens of %s, for --nepochs", task.spec.path)
        count, rows = 0, task.source.rows
        with tqdm(total=rows, unit="line", unit_scale=True, leave=False, file=sys.stderr, disable=None) as bar:
            for lengths in task.lengths():
                count += int((lengths if self.packed else -(-lengths // self.length)).sum())
                bar.update(len(lengths))
        return count
