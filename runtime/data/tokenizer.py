"""Rank 0's tokenizer: its special tokens, what frames a document, and how texts and conversations become tokens."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...modules.json_file import read_json
from ...modules.sentencepiece import TokenizerError, read_beside
from ..flags.config import Config
from ..flags.errors import ConfigError
from .chat import NAMED, ChatRender, find_chat, use_chat
from .load_tokenizer import load
from .recipe import BackendEncoder, Encoded, Encoder, Frame, Recipe
from .task_spec import DataError, TaskSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger("farspan")


class Vocabulary:
    """The tokenizer that a config names, with --special-tokens and --chat-template. Raises `ConfigError`."""

    def __init__(self, config: Config) -> None:
        self.name = config.tokenizer_name or config.model_name
        tokenizer, self._folder = load(self.name)
        self.known = _size(tokenizer)  # ids before any was added
        chat = find_chat(config.chat_template) if config.chat_template else None
        self.added = special_tokens(config.special_tokens)
        self.added += [token for token in (chat.tokens if chat else ()) if token not in self.added]
        told = {"special-tokens": config.special_tokens, "chat-template": config.chat_template}
        if self.added:
            tokenizer.add_special_tokens({"additional_special_tokens": self.added}, False)
            ids = list(tokenizer.get_vocab().values())
            if len(set(ids)) < len(ids):  # where there are holes, new ones are counted from the number of tokens
                flags = " and ".join(f"--{k} {v}" for k, v in told.items() if v)
                raise ConfigError(f"{flags}: {self.name} gives new tokens the ids of others")
        self._turn_ends = chat is not None and bool(chat.end)
        if chat is not None:
            use_chat(config.chat_template, chat, tokenizer)
            self._folder = None  # what lies there is another tokenizer now
            if chat.tokens:
                named = " ".join(chat.tokens)
                log.info(
                    "--chat-template %s: %s are tokens, and %s is the end token", config.chat_template, named, chat.end
                )
        self.tokenizer = tokenizer
        self.size = _size(tokenizer)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.encoder: Encoder = BackendEncoder(backend.to_str()) if backend is not None else _PlainEncoder(tokenizer)
        described = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
        self.digest = hashlib.sha256(described.encode()).hexdigest()[:16]
        self.pad = next(
            (t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) if t is not None), 0
        )
        self.frame = self._frame(config)
        self._ends_templates = config.eos == "auto" and not self.frame.end
        self._told: set[str] = set()

    def decode(self, tokens: list[int]) -> str:
        """As text, special tokens included."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def recipe(self, spec: TaskSpec) -> Recipe:
        """Raises `DataError` where the task asks for what the tokenizer cannot do."""
        if spec.loss_on == "completion" and not isinstance(self.encoder, BackendEncoder):
            raise DataError(f"{spec.path}: loss_on completion needs a tokenizer with a tokenizer.json ({self.name})")
        if spec.messages and not self.tokenizer.chat_template:
            raise DataError(
                f"{spec.path}: messages need a chat template, and {self.name} has none: "
                f"--chat-template {', '.join(NAMED)} or a file"
            )
        render = ChatRender(self.tokenizer, spec.loss_on == "completion") if spec.messages else None
        return Recipe(spec, self.encoder, self._frame_of(spec), render)

    def files(self, folder: Path) -> Path:
        """Where files lie that are this tokenizer: where it was found, if it is still the same; else written here."""
        if self._folder is not None and not self.added:
            return self._folder
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        (folder / "special_tokens_map.json").unlink(missing_ok=True)  # an older version's would be believed first
        found = Path(self.name).expanduser()
        model = found / "tokenizer.model" if found.is_dir() else found
        kept = folder / "tokenizer.model"  # for programs that read no other
        if model.suffix == ".model" and model.is_file() and not (kept.exists() and kept.samefile(model)):
            shutil.copyfile(model, kept)
        return folder

    def generation(self, model: Path, folder: Path) -> Path:
        """Where a generation_config.json lies that stops at the end of a turn: in the model's folder, if the chat
        template brings no token for that; else in `folder`, where it is written. Raises `ConfigError`."""
        if not self._turn_ends:
            return model
        try:
            own, config = (read_beside(model / name) for name in ("generation_config.json", "config.json"))
        except TokenizerError as error:
            raise ConfigError(str(error)) from error
        before = own.get("eos_token_id", config.get("eos_token_id"))
        ends = [] if before is None else before if isinstance(before, list) else [before]
        stops = list(dict.fromkeys([*ends, self.tokenizer.eos_token_id]))
        kept = own or {key: config[key] for key in ("bos_token_id", "pad_token_id") if key in config}
        (folder / "generation_config.json").write_text(json.dumps({**kept, "eos_token_id": stops}, indent=1))
        return folder

    def _frame_of(self, spec: TaskSpec) -> Frame:
        """What is filled into a template has an end that is to be learned, whatever the tokenizer does by itself."""
        if not spec.template or not self._ends_templates:
            return self.frame
        token = self.tokenizer.eos_token
        if spec.path not in self._told:
            self._told.add(spec.path)
            if token is None:
                log.warning(
                    "%s: the tokenizer has no end token, and so none is learned (--eos no: so be it)",
                    spec.path,
                )
            else:
                log.info("%s: each document ends with %s, to be learned too (--eos no: with nothing)", spec.path, token)
        return self.frame if token is None else replace(self.frame, end=(self.tokenizer.eos_token_id,))

    def _frame(self, config: Config) -> Frame:
        tokenizer = self.tokenizer
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        own = tokenizer("a")["input_ids"]
        at = next((i for i in range(len(own)) if own[i : i + len(bare)] == bare), 0)
        sides = {"bos": own[:at], "eos": own[at + len(bare) :]}
        for side in sides:
            choice = getattr(config, side)
            token = getattr(tokenizer, f"{side}_token_id")
            if choice == "yes" and token is None:
                raise ConfigError(f"--{side} yes, but the tokenizer {self.name} has no {side} token")
            if choice != "auto":
                sides[side] = [token] if choice == "yes" else []
        separator = unescape(config.document_separator)
        return Frame(separator, tuple(sides["bos"]), tuple(sides["eos"]))


def _size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id and one: there may be more ids than tokens."""
    return max(tokenizer.get_vocab().values()) + 1


class _PlainEncoder:
    """A tokenizer without a fast backend, one text after another."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def __call__(self, texts: list[str], offsets: bool) -> Encoded:
        ids = [self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
        flat = np.array([token for one in ids for token in one], dtype=np.uint32)
        return Encoded(flat, np.array([len(one) for one in ids], dtype=np.int64))


def unescape(text: str) -> str:
    r"""`\n`, `\t` and `\\` as a shell passes them → the characters that are meant."""
    return text.replace("\\\\", "\0").replace("\\n", "\n").replace("\\t", "\t").replace("\0", "\\")


def special_tokens(file: str) -> list[str]:
    if not file:
        return []
    expected = 'it must hold {"tokens": ["<…>", …]}'
    content = read_json(Path(file), {"tokens": [str]}, lambda line: ConfigError(f"--special-tokens {line}"), expected)
    tokens: list[str] = content["tokens"]
    if not tokens or "" in tokens:
        raise ConfigError(f"--special-tokens {file} names no token, or one that is empty; {expected}")
    if len(set(tokens)) < len(tokens):
        raise ConfigError(f"--special-tokens {file} names a token twice")
    return tokens
