"""Whether a run that goes on from a checkpoint still makes the tokens that the checkpoint's cursor points into."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from .chat import NAMED
from .task_spec import DataError

MAY_CHANGE = ("--seq-length", "--rows")
"""These cut the same tokens otherwise: the next row still begins with the very next token."""
LONGEST = 24  # characters of a value that is kept as it is

TOKENIZER, SPECIAL_TOKENS = "tokenizer", "--special-tokens"
ADVICE = (
    "put it back, or begin a run of its own from that model (--model-name with the checkpoint's folder, and another "
    "--checkpoint-path)"
)


def brief(value: object) -> Any:  # noqa: ANN401 - JSON
    """`value`, or a digest of it where it is long."""
    text = json.dumps(value)
    return value if len(text) <= LONGEST else digest(text)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def flag_of_tokens(made: Mapping[str, Any]) -> str:
    """The flag that added tokens to the model when a checkpoint was saved, as far as it is known; "" where none did."""
    added = made.get(SPECIAL_TOKENS)
    named = (name for name, chat in NAMED.items() if chat.tokens and brief(list(chat.tokens)) == added)
    return next(
        (f"--chat-template {name}" for name in named), f"{SPECIAL_TOKENS} (or --chat-template)" if added else ""
    )


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs of all that makes tokens and their order, a line each, where the run may go on with it.

    `then` is a checkpoint's. Raises `DataError` where the checkpoint's cursor would point to other tokens.
    """
    differ = {key for key in now if key in then and then[key] != now[key]}
    if TOKENIZER not in differ:
        differ.discard(SPECIAL_TOKENS)  # the tokenizer may have learned them meanwhile
    elif SPECIAL_TOKENS in differ:
        differ.discard(TOKENIZER)
    told = {
        TOKENIZER: "--tokenizer-name is another tokenizer than the one",
        SPECIAL_TOKENS: "--special-tokens (or --chat-template) adds other tokens, or in another order, than",
    }
    lines = {key: told.get(key, f"{key} is {now[key]!r} and was {then[key]!r}") for key in now if key in differ}
    for key, line in lines.items():
        if key not in MAY_CHANGE:
            raise DataError(f"{line} when the checkpoint was saved, whose place in the data would be lost: {ADVICE}")
    return list(lines.values())
