"""A tokenizer.model gives sentencepiece's own ids, also through what is saved of it, or is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from farspan.modules import sentencepiece
from farspan.modules.sentencepiece import TokenizerError, read_model
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from spm import ODD, make_spm, random_texts, texts
from transformers import AutoTokenizer

CONFIG = {
    "add_bos_token": False, "add_eos_token": True, "legacy": False, "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": "{{ messages[0].content }}",
    "added_tokens_decoder": {
        "1": {"content": "<s>", "normalized": True, "special": True},
        "1000": {"content": "<pad>", "normalized": False, "special": True},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spm")
    make_spm(folder)
    return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def own(model: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(model))


@pytest.fixture(scope="module")
def many(own: SentencePieceProcessor) -> list[str]:
    pieces = [own.id_to_piece(i).replace("\u2581", " ") for i in range(3 + 256, own.vocab_size())]
    return [*ODD, *texts()[:1000], *random_texts(pieces)]


@pytest.mark.parametrize("beside", [{}, CONFIG], ids=["alone", "tokenizer_config.json"])
def test_the_ids_are_sentencepieces_own(
    model: Path, own: SentencePieceProcessor, many: list[str], tmp_path: Path, beside: dict[str, object]
) -> None:
    """Also transformers' on what is saved, with and without what frames a text."""
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    if beside:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(beside))
    tokenizer = read_model(tmp_path / "tokenizer.model")
    want = own.encode(many)
    assert sum(map(len, want)) > 50_000
    assert tokenizer(many, add_special_tokens=False).input_ids == want
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved(many, add_special_tokens=False).input_ids == want
    assert saved(many).input_ids == [[1, *ids] for ids in want]
    assert [saved.decode(ids) for ids in want] == [own.decode(ids) for ids in want]
    assert (saved.bos_token, saved.eos_token, saved.unk_token) == ("<s>", "</s>", "<unk>")
    if beside:
        assert saved.chat_template == beside["chat_template"]
        assert saved("<pad>", add_special_tokens=False).input_ids == [1000]


def test_of_real_texts(model: Path, own: SentencePieceProcessor, real_data: Path | None) -> None:
    if real_data is None:
        pytest.skip("no real data; the texts of the test before are the standard library's")
    rows = [json.loads(line) for line in (real_data / "gsm8k" / "train.jsonl").read_text().splitlines()[:500]]
    said = [text for row in rows for text in (row["question"] + "\n" + row["answer"], f"  {row['answer']}  ")]
    assert len(said) == 1000
    assert read_model(model)(said, add_special_tokens=False).input_ids == own.encode(said)


def test_offsets_are_characters(model: Path, own: SentencePieceProcessor) -> None:
    """All characters of a text are some token's, in order, and each token's are those that it says."""
    text = "\nWhat  is \u65e5\u672c \U0001f600?  def"
    made = read_model(model)(text, add_special_tokens=False, return_offsets_mapping=True)
    assert made.input_ids == own.encode(text)
    for token, (start, end) in zip(own.encode(text), made.offset_mapping, strict=True):
        assert start < end
        if not own.is_byte(token):
            assert text[start:end] in (own.id_to_piece(token).replace("\u2581", " "), own.decode([token]), "\n")
    assert {at for start, end in made.offset_mapping for at in range(start, end)} == set(range(len(text)))


@pytest.mark.parametrize(
    ("part", "field", "value", "reason"),
    [
        ("trainer_spec", "model_type", 1, "is no BPE model"),
        ("normalizer_spec", "precompiled_charsmap", b"x", r"normalises texts \(identity\)"),
        ("normalizer_spec", "remove_extra_whitespaces", True, "removes extra spaces"),
        ("trainer_spec", "treat_whitespace_as_suffix", True, "treats spaces in a way of its own"),
        ("pieces", "type", 4, "has pieces that its users defined"),
    ],
)
def test_what_cannot_be_converted_exactly_is_refused(
    model: Path, tmp_path: Path, part: str, field: str, value: object, reason: str
) -> None:
    proto = ModelProto.FromString(model.read_bytes())
    setattr(proto.pieces[300] if part == "pieces" else getattr(proto, part), field, value)
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    with pytest.raises(TokenizerError, match=rf"tokenizer\.model {reason}.*: put a tokenizer.json beside it"):
        read_model(tmp_path / "tokenizer.model")


def test_a_conversion_that_is_not_exact_is_found_out(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentencepiece, "_merges", lambda scores: [])
    with pytest.raises(TokenizerError, match=r"gives other ids than its conversion, for '.*': put a tokenizer.json"):
        read_model(model)


def test_what_it_needs_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(TokenizerError, match=r"needs the package sentencepiece: pip install -e '\.\[sentencepiece\]'$"):
        read_model(model)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(TokenizerError, match=r"nor a model of sentencepiece .*Llama 3's is one of tiktoken"):
        read_model(tmp_path / "tokenizer.model")
