"""When work began and ended: by the host's clock, or on a CUDA device, which is asked when it has got there."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch

from .lane import Recorder


class Stopwatch:
    """Measures one piece of work after another on the host, and tells `record`."""

    def __init__(self, record: Recorder) -> None:
        self._record = record

    def start(self) -> Any:  # noqa: ANN401 - whatever `stop` wants back
        return time.perf_counter()

    def stop(self, lane: str, name: str, start: Any) -> None:  # noqa: ANN401
        self._record(lane, name, start, time.perf_counter())

    def settle(self) -> None:
        """Tell what has ended by now and could not be told before."""


class StreamStopwatch(Stopwatch):
    """Measures work that is queued on a stream, by events around it. Made where the device has nothing to do.

    Events know their distance alone, in single precision. So each is dated from the one before, and the first from a
    moment at which the host waited for the device.
    """

    def __init__(self, record: Recorder, device: torch.device) -> None:
        super().__init__(record)
        self._device = device
        self._open: deque[tuple[str, str, Any, Any]] = deque()
        self._last = self._mark()
        self._last.synchronize()
        self._last_s = time.perf_counter()

    def start(self) -> Any:  # noqa: ANN401
        return self._mark()

    def stop(self, lane: str, name: str, start: Any) -> None:  # noqa: ANN401
        self._open.append((lane, name, start, self._mark()))

    def settle(self) -> None:
        while self._open and self._open[0][3].query():
            lane, name, start, end = self._open.popleft()
            start_s = self._last_s + self._last.elapsed_time(start) / 1e3
            self._last, self._last_s = end, start_s + start.elapsed_time(end) / 1e3
            self._record(lane, name, start_s, self._last_s)

    def _mark(self) -> Any:  # noqa: ANN401
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def stopwatch(record: Recorder | None, device: torch.device) -> Stopwatch:
    """The one for work on `device`. Without `record`, it measures for nobody."""
    if record is None:
        return Stopwatch(lambda lane, name, start, end: None)
    return StreamStopwatch(record, device) if device.type == "cuda" else Stopwatch(record)
