"""A `tokenizer.model` of sentencepiece, as Meta ships Llama's, turned into a `tokenizers.Tokenizer` with the same ids.

transformers' own conversion gives others: it puts no space before a text that begins with one, and leaves the order of
equal merges to the order of ids. Here every text gets sentencepiece's ids, or the model is refused.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .json_file import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

INSTALL = "pip install -e '.[sentencepiece]'"
SPACE = "\u2581"  # what sentencepiece writes for a space
BPE = 2  # of sentencepiece's model types
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # of its types of pieces


class TokenizerError(ValueError):
    """A tokenizer's file that cannot be used. One line: what, where, what to do."""


def read_model(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in `path`, with the model's own tokens for the beginning and the end of a text.

    The model alone decides the ids. Of the files beside it, the chat template is taken, and tokens that were added
    behind the model's. Raises `TokenizerError`.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer, special = convert(path)
    beside = read_beside(path.parent / "tokenizer_config.json")
    template = path.parent / "chat_template.jinja"
    return PreTrainedTokenizerFast(
        tokenizer_object=_with_added(tokenizer, path.parent, beside),
        clean_up_tokenization_spaces=False,
        chat_template=template.read_text(encoding="utf-8") if template.is_file() else beside.get("chat_template"),
        **special,
    )


def convert(path: Path) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer, and its `bos_token`, `eos_token`, `unk_token`, those that there are. Raises `TokenizerError`."""
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import SentencePieceProcessor
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
    except ImportError as error:
        raise TokenizerError(f"{path} needs the package sentencepiece: {INSTALL}") from error
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    try:
        proto = ModelProto.FromString(path.read_bytes())
        if not proto.pieces:
            raise DecodeError("it holds no pieces")
    except (DecodeError, OSError) as error:
        raise TokenizerError(
            f"{path} is neither a tokenizer.json nor a model of sentencepiece ({error}). Llama 3's is one of tiktoken: "
            "put the tokenizer.json beside it that the model has at the hub"
        ) from error
    if reason := _unlike(proto):
        raise TokenizerError(f"{path} {reason}, which cannot be converted exactly: put a tokenizer.json beside it")
    ids = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    trained = proto.trainer_spec
    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_merges({p.piece: p.score for p in proto.pieces if p.type == NORMAL}),
            unk_token=proto.pieces[trained.unk_id].piece,
            fuse_unk=True,
            byte_fallback=trained.byte_fallback,
        )
    )
    prefix = [normalizers.Prepend(SPACE)] if proto.normalizer_spec.add_dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    processor = SentencePieceProcessor(model_proto=proto.SerializeToString())
    for text in _trials(list(ids)):
        if tokenizer.encode(text).ids != processor.encode(text):
            raise TokenizerError(
                f"{path} gives other ids than its conversion, for {text!r}: put a tokenizer.json beside it"
            )
    marks = [p.piece for p in proto.pieces if p.type in (CONTROL, UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    ends = {"bos_token": trained.bos_id, "eos_token": trained.eos_id, "unk_token": trained.unk_id}
    special = {name: proto.pieces[number].piece for name, number in ends.items() if 0 <= number < len(ids)}
    if bos := special.get("bos_token"):
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", [(bos, ids[bos])])
    return tokenizer, special


def _unlike(proto: Any) -> str:  # noqa: ANN401 - made by protobuf
    """What the model does that Llama's do not; empty where there is nothing."""
    trained, normal = proto.trainer_spec, proto.normalizer_spec
    kinds = {piece.type for piece in proto.pieces} - {NORMAL, UNKNOWN, CONTROL, BYTE}
    for is_so, reason in (
        (trained.model_type != BPE, "is no BPE model (a unigram model, say)"),
        (normal.precompiled_charsmap, f"normalises texts ({normal.name})"),
        (normal.remove_extra_whitespaces, "removes extra spaces"),
        (not normal.escape_whitespaces or trained.treat_whitespace_as_suffix, "treats spaces in a way of its own"),
        (kinds, "has pieces that its users defined, or that are unused"),
        (len({piece.piece for piece in proto.pieces}) < len(proto.pieces), "names a piece twice"),
    ):
        if is_so:
            return reason
    return ""


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Each way to put a piece together, the piece with the highest score first.

    sentencepiece ranks pieces, and takes the leftmost of those alike; the library ranks pairs. They differ only where
    two pairs that overlap make the same piece: in [ab][a][ba], both make "aba". The left one is split at a period of
    the piece, so such splits come first.
    """
    ranked = []
    for number, (piece, score) in enumerate(scores.items()):
        for at in range(1, len(piece)):
            left, right = piece[:at], piece[at:]
            if left in scores and right in scores:
                ranked.append(((-score, number, not piece.startswith(right), at), (left, right)))
    return [pair for _, pair in sorted(ranked)]


def _trials(pieces: list[str]) -> Iterator[str]:
    """Texts that try the conversion: rows of pieces, and of one character."""
    texts = [piece.replace(SPACE, " ") for piece in pieces]
    rng = random.Random(0)
    for _ in range(1000):
        yield "".join(rng.choices(texts, k=20))
    for character in sorted({text[0] for text in texts if len(text) > 1 and len(set(text)) == 1}):
        yield from (character * count for count in range(1, 40))


def _with_added(tokenizer: Tokenizer, folder: Path, config: dict[str, Any]) -> Tokenizer:
    """`tokenizer` with the tokens that the files beside the model add behind its own."""
    from tokenizers import AddedToken

    added = {number: content for content, number in read_beside(folder / "added_tokens.json").items()}
    added |= {int(number): token["content"] for number, token in config.get("added_tokens_decoder", {}).items()}
    for number, content in sorted(added.items()):
        if number >= tokenizer.get_vocab_size(with_added_tokens=False):
            tokenizer.add_special_tokens([AddedToken(content, special=True, normalized=False)])
            if tokenizer.token_to_id(content) != number:
                raise TokenizerError(f"{folder}: the added token {content!r} cannot have the id {number}")
    return tokenizer


def read_beside(file: Path) -> dict[str, Any]:
    """A tokenizer's further file, an object; empty where there is no such file. Raises `TokenizerError`."""
    if not file.is_file():
        return {}
    beside: dict[str, Any] = read_json(file, {}, TokenizerError, "copy it again from where the tokenizer is from")
    return beside
