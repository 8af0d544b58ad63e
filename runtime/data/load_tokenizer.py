"""From what --tokenizer-name names to a tokenizer: a folder, a file, or a name at the hub."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ...modules.sentencepiece import TokenizerError, read_model
from ..flags.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a file of the `tokenizers` library does not say of itself: which of its tokens begin and end a text.
BEGINS = ("<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>")
ENDS = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>")
WANTED = ("*.json", "*.txt", "*.jinja", "tokenizer.model")
LONGEST = 400  # characters of a reason; whole sentences


def load(name: str) -> tuple[PreTrainedTokenizerBase, Path | None]:
    """The tokenizer, and the folder whose files are this very tokenizer for transformers too, if there is one.

    Raises `ConfigError`.
    """
    told = path = Path(name).expanduser()
    if path.is_file() and path.name == "tokenizer.json" and (path.parent / "tokenizer_config.json").is_file():
        path = path.parent
    if not path.exists():
        if name.startswith((".", "/", "~")) or name.count("/") > 1 or ("/" in name and path.parent.is_dir()):
            raise ConfigError(f"--tokenizer-name {name}: no such file or folder")
        path = _fetch(name)
    model = path if path.is_file() else path / "tokenizer.model"
    as_it_stands = None
    try:
        if path.is_file() and path.read_bytes()[:64].lstrip().startswith(b"{"):
            tokenizer = _of_file(path)
        elif path.is_file() or (model.is_file() and not (path / "tokenizer.json").is_file()):
            tokenizer = read_model(model)
        else:
            tokenizer, as_it_stands = _of_folder(path), path if path == told else None
    except (TokenizerError, OSError) as error:
        raise ConfigError(f"--tokenizer-name {name}: {error}") from error
    # Some kinds are made from a config.json alone, with nothing in them.
    if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys():
        raise ConfigError(f"--tokenizer-name {name}: no tokenizer there: its files (tokenizer.json, say) are missing")
    return tokenizer, as_it_stands


def sentences(error: Exception) -> str:
    """What an error says, on one line: as many whole sentences as make a line, and the first at least."""
    said = ""
    for sentence in re.split(r"(?<=[.!?])\s", " ".join(str(error).split())):
        if said and len(said) + len(sentence) > LONGEST:
            break
        said += f" {sentence}"
    return f"{type(error).__name__}:{said}"


def _of_folder(path: Path) -> PreTrainedTokenizerBase:
    import transformers  # late: only rank 0 needs it, and it takes seconds

    try:
        return transformers.AutoTokenizer.from_pretrained(path)
    except Exception as error:  # its readers raise what they like
        raise TokenizerError(f"no tokenizer there: {sentences(error)}") from error


def _of_file(path: Path) -> PreTrainedTokenizerBase:
    import transformers
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # it raises bare ones
        raise TokenizerError(f"no tokenizer there: {sentences(error)}") from error
    ends = {"bos_token": BEGINS, "eos_token": ENDS}
    known = {key: next((t for t in tokens if backend.token_to_id(t) is not None), None) for key, tokens in ends.items()}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **known)


def _fetch(name: str) -> Path:
    """The hub's files of a tokenizer. Raises `ConfigError`."""
    from huggingface_hub import snapshot_download

    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    try:
        hub.setLevel(logging.CRITICAL)  # it tells of each of its attempts; the last one's error is the story
        return Path(snapshot_download(name, allow_patterns=list(WANTED), ignore_patterns="*/*"))
    except Exception as error:  # it raises what its many parts do
        reason = sentences(error)
        raise ConfigError(
            f"--tokenizer-name {name}: no such folder here, and the hub does not give it: {reason}"
        ) from error
    finally:
        hub.setLevel(level)
