"""What `dist_train.py` calls. Flags are read before torch is imported, so that help and typos cost no seconds."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO, cast

from tqdm import tqdm

from .flags.config import Config, read
from .flags.errors import ConfigError
from .flags.validation import problems_of

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

    def _if_read(self, work: Callable[[], int | None]) -> int:
        try:
            return work() or 0
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
    try:
        config, notices, problems = read(argv)
    except ConfigError as error:
        return _refuse(error.problems, None)
    # A flag that could not be read is told once, and not again as one that is missing.
    named = set(re.findall(r"--[\w-]+", " ".join(problems)))
    problems += [problem for problem in problems_of(config) if not named & set(re.findall(r"--[\w-]+", problem))]
    if problems:
        return _refuse(problems, config)
    for notice in notices if config.rank == 0 else []:
        log.info("notice: %s", notice)
    from .train import run

    return run(config)


def _refuse(problems: Sequence[str], config: Config | None) -> int:
    """Say what is wrong with the flags, a line each, here; and the first to the other ranks, which may be waiting for
    this one."""
    who = f"rank {config.rank}: " if config is not None and config.rank >= 0 and config.world_size > 1 else ""
    sys.stderr.writelines(f"farspan: {who}{problem}\n" for problem in problems)
    sys.stderr.flush()
    if config and who and config.dist_url:
        from .train import tell

        more = f" (and {len(problems) - 1} more, which it has printed)" if len(problems) > 1 else ""
        tell(ConfigError(problems[0] + more), config)
    os._exit(2)  # the store's threads may still be at work
