"""Dashboards that metrics are sent to: wandb, TensorBoard. Both are imported only where they are asked for."""

from __future__ import annotations

import importlib.util
from typing import Any, Protocol

from ..flags.config import Config
from ..flags.errors import ConfigError


class Backend(Protocol):
    """Takes rows as `Metrics` does. Whatever keys a row has, their numbers arrive."""

    def write(self, row: dict[str, Any]) -> None: ...

    def close(self, exit_code: int) -> None: ...


def flat(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of `row`; a nested {"tasks": {"a": 1}} becomes "tasks/a"."""
    found: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, bool | int | float):
            found[prefix + key] = value
    return found


def check_backends(config: Config) -> None:
    """Raises `ConfigError` where --train-log-backend names a package that is not installed."""
    for name in config.log_backends:
        if name in _PACKAGES and importlib.util.find_spec(name) is None:
            raise ConfigError(f"--train-log-backend {name} needs the package: pip install {name}")


def open_backends(config: Config, start_step: int) -> list[Backend]:
    """Those of --train-log-backend. What a resumed run had written past `start_step` is hidden where that can be."""
    check_backends(config)
    return [_PACKAGES[name](config, start_step) for name in config.log_backends if name in _PACKAGES]


class _Wandb:
    """One wandb run for all starts of a run: its id is in <checkpoint-path>/wandb/run-id. After a return to an earlier
    checkpoint, steps that are done anew are drawn once more over `step`."""

    def __init__(self, config: Config, start_step: int) -> None:
        import wandb

        kept = config.checkpoints / "wandb" / "run-id"
        known = kept.read_text().strip() or None if start_step and kept.exists() else None
        try:
            self._run = wandb.init(
                project=config.project_name,
                dir=config.checkpoints,
                config=config.public(),
                id=known,
                resume="allow",
                # By default up to 15 s of rows are lost when the process is killed.
                settings=wandb.Settings(x_transaction_log_flush_interval=0.2, x_disable_stats=True, console="off"),
            )
        except wandb.Error as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise ConfigError(
                f"--train-log-backend wandb: {reason}; run `wandb login`, or set WANDB_MODE=offline"
            ) from error
        if not self._run.disabled:
            kept.parent.mkdir(exist_ok=True)
            kept.write_text(self._run.id)
        # wandb's own step must grow with each row; a row of an evaluation comes at the step of an update.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def write(self, row: dict[str, Any]) -> None:
        # With commit, the row is written down now instead of when the next one comes.
        self._run.log(flat(row), commit=True)

    def close(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


class _TensorBoard:
    """Event files in <checkpoint-path>/tensorboard."""

    def __init__(self, config: Config, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = config.checkpoints / "tensorboard"
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None, flush_secs=1)

    def write(self, row: dict[str, Any]) -> None:
        for name, value in flat(row).items():
            if name != "step":
                self._writer.add_scalar(name, value, row["step"])

    def close(self, exit_code: int) -> None:
        self._writer.close()


_PACKAGES: dict[str, Any] = {"wandb": _Wandb, "tensorboard": _TensorBoard}
