"""The one reader of JSON files: whatever is damaged ends in one line that names the file, what is wrong, what to do."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class Count:
    """The shape of a number of things: an int of 0 or more."""


LONGEST = 160  # characters of what is told of a file's content

Shape = Any
"""What a value must be: a type (`float` takes an int too; a number must be finite), `None`, `[shape]` (a list of
such), `{}` (an object), `{str: shape}` (with any keys), `{"key": shape, "key?": shape}` (with these, the last one
perhaps), or a tuple of shapes, one of which must fit."""


def read_json(path: Path, shape: Shape, error: Callable[[str], Exception], advice: str) -> Any:  # noqa: ANN401 - JSON
    """The content of `path`, which is of `shape`. Raises `error(line)`, which ends with `advice`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
        wrong = next(misfits(value, shape), None)
    except OSError as trouble:
        wrong = trouble.strerror or "cannot be read"
    except RecursionError:
        wrong = "its brackets are nested too deeply"
    except ValueError as trouble:
        wrong = f"is not JSON: {trouble}"
    if wrong is not None:
        raise error(f"{path}{'' if wrong.startswith('is ') else ':'} {short(wrong)}; {advice}")
    return value


def short(text: object) -> str:
    """`text` on one line, and not too long for a message."""
    line = " ".join(str(text).split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"


def misfits(value: object, shape: Shape, at: str = "") -> Iterator[str]:
    """In words, where `value` is not of `shape`."""
    if isinstance(shape, tuple):
        if not any(next(misfits(value, one), None) is None for one in shape):
            yield f"{_named(at)} is {_told(value)}"
    elif isinstance(shape, list | dict):
        if not isinstance(value, type(shape)):
            yield f"{_named(at)} is {_told(value)}, not {'a list' if isinstance(shape, list) else 'an object'}"
        elif isinstance(value, list):
            for number, one in enumerate(value):
                yield from misfits(one, shape[0], f"{at}[{number}]")
        elif isinstance(value, dict) and isinstance(shape, dict):
            yield from _misfits_of_object(value, shape, at)
    elif shape is Count:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            yield f"{_named(at)} is {_told(value)}, not a number of 0 or more"
    elif shape is None or value is None:
        if value is not shape:
            yield f"{_named(at)} is {_told(value)}"
    else:
        wanted = (int, float) if shape is float else shape
        good = isinstance(value, wanted) and (shape is bool or not isinstance(value, bool))
        if not good or (isinstance(value, float) and not math.isfinite(value)):
            yield f"{_named(at)} is {_told(value)}"


def _misfits_of_object(value: dict[str, Any], shape: dict[Any, Shape], at: str) -> Iterator[str]:
    if str in shape:
        shape = dict.fromkeys(value, shape[str])
    for key, one in shape.items():
        name = key.removesuffix("?") if key not in value else key
        if name in value:
            yield from misfits(value[name], one, f"{at}.{name}" if at else name)
        elif name == key:
            yield f"{_named(at)} has no {short(key)}"


def _named(at: str) -> str:
    return short(at) if at else "the whole of it"


def _told(value: object) -> str:
    text = short(json.dumps(value, ensure_ascii=False)[:1000])
    return text if len(text) <= 60 else f"{text[:59]}…"
