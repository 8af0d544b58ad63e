"""What a person sees of a rank that waits: a line now and then."""

from __future__ import annotations

import time
from collections.abc import Sequence

WAITING_S = 10.0
"""Seconds between two lines of a rank that waits."""


class NowAndThen:
    """`due()` is true once in `period_s` seconds [WAITING_S], for the first time when so many have passed."""

    def __init__(self, period_s: float | None = None) -> None:
        self._period_s = WAITING_S if period_s is None else period_s
        self._last = time.monotonic()

    def due(self) -> bool:
        if time.monotonic() - self._last < self._period_s:
            return False
        self._last = time.monotonic()
        return True


def ranks_in_words(ranks: Sequence[int]) -> str:
    """[1] → "rank 1"; [1, 3] → "ranks 1, 3"."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
