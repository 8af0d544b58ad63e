"""What a person watches: metrics.jsonl, the progress bar, wandb. Only rank 0 has one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .config import Config, ConfigError


class Metrics:
    """One row an update: `step, loss, lr, grad_norm, tokens, tokens_per_s, step_s, tasks`.

    `step` counts accumulation steps, `tokens` all tokens since the run's first step. Rows past `start_step`, left by a
    run that went on after its last checkpoint, are dropped first.
    """

    def __init__(self, config: Config, start_step: int) -> None:
        self._config = config
        path = config.checkpoints / "metrics.jsonl"
        kept = _rows_until(path, start_step)
        path.write_text("".join(kept))
        self._file = path.open("a")
        self._wandb = _start_wandb(config) if config.train_log_backend == "wandb" else None
        self._bar = tqdm(
            total=config.total_steps,
            initial=start_step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
            file=sys.stderr,
        )
        self.first_loss: float | None = json.loads(kept[0])["loss"] if kept else None
        self.last_loss: float | None = json.loads(kept[-1])["loss"] if kept else None

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self.first_loss is None:
            self.first_loss = row["loss"]
        self.last_loss = row["loss"]
        if self._wandb is not None:
            # With commit, the row is written down now instead of when the next one comes.
            self._wandb.log({k: v for k, v in row.items() if k != "step"}, step=row["step"], commit=True)
        self._bar.set_postfix_str(
            f"loss {row['loss']:.4f}, lr {row['lr']:.2e}, {row['tokens_per_s']:.0f} tokens/s", refresh=False
        )
        self._bar.update(row["step"] - self._bar.n)
        every = self._config.log_steps * self._config.gradient_accumulate_step
        if every and row["step"] % every == 0:
            self.say(
                f"step {row['step']}/{self._config.total_steps}  loss {row['loss']:.4f}  lr {row['lr']:.3e}  "
                f"grad norm {row['grad_norm']:.3f}  {row['tokens_per_s']:.0f} tokens/s"
            )

    def say(self, line: str) -> None:
        """A line above the progress bar."""
        tqdm.write(line, file=sys.stderr)

    def close(self, exit_code: int = 0) -> None:
        self._bar.close()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=exit_code)


def _rows_until(path: Path, step: int) -> list[str]:
    """The rows of metrics.jsonl up to `step`; a last row that a kill cut short is dropped."""
    kept = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] > step:
            break
        kept.append(line)
    return kept


def _start_wandb(config: Config) -> Any:  # noqa: ANN401 - wandb is imported only where it is used
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("--train-log-backend wandb needs the package: pip install wandb") from error

    return wandb.init(
        project=config.project_name,
        dir=config.checkpoints,
        config=config.public(),
        # By default up to 15 s of rows are lost when the process is killed.
        settings=wandb.Settings(x_transaction_log_flush_interval=0.2, x_disable_stats=True, console="off"),
    )
