"""`--profiling pytorch_profiling`: torch's own profiler around a few updates of rank 0."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WARM_UP, PROFILED = 2, 3  # updates

log = logging.getLogger("farspan")


class TorchProfile:
    """Profiles `PROFILED` updates after a warm-up of `WARM_UP`, and writes what was seen to
    `folder`/pytorch.json. A shorter run of `updates` is warmed up and profiled for less.

    Starts at once. `step` when an update is done, `close` when the last one is: a run that was stopped keeps what was
    seen until then.
    """

    def __init__(self, folder: Path, device: torch.device, updates: int) -> None:
        warm_up = min(WARM_UP, updates - 1)
        self._path, self._written = folder / "pytorch.json", False
        on_device = [ProfilerActivity.CUDA] if device.type == "cuda" else []
        self._profile = profile(
            activities=[ProfilerActivity.CPU, *on_device],
            schedule=schedule(wait=0, warmup=warm_up, active=min(PROFILED, updates - warm_up), repeat=1),
            on_trace_ready=self._write,
            profile_memory=True,
        )
        self._profile.start()

    def step(self) -> None:
        self._profile.step()

    def close(self) -> None:
        self._profile.stop()
        if not self._written:
            log.info("notice: no profile by torch: the run was stopped in the profiler's warm-up")

    def _write(self, profile: profile) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(self._path))
        self._written = True
        log.info("torch's profile of rank 0: %s (open it at ui.perfetto.dev)", self._path)
