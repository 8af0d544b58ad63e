"""What a person watches: metrics.jsonl, the progress bar, wandb. Only rank 0 has one."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .backends import open_backends
from .config import Config


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
        self._config = config
        path = config.checkpoints / "metrics.jsonl"
        kept = _cut(path, start_step)
        self._file = path.open("a")
        self._backends = open_backends(config, start_step)
        self._bar = tqdm(
            total=config.total_steps,
            initial=start_step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
            file=sys.stderr,
        )
        self._evaluated = ""
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
        if "eval_loss" in row:
            held_out = f"{row['eval_loss']:.4f} (perplexity {row['eval_perplexity']:.2f})"
            self._evaluated = f", held out {held_out}"
            self.say(f"step {row['step']}/{self._config.total_steps}  held-out loss {held_out}")
        self._bar.set_postfix_str(
            f"loss {row['loss']:.4f}, lr {row['lr']:.2e}, {row['tokens_per_s']:.0f} tokens/s{self._evaluated}",
            refresh=False,
        )
        self._bar.update(row["step"] - self._bar.n)
        every = self._config.log_steps * self._config.gradient_accumulate_step
        if every and row["step"] % every == 0:
            self.say(
                f"step {row['step']}/{self._config.total_steps}  loss {row['loss']:.4f}  lr {row['lr']:.3e}  "
                f"grad norm {row['grad_norm']:.3f}  {row['tokens_per_s']:.0f} tokens/s{_further(row)}"
            )

    def say(self, line: str) -> None:
        """A line above the progress bar."""
        tqdm.write(line, file=sys.stderr)

    def close(self, exit_code: int = 0) -> None:
        self._bar.close()
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
        except (ValueError, TypeError, KeyError):  # damaged: what follows hangs in the air
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


_TOLD = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "step_s", "eval_loss", "eval_perplexity"}


def _further(row: dict[str, Any]) -> str:
    """The rest of a row for the printed line: its plain numbers, without what is by stage or task ("…/…")."""
    numbers = {k: v for k, v in row.items() if k not in _TOLD and "/" not in k and isinstance(v, int | float)}
    return "".join(f"  {key.replace('_', ' ')} {value:.4g}" for key, value in numbers.items())
