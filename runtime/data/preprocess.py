"""What `preprocess.py` calls: one task, from rows to a folder of tokens that --task-name accepts."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ...modules.urls import url_fault
from ..flags.config import Config, dash, flag_options
from ..flags.errors import ConfigError
from ..flags.validation import PATHS
from .first_rows import recognised, try_rows
from .mixture import SHOWN, unusable
from .open_tasks import make_pool, open_source, specs_of
from .recipe import Block
from .sources.pretokenized import TokenWriter, is_pretokenized
from .task_spec import DataError
from .tokenizer import Vocabulary
from .workers import Pending

FLAGS = (
    "task_name", "task_config", "tokenizer_name", "data_cache", "document_separator", "bos", "eos", "special_tokens",
    "chat_template", "bad_lines", "data_workers",
)  # fmt: skip
HELP = {
    "task_name": "the task: a.jsonl, b.jsonl.gz, c.parquet, hf://org/data",
    "task_config": "JSON list of one task: path, text | template | messages, loss_on",
    "data_cache": "folder for line indexes and what had to be decompressed [a temporary one]",
}
BATCH = 256  # rows of a block

log = logging.getLogger("farspan")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 for flags that cannot be, 1 for data that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="preprocess.py",
        description="Tokenise one task into a folder that --task-name accepts.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to write")
    for f in fields(Config):
        if f.name in FLAGS:
            options = flag_options(f)
            parser.add_argument(
                f"--{f.name.replace('_', '-')}", **{**options, "help": HELP.get(f.name, options["help"])}
            )
    told = vars(parser.parse_args(argv))
    if fault := url_fault("--output", told["output"]):
        parser.error(fault)
    output = Path(told.pop("output"))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        with tempfile.TemporaryDirectory() as temporary:
            config = Config(**{**told, "data_cache": told["data_cache"] or temporary})
            documents, tokens, bad = preprocess(config, output)
    except (ConfigError, DataError) as error:
        sys.stderr.write(f"preprocess: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1
    except OSError as error:
        sys.stderr.write(f"preprocess: {error.filename or output}: cannot be written: {error.strerror or error}\n")
        return 1
    log.info("%s: %d documents, %d tokens, %d bad lines left out", output, documents, tokens, bad)
    return 0


def preprocess(config: Config, output: Path) -> tuple[int, int, int]:
    """Write `output`; returns documents, tokens and bad lines. Raises `ConfigError` or `DataError`."""
    if not config.tokenizer_name:
        raise ConfigError("--tokenizer-name is needed: the folder, file or hub name of the tokenizer")
    for name in PATHS:
        if fault := url_fault(f"--{dash(name)}", getattr(config, name)):
            raise ConfigError(fault)
    if not output.name:
        raise ConfigError(f"--output {output} must be the name of a folder to make")
    if config.data_workers < 0:
        raise ConfigError(f"--data-workers {config.data_workers} must not be negative")
    if bool(config.task_name) == bool(config.task_config):
        raise ConfigError("one of --task-name and --task-config is needed")
    specs = specs_of(config)
    if len(specs) > 1:
        raise ConfigError(f"one task at a time: {specs[0].path} and {specs[1].path} need a folder each")
    vocabulary = Vocabulary(config)
    if is_pretokenized(Path(specs[0].path)):
        raise DataError(f"{specs[0].path} is tokenised already")
    source = open_source(specs[0], Path(config.data_cache))
    recipe = vocabulary.recipe(recognised(specs[0], source))
    writer = TokenWriter(output, vocabulary.size, vocabulary.digest, recipe.makes())
    pool = make_pool([recipe], config)
    bad = 0

    def blocks() -> Iterator[tuple[np.ndarray, Block]]:
        coming: deque[tuple[np.ndarray, Pending]] = deque()
        for start in range(0, source.rows, BATCH):
            numbers = np.arange(start, min(start + BATCH, source.rows))
            coming.append((numbers, pool.submit(0, source.read(numbers))))
            if len(coming) > pool.ahead:
                numbers, pending = coming.popleft()
                yield numbers, pending.get()
        for numbers, pending in coming:
            yield numbers, pending.get()

    try:
        try_rows(recipe, source, config.bad_lines == "skip")
        with tqdm(total=source.rows, unit="line", unit_scale=True, disable=None, file=sys.stderr) as bar:
            for numbers, block in blocks():
                for row, fault in block.faults.items():
                    where = source.where(int(numbers[row])) if bad < SHOWN or config.bad_lines == "error" else ""
                    if config.bad_lines == "error":
                        raise unusable(where, fault)
                    if bad < SHOWN:
                        log.warning("skipping %s: %s", where, fault)
                    bad += 1
                writer.write(block)
                bar.update(len(numbers))
        writer.close()
    except BaseException:
        writer.abandon()
        raise
    finally:
        pool.close()
    return writer.documents, writer.tokens, bad
