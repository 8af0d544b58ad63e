"""What `dist_train.py` calls. Flags are read before torch is imported, so that help and typos cost no seconds."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO, cast

from tqdm import tqdm

from .config import Config, ConfigError, grid_only, parse
from .validation import validate

log = logging.getLogger("farspan")


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        # A progress bar stays whole, and at one stroke, since ranks may share a terminal.
        tqdm.write(self.format(record) + "\n", file=sys.stderr, end="")
        sys.stderr.flush()


class _Reader:
    """stderr as long as somebody reads it. A run does not end because its terminal, or what it was piped into, has."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._if_read(lambda: self._stream.write(text))

    def flush(self) -> None:
        self._if_read(self._stream.flush)

    def _if_read(self, work: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever the stream gives
        try:
            return work()
        except OSError:
            self._stream = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
            return 0

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._stream, name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank. Returns the exit status; a rank that fails ends its process on the way."""
    argv = sys.argv[1:] if argv is None else argv
    if not isinstance(sys.stderr, _Reader):
        sys.stderr = cast(TextIO, _Reader(sys.stderr))
    log.setLevel(logging.INFO)
    if not log.handlers:  # a notebook may call this again
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
    one_of_many = config is not None and config.rank >= 0 and config.world_size > 1
    sys.stderr.write(f"farspan: rank {config.rank}: {error}\n" if config and one_of_many else f"farspan: {error}\n")
    sys.stderr.flush()
    if config and one_of_many and config.dist_url:
        from .train import tell

        tell(error, config)
    os._exit(2)  # the store's threads may still be at work
