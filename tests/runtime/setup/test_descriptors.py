"""A low limit on open files, as many systems set it for a start, is no limit where the hard one is higher."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch import Run

FEW = 24  # that a rank of two does not come along with


def limit() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (FEW, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def test_the_soft_limit_is_raised(flags: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    with Run(2, 1, flags(total_steps=2), faults=dict.fromkeys((0, 1), limit)) as run:
        run.succeed()
