"""Parquet, csv and hub data sets, through the package datasets: a table in its own cache, read in any order."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cached import is_whole, seal
from ..continuity import digest
from ..task_spec import DataError, TaskSpec

if TYPE_CHECKING:
    from datasets import Dataset, DownloadMode

HUB = "hf://"
SUFFIXES = {".parquet": "parquet", ".csv": "csv"}

log = logging.getLogger("farspan")


def is_table(path: str) -> bool:
    return path.startswith(HUB) or Path(path).suffix in SUFFIXES


class Table:
    """The rows of one table. Raises `DataError` where it cannot be read."""

    def __init__(self, spec: TaskSpec, cache: Path) -> None:
        self.path = spec.path
        self._table = _load(spec, cache)
        self.rows = len(self._table)
        self.size = self.rows
        # Its cached files' names hold a digest of where the rows come from and how.
        self.stamp = "table-" + digest(json.dumps([spec.path, self.rows, *_files(self._table)]))
        if not self.rows:
            raise DataError(f"{self.path} is empty")

    def read(self, numbers: np.ndarray) -> list[dict[str, Any]]:
        columns = self._table[numbers.tolist()]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def where(self, number: int) -> str:
        return f"{self.path}, row {number + 1}"


def _whole(spec: TaskSpec, cache: Path) -> Dataset:
    """From the cache, if what is there is as it was sealed; made anew where it is not, or cannot be opened."""
    from datasets import DownloadMode
    from datasets.exceptions import DatasetGenerationError

    before = {str(path) for path in cache.rglob("*.arrow")}
    try:
        table = _open(spec, cache, DownloadMode.REUSE_DATASET_IF_EXISTS)
        good = all(is_whole(Path(name)) for name in _files(table) if name in before)
    except DatasetGenerationError:
        raise  # it was being made: the source is at fault
    except Exception as error:  # whatever its readers raise
        if not before:
            raise
        log.info("notice: what is cached of %s cannot be opened (%s): making it anew", spec.path, type(error).__name__)
        good = False
    if not good:
        table = _open(spec, cache, DownloadMode.REUSE_CACHE_IF_EXISTS)
    for name in _files(table):
        if not good or name not in before:
            seal(Path(name))
    return table


def _open(spec: TaskSpec, cache: Path, mode: DownloadMode) -> Dataset:
    import datasets

    if spec.path.startswith(HUB):
        name = spec.path.removeprefix(HUB)
        return datasets.load_dataset(
            name, spec.subset or None, split=spec.split, cache_dir=str(cache), download_mode=mode
        )
    kind = SUFFIXES[Path(spec.path).suffix]
    return datasets.load_dataset(kind, data_files=[spec.path], split="train", cache_dir=str(cache), download_mode=mode)


def _files(table: Dataset) -> list[str]:
    return [file["filename"] for file in table.cache_files]


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
        return _whole(spec, cache / "tables")
    except Exception as error:  # whatever its readers raise
        cause = error.__cause__ or error
        raise DataError(
            f"{spec.path}: datasets cannot read it: {type(cause).__name__}: {str(cause).splitlines()[0]}"
        ) from error
    finally:
        if not was_shown:
            datasets.enable_progress_bars()
