"""What `dist_train.py` calls. Flags are read before torch is imported, so that help and typos cost no seconds."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from tqdm import tqdm

from .config import Config, ConfigError, grid_only, parse
from .validation import validate

log = logging.getLogger("farspan")


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)  # leaves a progress bar whole
        sys.stderr.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank. Returns the exit status; a rank that fails ends its process on the way."""
    argv = sys.argv[1:] if argv is None else argv
    log.setLevel(logging.INFO)
    log.addHandler(_Handler())
    config = None
    try:
        config, notices = parse(argv)
        validate(config)
    except ConfigError as error:
        return _refuse(error, config or grid_only(argv))
    for notice in notices if config.rank == 0 else []:
        log.info("notice: %s", notice)
    from .train import run

    return run(config)


def _refuse(error: ConfigError, config: Config | None) -> int:
    """Say what is wrong with the flags, here and to the other ranks, which may be waiting for this one."""
    known = config is not None and config.rank >= 0
    sys.stderr.write(f"farspan: rank {config.rank}: {error}\n" if config and known else f"farspan: {error}\n")
    sys.stderr.flush()
    if config and known and config.world_size > 1 and config.dist_url:
        from .train import tell

        tell(error, config)
    os._exit(2)  # the store's threads may still be at work
