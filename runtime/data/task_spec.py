"""What a task is, as data: from `--task-name` or `--task-config` to the same objects."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import count
from pathlib import Path
from string import Formatter
from typing import Any

from ...modules.json_file import read_json, short
from ...modules.urls import url_fault

LOSS_ON = ("all", "completion")
FORMS = ("text", "template", "messages")
HEAVIEST = 1e9
SUFFIXES = re.compile(r"(\.(jsonl|json|gz|zst|parquet|csv|tokens))+/*$")


class DataError(ValueError):
    """Training data that cannot be used; the message names the file and the line."""


@dataclass(frozen=True)
class TaskSpec:
    """One task. Of `text` (a field), `template` and `messages` (a field with a conversation) exactly one is set.

    `repeats`: how many epochs it may be read, 0 for any number; `subset` and `split` matter for `hf://` paths alone.
    `told`: whether the form or `loss_on` was said, and not left at what is usual.
    """

    path: str
    weight: float = 1.0
    text: str = ""
    template: str = ""
    messages: str = ""
    loss_on: str = "all"
    repeats: int = 0
    subset: str = ""
    split: str = "train"
    told: bool = field(default=False, compare=False)

    @property
    def template_fields(self) -> list[str]:
        return [name for _, name, _, _ in Formatter().parse(self.template) if name is not None]

    def form(self) -> dict[str, str]:
        """The key of the form that is set, and `loss_on`, as they stand in --task-config."""
        return {**{key: getattr(self, key) for key in FORMS if getattr(self, key)}, "loss_on": self.loss_on}

    def formed(self, form: dict[str, Any]) -> TaskSpec:
        """This task with the form and `loss_on` that `form` (and what else is in it) holds. Raises `KeyError`."""
        return replace(self, **{key: form.get(key, "") for key in FORMS}, loss_on=form["loss_on"])


def parse_tasks(text: str) -> list[TaskSpec]:
    """`a.jsonl:0.2,b.jsonl` → tasks (weight 1 where none is given). A path may hold colons. Raises `DataError`."""
    tasks = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        head, _, tail = part.rpartition(":")
        try:
            path, weight = (head, float(tail)) if head else (part, 1.0)
        except ValueError:
            path, weight = part, 1.0
        tasks.append(checked({"path": path, "weight": weight}, f"--task-name {part}"))
    if not tasks:
        raise DataError("--task-name names no file")
    return tasks


def read_task_config(path: Path) -> list[TaskSpec]:
    """A JSON list of objects with the fields of `TaskSpec`; relative paths are seen from the working folder.

    Raises `DataError`.
    """
    advice = 'it must hold a list of tasks, [{"path": …}, …] (a file with an object on each line is named .jsonl)'
    rows = read_json(path, [{}], DataError, advice)
    if not rows:
        raise DataError(f'{path}: expected a list of tasks, [{{"path": …}}, …]')
    return [checked(row, f"{path}, task {number}") for number, row in enumerate(rows, 1)]


def short_names(paths: Sequence[str]) -> list[str]:
    """What metrics call the tasks of `paths`: a file's name without its suffix, with as many folders before it as tell
    it from the others; then #2 … where that is not enough."""
    split = [[part for part in SUFFIXES.sub("", path).split("/") if part] for path in paths]
    names: list[str] = []
    for path, parts in zip(paths, split, strict=True):
        others = [other for told, other in zip(paths, split, strict=True) if told != path]
        depth = 1
        while depth < len(parts) and any(other[-depth:] == parts[-depth:] for other in others):
            depth += 1
        name = "/".join(parts[-depth:])
        again = (f"{name}#{number}" for number in count(2))
        names.append(name if name not in names else next(each for each in again if each not in names))
    return names


def checked(row: dict[str, Any], where: str) -> TaskSpec:
    """A task from the keys of --task-config. Raises `DataError`, which begins with `where`."""
    known = {f.name: f.default for f in fields(TaskSpec) if f.compare}
    for key, value in row.items():
        if key not in known:
            raise DataError(f"{where}: unknown key {short(repr(key))}; known are {', '.join(known)}")
        default = known[key]
        numeric = isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool)
        kind = str if key == "path" else type(default)
        if type(value) is not kind and not numeric:
            raise DataError(f"{where}: {key} must be of type {kind.__name__}, not {short(json.dumps(value))}")
    if not row.get("path"):
        raise DataError(f"{where}: no path")
    if fault := url_fault("path", row["path"], "hf"):
        raise DataError(f"{where}: {fault}")
    forms = [key for key in FORMS if row.get(key)]
    if len(forms) > 1:
        raise DataError(f"{where}: {' and '.join(forms)} exclude one another: give one")
    told = bool(forms) or "loss_on" in row
    spec = TaskSpec(**{**row, **({} if forms else {"text": "text"})}, told=told)
    if not 0 < spec.weight <= HEAVIEST:  # the sum of all must be a number too
        raise DataError(f"{where}: the weight must be a positive number, and {HEAVIEST:g} at most")
    if spec.repeats < 0:
        raise DataError(f"{where}: repeats must be 0 (no limit) or more")
    if spec.loss_on not in LOSS_ON:
        raise DataError(f"{where}: loss_on {short(repr(spec.loss_on))} is not one of {', '.join(LOSS_ON)}")
    if spec.loss_on == "completion" and spec.text:
        raise DataError(f"{where}: loss_on completion needs a template or messages: a plain text has no prompt")
    _check_template(spec, where)
    return spec


def _check_template(spec: TaskSpec, where: str) -> None:
    try:
        parts = list(Formatter().parse(spec.template))
    except ValueError as error:
        raise DataError(f"{where}: template: {error}") from error
    names = spec.template_fields
    if spec.template and (not names or not all(names) or any(form or conversion for _, _, form, conversion in parts)):
        raise DataError(f'{where}: template must hold fields by their names, e.g. "{{question}}\\n{{answer}}"')
    if spec.loss_on == "completion" and spec.template and len(names) < 2:
        raise DataError(f"{where}: loss_on completion: the last field is the completion, and the template has but one")
