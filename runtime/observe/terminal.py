"""How far the run is: a bar on a terminal, and a line now and then where there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from ..flags.config import Config

MINUTE = 60.0
LEAST_BAR = 8  # columns


class Terminal:
    """Shows rows as `Metrics` has them. Each --log-steps there is a line. Without a terminal there is one for the first
    and the last update too, and, without --log-steps, one a minute."""

    def __init__(self, config: Config, start_step: int) -> None:
        self._total = config.total_steps
        self._every = config.log_steps * config.gradient_accumulate_step
        self._evaluated = ""
        self._told_at: float | None = None  # when a line told of an update last
        self._untold: dict[str, Any] | None = None
        self._bar = tqdm(
            total=self._total,
            initial=start_step,
            dynamic_ncols=True,
            mininterval=0.5,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}",
            file=sys.stderr,
            disable=not sys.stderr.isatty(),
        )

    def write(self, row: dict[str, Any]) -> None:
        """A row with a loss."""
        if "eval_loss" in row:
            loss, perplexity = row["eval_loss"], row["eval_perplexity"]
            self._evaluated = f"eval {loss:.3f}"
            self.say(f"step {row['step']}/{self._total}  held-out loss {loss:.4f} (perplexity {perplexity:.2f})")
        if self._due(row["step"]):
            self._tell(row)
        else:
            self._untold = row
        if not self._bar.disable:
            parts = (f"loss {row['loss']:.3f}", _pace(row["tokens_per_s"]), self._evaluated, f"lr {row['lr']:.1e}")
            self._bar.set_postfix_str(_fitting(parts, self._room()), refresh=False)
            self._bar.update(row["step"] - self._bar.n)

    def say(self, line: str) -> None:
        """A line above the bar."""
        tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        if self._bar.disable and self._untold is not None:  # the run was stopped
            self._tell(self._untold)
        self._bar.close()

    def _due(self, step: int) -> bool:
        if self._every and step % self._every == 0:
            return True
        if not self._bar.disable:
            return False
        if self._told_at is None or step >= self._total:
            return True
        return not self._every and time.monotonic() - self._told_at >= MINUTE

    def _tell(self, row: dict[str, Any]) -> None:
        self._told_at, self._untold = time.monotonic(), None
        self.say(
            f"step {row['step']}/{self._total}  loss {row['loss']:.4f}  lr {row['lr']:.3e}  "
            f"grad norm {row['grad_norm']:.3f}  {row['tokens_per_s']:.0f} tokens/s{_further(row)}"
        )

    def _room(self) -> int:
        """Columns that the bar and its numbers leave."""
        columns = self._bar.format_dict["ncols"] or 80
        return columns - len("100%|| 0:00:00<0:00:00") - LEAST_BAR - 2 * len(f"/{self._total}")


def _pace(rate: float) -> str:
    return f"{rate:.0f} tok/s" if rate < 10_000 else f"{rate / 1000:.0f}k tok/s"


def _fitting(parts: Sequence[str], room: int) -> str:
    """As many of the first parts as fit into `room` columns, where tqdm puts ", " before them."""
    text = ", ".join(filter(None, parts))
    return text if len(text) + 2 <= room or not parts else _fitting(parts[:-1], room)


_TOLD = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "step_s", "eval_loss", "eval_perplexity"}


def _further(row: dict[str, Any]) -> str:
    """The rest of a row for the printed line: its plain numbers, without what is by stage or task ("…/…")."""
    numbers = {k: v for k, v in row.items() if k not in _TOLD and "/" not in k and isinstance(v, int | float)}
    return "".join(f"  {key.replace('_', ' ')} {value:.4g}" for key, value in numbers.items())
