"""From flags to tasks that are ready to be read, and to the mixture of those that train."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..flags.config import Config
from .continuity import SPECIAL_TOKENS, TOKENIZER, brief, digest
from .counts import Count
from .first_rows import recognised, try_rows
from .mixture import DataError, Readable, Task, TaskMixture
from .recipe import Recipe
from .sources.lines import LineFile
from .sources.pretokenized import TokenFolder, is_pretokenized
from .sources.tables import Table, is_table
from .task_spec import TaskSpec, parse_tasks, read_task_config
from .tokenizer import Vocabulary
from .workers import Inline, Pool, Workers


def specs_of(config: Config) -> list[TaskSpec]:
    """Raises `DataError`."""
    return read_task_config(Path(config.task_config)) if config.task_config else parse_tasks(config.task_name)


def held_out_specs(told: str) -> list[TaskSpec]:
    """--evaluation-data: a list of tasks as of --task-config if its name ends in .json, else one path with `text`.

    Each is read once. Raises `DataError`.
    """
    if not told.endswith(".json"):
        return [TaskSpec(told, text="text", repeats=1)]
    specs = read_task_config(Path(told))
    for number, spec in enumerate(specs, 1):
        if spec.weight != 1 or spec.repeats:
            raise DataError(
                f"{told}, task {number}: weight and repeats say how often a task is drawn, and held-out data is read "
                "once, in order: leave them out"
            )
    return [replace(spec, repeats=1) for spec in specs]


def cache_of(config: Config) -> Path:
    return Path(config.data_cache) if config.data_cache else config.checkpoints / "data-cache"


def open_source(spec: TaskSpec, cache: Path) -> Readable:
    """What a path names: a table, or a file of lines. Raises `DataError`."""
    return Table(spec, cache) if is_table(spec.path) else LineFile(Path(spec.path), cache)


def open_task(spec: TaskSpec, cache: Path, vocabulary: Vocabulary) -> tuple[Recipe, Readable | TokenFolder]:
    """A task's source, and the recipe that makes its tokens, or has made them.

    Raises `DataError`, also for a pre-tokenised folder whose tokens the task, the flags or the tokenizer would make
    otherwise.
    """
    if not is_pretokenized(Path(spec.path)):
        source = open_source(spec, cache)
        return vocabulary.recipe(recognised(spec, source)), source
    folder = TokenFolder(Path(spec.path), vocabulary.digest, vocabulary.size)
    recipe = vocabulary.recipe(folder.says(spec))
    folder.check(recipe.makes())
    return recipe, folder


def make_pool(recipes: Sequence[Recipe | None], config: Config) -> Pool:
    needed = config.data_workers and any(recipes)
    return Workers(recipes, config.data_workers, config.wire_timeout) if needed else Inline(recipes)


def open_each(
    specs: Sequence[TaskSpec], config: Config, vocabulary: Vocabulary, *, shuffled: bool = True
) -> tuple[list[Task], Pool]:
    """The tasks of `specs`, and the pool that works for all of them. Raises `DataError`."""
    cache = cache_of(config)
    opened = [open_task(spec, cache, vocabulary) for spec in specs]
    for recipe, source in opened:
        if not isinstance(source, TokenFolder):
            try_rows(recipe, source, config.bad_lines == "skip")
    pool = make_pool([None if isinstance(source, TokenFolder) else recipe for recipe, source in opened], config)
    total = sum(spec.weight for spec in specs)
    tasks = [
        Task(
            recipe.spec, source, number, config.seed, pool,
            skip_bad=config.bad_lines == "skip", share=recipe.spec.weight / total, shuffled=shuffled,
            made=_made(recipe), made_before=_made(replace(recipe, frame=vocabulary.frame)),
        )
        for number, (recipe, source) in enumerate(opened)
    ]  # fmt: skip
    return tasks, pool


def _made(recipe: Recipe) -> str:
    return digest(json.dumps([recipe.makes(), recipe.spec.subset, recipe.spec.split]))


def open_tasks(config: Config, vocabulary: Vocabulary) -> TaskMixture:
    """Rank 0's mixture. Raises `DataError`."""
    tasks, pool = open_each(specs_of(config), config, vocabulary)
    return TaskMixture(
        tasks, pool, config.seq_length, config.seed,
        packed=config.rows == "packed", pad=vocabulary.pad, positions=config.document_mask,
        made=made_by(config, vocabulary, tasks),
        count=Count(cache_of(config), vocabulary.digest, config.rows == "packed", config.seq_length),
    )  # fmt: skip


def made_by(config: Config, vocabulary: Vocabulary, tasks: Sequence[Task]) -> dict[str, Any]:
    """What makes the tokens of all tasks and their order, flag → value (or its digest)."""
    # A chat template frames its documents itself.
    frame = vocabulary.frame.flags() if any(not task.spec.messages for task in tasks) else {}
    told = {SPECIAL_TOKENS: vocabulary.added, "--seed": config.seed, **frame}
    cut = {"--seq-length": config.seq_length, "--rows": config.rows}
    return {key: brief(value) for key, value in {TOKENIZER: vocabulary.digest, **told, **cut}.items()}
