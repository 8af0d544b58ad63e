"""A task's first rows, tried before any weights are loaded: what is wrong with a task is nearly always wrong there."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from .mixture import Readable, unusable
from .recipe import Fault, Raw, Recipe, conversation, parse
from .task_spec import DataError, TaskSpec

CHATS = {
    "messages": 'conversations ("role", "content")',
    "conversations": 'ShareGPT\'s form ("from", "value")',
    "instruction": 'Alpaca\'s form ("instruction", "input", "output")',
}
TRIED = 16
SHOWN = 8  # fields of a row that are named
LONGEST = 24  # characters of a field's name

log = logging.getLogger("farspan")


def first_rows(source: Readable) -> Sequence[Raw]:
    return source.read(np.arange(min(TRIED, source.rows)))


def recognised(spec: TaskSpec, source: Readable) -> TaskSpec:
    """`spec`; where its form was not said and its first rows hold conversations and no text, the form that reads
    them."""
    if spec.told:
        return spec
    rows = []
    for raw in first_rows(source):
        with suppress(Fault):
            rows.append(parse(raw) if isinstance(raw, bytes) else raw)
    if any(isinstance(row.get(spec.text), str) for row in rows):
        return spec
    for name, whose in CHATS.items():
        if any(_is_chat(row, name) for row in rows):
            log.info(
                '%s: rows of %s, read as "messages": "%s", "loss_on": "completion" (--task-config may say otherwise)',
                spec.path, whose, name,
            )  # fmt: skip
            return replace(spec, text="", messages=name, loss_on="completion")
    return spec


def _is_chat(row: Mapping[str, Any], name: str) -> bool:
    try:
        conversation(row, name)
    except Fault:
        return False
    return True


def try_rows(recipe: Recipe, source: Readable, skip_bad: bool) -> None:
    """Raises `DataError` where a first row cannot be used, unless bad ones are skipped; and where none of them can.

    With `skip_bad` the file may begin with bad lines: only where some from all over it are no better is it given up.
    """
    raws = first_rows(source)
    faults = recipe(raws).faults
    if len(faults) < len(raws):
        if faults and not skip_bad:
            first = min(faults)
            raise unusable(source.where(first), faults[first])
        return
    if skip_bad:
        others = np.unique(np.linspace(0, source.rows - 1, TRIED).astype(np.int64))
        if len(recipe(source.read(others)).faults) < len(others):
            return
    all_of_them = f"; none of the {len(raws)} rows that were tried can be used" if len(raws) > 1 else ""
    raise DataError(f"{source.where(0)}: {faults[0]}{all_of_them}. {_hint(raws[0])}")


def _hint(raw: Raw) -> str:
    """What the row has, and which keys of a task take it."""
    try:
        row = parse(raw) if isinstance(raw, bytes) else raw
    except Fault:
        if isinstance(raw, bytes) and raw.lstrip().startswith(b"["):
            return "Each line is to be one JSON object, and this looks like a list: jq -c '.[]' makes lines of it"
        return 'Each line is to be one JSON object, such as {"text": "…"}'
    kinds = {name: _kind(value) for name, value in row.items()}
    if not kinds:
        return "The row has no fields"
    named = ", ".join(f"{_short(name)} ({kind})" for name, kind in [*kinds.items()][:SHOWN])
    more = f" and {len(kinds) - SHOWN} more" if len(kinds) > SHOWN else ""
    return (
        f'The row has {named}{more}. In --task-config, "text" takes a field that is a text, "template" several, '
        f'"messages" a conversation{_example(kinds)}'
    )


def _example(kinds: Mapping[str, str]) -> str:
    """A task that would read such rows."""
    fit = {name: kind for name, kind in kinds.items() if len(name) <= LONGEST and name.isidentifier()}
    texts = [name for name, kind in fit.items() if kind == "text"]
    chats = [name for name, kind in fit.items() if kind == "conversation"]
    if chats:
        form = {"messages": chats[0]}
    elif len(texts) > 1:
        form = {"template": f"{{{texts[0]}}}\n{{{texts[1]}}}"}
    elif texts:
        form = {"text": texts[0]}
    else:
        return ""
    key, value = next(iter(form.items()))
    return f': [{{"path": …, "{key}": {json.dumps(value, ensure_ascii=False)}}}]'


def _kind(value: Any) -> str:  # noqa: ANN401 - JSON
    if isinstance(value, list) and _is_chat({"": value}, ""):
        return "conversation"
    if value is None:
        return "null"
    words = {bool: "true or false", str: "text", int: "number", float: "number", list: "list", dict: "object"}
    return words.get(type(value), type(value).__name__)


def _short(name: str) -> str:
    return json.dumps(name if len(name) <= LONGEST else f"{name[:LONGEST]}…", ensure_ascii=False)
