"""Parquet, csv and hub data sets, through the package datasets: a table in its own cache, read in any order."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .task_spec import DataError, TaskSpec

if TYPE_CHECKING:
    from datasets import Dataset

HUB = "hf://"
SUFFIXES = {".parquet": "parquet", ".csv": "csv"}


def is_table(path: str) -> bool:
    return path.startswith(HUB) or Path(path).suffix in SUFFIXES


class Table:
    """The rows of one table. Raises `DataError` where it cannot be read."""

    def __init__(self, spec: TaskSpec, cache: Path) -> None:
        self.path = spec.path
        self._table = _load(spec, cache)
        self.rows = len(self._table)
        self.size = self.rows
        if not self.rows:
            raise DataError(f"{self.path} is empty")

    def read(self, numbers: np.ndarray) -> list[dict[str, Any]]:
        columns = self._table[numbers.tolist()]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def where(self, number: int) -> str:
        return f"{self.path}, row {number + 1}"


def _load(spec: TaskSpec, cache: Path) -> Dataset:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{spec.path}: needs the package: pip install datasets") from error
    local = Path(spec.path)
    if not spec.path.startswith(HUB) and not os.path.isfile(local):
        raise DataError(f"cannot read {spec.path}: no such file")
    was_shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # the run's own bar is the only one
    try:
        if spec.path.startswith(HUB):
            name = spec.path.removeprefix(HUB)
            return datasets.load_dataset(name, spec.subset or None, split=spec.split, cache_dir=str(cache / "tables"))
        return datasets.load_dataset(
            SUFFIXES[local.suffix], data_files=[str(local)], split="train", cache_dir=str(cache / "tables")
        )
    except Exception as error:  # whatever its readers raise
        cause = error.__cause__ or error
        raise DataError(
            f"{spec.path}: datasets cannot read it: {type(cause).__name__}: {str(cause).splitlines()[0]}"
        ) from error
    finally:
        if not was_shown:
            datasets.enable_progress_bars()
