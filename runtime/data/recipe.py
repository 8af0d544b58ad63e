"""From raw rows of a task to tokens: parse, render, tokenise, mark the targets. A pure function of the rows.

Nothing here imports torch or transformers: the worker processes load this file and start in a moment.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from string import Formatter
from typing import Any, NamedTuple, Protocol

import numpy as np
import orjson

from .task_spec import TaskSpec

Raw = bytes | Mapping[str, Any]
"""A line of a file, or a row of a table."""
Span = tuple[int, int]


SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant"}
"""Who speaks, by ShareGPT's names → by those of chat templates."""


class Fault(ValueError):
    """A row that cannot be used, and why."""


class Encoded(NamedTuple):
    """Texts as tokens: `flat` uint32 [n], how many each text has, and (if asked for) the characters of each token."""

    flat: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray | None = None
    ends: np.ndarray | None = None


class Encoder(Protocol):
    def __call__(self, texts: list[str], offsets: bool) -> Encoded: ...


@dataclass(frozen=True)
class Block:
    """Consecutive documents: `tokens` uint32 [n], `targets` bool [n] (None: all of them), `ends` int64 [documents].

    `faults`: document → why it gave no token.
    """

    tokens: np.ndarray
    targets: np.ndarray | None
    ends: np.ndarray
    faults: dict[int, str] = field(default_factory=dict)


class BackendEncoder:
    """A `tokenizers.Tokenizer`, given as its JSON so that it travels to other processes."""

    def __init__(self, serialized: str) -> None:
        self.serialized = serialized
        self._load()

    def __getstate__(self) -> str:
        return self.serialized

    def __setstate__(self, serialized: str) -> None:
        self.serialized = serialized
        self._load()

    def _load(self) -> None:
        from tokenizers import Tokenizer

        # A space that is cut off its token's characters would be no target. It changes no token; and in JSON, a quote
        # within a string is escaped, so nothing else can look like this.
        whole = self.serialized.replace('"trim_offsets":true', '"trim_offsets":false')
        self._tokenizer = Tokenizer.from_str(whole)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def __call__(self, texts: list[str], offsets: bool) -> Encoded:
        encode = self._tokenizer.encode_batch if offsets else self._tokenizer.encode_batch_fast
        done = encode(texts, add_special_tokens=False)
        ids = [one.ids for one in done]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        flat = np.fromiter(chain.from_iterable(ids), np.uint32, int(lengths.sum()))
        if not offsets:
            return Encoded(flat, lengths)
        spans = np.array(list(chain.from_iterable(one.offsets for one in done)), dtype=np.int64).reshape(-1, 2)
        return Encoded(flat, lengths, spans[:, 0], spans[:, 1])


@dataclass(frozen=True)
class Frame:
    """What stands around a document: `separator` before its text, then tokens at its beginning and its end."""

    separator: str = "\n"
    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()

    def flags(self) -> dict[str, Any]:
        """As the flags that say it, tokens by their ids."""
        return {"--document-separator": self.separator, "--bos": list(self.begin), "--eos": list(self.end)}


Render = Callable[[list[dict[str, str]]], tuple[str, list[Span]]]
"""A conversation → its text, and the spans (in characters) that the assistant says."""


@dataclass(frozen=True)
class Recipe:
    """How one task's rows become tokens. `render` is for tasks with `messages`, whose template frames them itself."""

    spec: TaskSpec
    encoder: Encoder
    frame: Frame
    render: Render | None = None

    def makes(self) -> dict[str, Any]:
        """What decides the tokens beside the tokenizer, as JSON and in the user's words: what is kept of a recipe where
        its tokens outlive the run."""
        form = self.spec.form()
        if self.spec.messages:
            return {**form, "chat template": getattr(self.render, "digest", "")}
        return {**form, **self.frame.flags()}

    def __call__(self, raws: Sequence[Raw]) -> Block:
        texts: list[str] = []
        spans: list[list[Span]] = []
        faults: dict[int, str] = {}
        kept: list[int] = []
        take = self._text if self.spec.text else self._template if self.spec.template else self._messages
        for number, raw in enumerate(raws):
            try:
                text, completion = take(self._row(raw) if isinstance(raw, bytes) else raw)
                if not text.isascii():
                    text.encode()
            except Fault as fault:
                faults[number] = str(fault)
            except UnicodeEncodeError:
                faults[number] = "half of a surrogate pair (\\ud800 … \\udfff) in the text"
            else:
                texts.append(text)
                spans.append(completion)
                kept.append(number)
        masked = self.spec.loss_on == "completion"
        encoded = self.encoder(texts, masked)
        targets = _targets(encoded, spans) if masked else None
        tokens, lengths = encoded.flat, encoded.lengths
        if not self.spec.messages and (self.frame.begin or self.frame.end):
            begins, ends = len(self.frame.begin), len(self.frame.end)
            if targets is not None:
                # What ends the document is part of what is to be learned.
                targets = framed(targets, lengths, (False,) * begins, (True,) * ends)
            tokens = framed(tokens, lengths, self.frame.begin, self.frame.end)
            lengths = lengths + begins + ends
        per_row = np.zeros(len(raws), dtype=np.int64)
        per_row[kept] = lengths
        return Block(tokens, targets, np.cumsum(per_row), faults)

    def _row(self, raw: bytes) -> Mapping[str, Any]:
        row = parse(raw)
        # The fast parser rounds integers beyond 64 bits.
        if any(isinstance(v := row.get(name), float) and abs(v) >= 1 << 63 for name in self.spec.template_fields):
            row = _parse_leniently(raw)
        return row

    def _text(self, row: Mapping[str, Any]) -> tuple[str, list[Span]]:
        text = row.get(self.spec.text)
        if not isinstance(text, str):
            raise Fault(f'expected an object with a string under "{self.spec.text}"')
        return self.frame.separator + text, []

    def _template(self, row: Mapping[str, Any]) -> tuple[str, list[Span]]:
        text, start = self.frame.separator, 0
        for literal, name, _, _ in Formatter().parse(self.spec.template):
            text += literal
            if name is not None:
                value = row.get(name)
                if not isinstance(value, str | int | float) or isinstance(value, bool):
                    raise Fault(f'expected an object with a string or number under "{name}"')
                if isinstance(value, float) and not math.isfinite(value):
                    raise Fault(f'{value} under "{name}" is no number')
                start = len(text)
                text += str(value)
        return text, [(start, len(text))]

    def _messages(self, row: Mapping[str, Any]) -> tuple[str, list[Span]]:
        assert self.render is not None
        return self.render(conversation(row, self.spec.messages))


def conversation(row: Mapping[str, Any], name: str) -> list[dict[str, str]]:
    """The messages under `name`, as chat templates take them; ShareGPT's, and a row of Alpaca's as a turn of the user
    and one of the assistant. Raises `Fault`."""
    said = row.get(name)
    if isinstance(said, str) and isinstance(answer := row.get("output"), str):
        given = row.get("input") or ""
        if not isinstance(given, str):
            raise Fault(f'expected a string under "input", beside "{name}" and "output"')
        return [
            {"role": "user", "content": f"{said}\n\n{given}" if given else said},
            {"role": "assistant", "content": answer},
        ]
    messages: list[dict[str, str]] = []
    turns = said if isinstance(said, list) else []
    for one in turns:
        keys = ("from", "value") if isinstance(one, Mapping) and "from" in one else ("role", "content")
        role, content = (one.get(key) if isinstance(one, Mapping) else None for key in keys)
        if not isinstance(role, str) or not isinstance(content, str):
            break
        messages.append({"role": SHAREGPT.get(role, role) if keys[0] == "from" else role, "content": content})
    if not messages or len(messages) < len(turns):
        raise Fault(f'expected a list of {{"role": …, "content": …}} or {{"from": …, "value": …}} under "{name}"')
    return messages


def parse(raw: bytes) -> Mapping[str, Any]:
    """One line of JSON → its object. Raises `Fault`."""
    try:
        row = orjson.loads(raw)
    except orjson.JSONDecodeError:
        row = _parse_leniently(raw)
    if not isinstance(row, dict):
        raise Fault(f"expected an object, found a {type(row).__name__}")
    return row


def _parse_leniently(raw: bytes) -> Any:  # noqa: ANN401 - JSON
    """What the fast parser refuses and Python's takes (half of a surrogate pair in a field that nobody reads)."""
    try:
        return json.loads(str(raw, "utf-8"), parse_constant=_refuse)
    except UnicodeDecodeError as error:
        raise Fault(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise Fault(f"not JSON: {error.msg} at column {error.colno}") from error
    except Fault:
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise Fault(f"not JSON that can be read: {str(error).splitlines()[0]}") from error


def _refuse(constant: str) -> None:
    raise Fault(f"not JSON: {constant} is no number")


def framed(flat: np.ndarray, lengths: np.ndarray, begin: Sequence[int], end: Sequence[int]) -> np.ndarray:
    """`flat`, with `begin` before and `end` after each of its documents."""
    added = len(begin) + len(end)
    ends = np.cumsum(lengths + added)
    starts = ends - lengths - added
    out = np.empty(len(flat) + added * len(lengths), dtype=flat.dtype)
    own = np.ones(len(out), dtype=bool)
    for places in [(starts + i, v) for i, v in enumerate(begin)] + [(ends - i, v) for i, v in enumerate(end[::-1], 1)]:
        out[places[0]] = places[1]
        own[places[0]] = False
    out[own] = flat
    return out


def _targets(encoded: Encoded, spans: list[list[Span]]) -> np.ndarray:
    """Tokens that hold a character of a span. One that straddles its border counts: the model must say it whole."""
    assert encoded.starts is not None
    assert encoded.ends is not None
    targets = np.zeros(len(encoded.flat), dtype=bool)
    stops = np.cumsum(encoded.lengths)
    for first, stop, own in zip((stops - encoded.lengths).tolist(), stops.tolist(), spans, strict=True):
        for start, end in own:
            targets[first:stop] |= (encoded.ends[first:stop] > start) & (encoded.starts[first:stop] < end)
    return targets
