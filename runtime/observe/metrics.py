"""Where the figures of each update go: metrics.jsonl, the terminal, wandb. Only rank 0 has one."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from ..flags.config import Config
from .backends import open_backends
from .terminal import Terminal


class Metrics:
    """One row an update: `step, loss, lr, grad_norm, tokens, tokens_per_s, step_s, tasks`, what `Usage.row` adds, and
    `eval_loss, eval_perplexity` where an evaluation followed it.

    With --fp16 also `loss_scale` (that of this update) and `skipped` (updates so far that overflowed and left the
    weights alone; their `grad_norm` is null, since JSON has no word for infinity).

    `step` counts accumulation steps, `tokens` all tokens since the run's first step. A row may have any further keys,
    and rows without a loss (of an evaluation, say) may come between: they go to the file and to every backend. Rows
    past `start_step`, left by a run that went on after its last checkpoint, are dropped first.
    """

    def __init__(self, config: Config, start_step: int) -> None:
        path = config.checkpoints / "metrics.jsonl"
        kept = _cut(path, start_step)
        self._file = path.open("a")
        self._backends = open_backends(config, start_step)
        self._terminal = Terminal(config, start_step)
        losses = [row["loss"] for row in map(json.loads, kept) if "loss" in row]
        self.first_loss: float | None = losses[0] if losses else None
        self.last_loss: float | None = losses[-1] if losses else None

    def write(self, row: dict[str, Any]) -> None:
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        for backend in self._backends:
            backend.write(row)
        if "loss" not in row:
            return
        if self.first_loss is None:
            self.first_loss = row["loss"]
        self.last_loss = row["loss"]
        self._terminal.write(row)

    def to_disk(self) -> None:
        """A checkpoint that counts these rows must not outlive them in a power cut."""
        os.fsync(self._file.fileno())

    def close(self, exit_code: int = 0) -> None:
        self._terminal.close()
        self._file.close()
        for backend in self._backends:
            backend.close(exit_code)


def _cut(path: Path, step: int) -> list[str]:
    """Drop the rows of metrics.jsonl past `step`, and a last row that a kill cut short, at one stroke; the rest."""
    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, TypeError, KeyError, RecursionError):  # damaged: what follows hangs in the air
            break
        kept.append(line)
    if kept and not kept[-1].endswith("\n"):
        kept[-1] += "\n"  # all of a row but its end
    if kept != lines:
        whole = path.with_name(f".{path.name}.tmp")
        with whole.open("w") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(whole, path)
    return kept
