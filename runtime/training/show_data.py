"""A row of the training data as the model gets it, in characters, and what of it is to be predicted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import groupby

from torch import Tensor

from ...modules.loss import IGNORED

ENDS = 60  # tokens of a long row that are shown of its beginning, and of its end
VISIBLE = str.maketrans({"\n": "⏎", "\r": "␍", "\t": "⇥"})

log = logging.getLogger("farspan")


class ShowData:
    """Logs one row of the first update that it sees, and with --show-data of each further `every` updates."""

    def __init__(self, decode: Callable[[list[int]], str], every: int) -> None:
        self._decode, self._every, self._seen = decode, every, False

    def __call__(self, update: int, tokens: Tensor, labels: Tensor) -> None:
        """A row of update `update` (counted from 1): tokens [T], and labels [T], each the token that follows or
        `IGNORED`."""
        if self._seen and not (self._every and update % self._every == 0):
            return
        self._seen = True
        targets = [False, *(labels[:-1] != IGNORED).tolist()]
        text = marked(self._decode, tokens.tolist(), targets)
        log.info(
            "update %d, one row of %d tokens; the %d in ⟦ ⟧ are to be predicted (⏎ is a line break): %s",
            update, len(targets), sum(targets), text,
        )  # fmt: skip


def marked(decode: Callable[[list[int]], str], tokens: list[int], targets: list[bool]) -> str:
    """The row as text on one line, its targets in ⟦ ⟧, a long row without its middle."""
    left_out = len(tokens) - 2 * ENDS
    if left_out <= 0:
        return _marked(decode, tokens, targets)
    head, tail = slice(None, ENDS), slice(-ENDS, None)
    return (
        f"{_marked(decode, tokens[head], targets[head])} [… {left_out} tokens …] "
        f"{_marked(decode, tokens[tail], targets[tail])}"
    )


def _marked(decode: Callable[[list[int]], str], tokens: list[int], targets: list[bool]) -> str:
    text, at, done = "", 0, ""
    for wanted, run in groupby(targets):
        at += len(list(run))
        # Tokens alone may decode otherwise than behind others: without the space before a word, say.
        whole = decode(tokens[:at])
        part, done = whole[len(done) :], whole
        text += f"⟦{part}⟧" if wanted else part
    return text.translate(VISIBLE)
