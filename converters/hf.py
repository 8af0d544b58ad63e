"""Hugging Face checkpoints to shard folders and back, one layer in memory at a time."""

import logging
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..modules.checksums import write_sums
from ..modules.json_file import read_json
from ..modules.shards import (
    INDEX,
    SINGLE,
    ShardError,
    ShardStore,
    copy_generation_config,
    copy_tokenizer,
    old_unit_file,
    own_names,
    save_tensors,
    unit_file,
    weight_map,
    write_index,
    write_json,
    write_unit,
)
from ..modules.spec import SpecError, hf_config

log = logging.getLogger(__name__)
MAX_FILE_BYTES = 5 * 10**9
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class ConvertError(RuntimeError):
    """What keeps a conversion from being done. One line: what, where, what to do."""


class BinStore(ShardStore):
    """The same view of an old checkpoint with pickled weights. `weights_only` keeps the pickle from running code."""

    _loaded: tuple[str, dict[str, Tensor]] = ("", {})

    def _locate(self) -> dict[str, str]:
        index = self.folder / BIN_INDEX
        if not index.is_file():
            return dict.fromkeys(self._load(BIN), BIN)
        return dict(read_json(index, {"weight_map": {str: str}}, ShardError, "fetch it again")["weight_map"])

    def _fetch(self, file: str, names: list[str]) -> dict[str, Tensor]:
        tensors = self._load(file)
        for name in sorted(set(names) - tensors.keys()):
            raise ShardError(f"{self.folder / file} has no tensor {name}: fetch it again")
        return {name: tensors[name] for name in names}

    def _load(self, file: str) -> dict[str, Tensor]:
        """The tensors of a file; mapped and not read, where the file's format allows (torch ≥ 1.6 wrote it)."""
        if self._loaded[0] != file:
            path = self.folder / file
            try:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            except Exception as error:  # torch.load raises nearly anything on a broken file
                reason = str(error).strip().split("\n")[0]
                raise ShardError(f"{path} cannot be read as tensors ({reason}): fetch it again") from error
            if not isinstance(state, dict):
                raise ShardError(f"{path} holds a {type(state).__name__}, not named tensors")
            self._loaded = (file, state)
        return self._loaded[1]


def open_checkpoint(folder: Path) -> ShardStore:
    """A checkpoint with safetensors, or else pickled weights. Raises ShardError or SpecError."""
    has_safetensors = any(folder.glob("*.safetensors")) or (folder / INDEX).is_file()
    pickled = (folder / BIN).is_file() or (folder / BIN_INDEX).is_file()
    return BinStore(folder) if pickled and not has_safetensors else ShardStore(folder)


def import_hf(family: str, model_name: str, save_dir: Path) -> Path:
    """Cut a checkpoint (a folder, or a hub id to download) by layer, in its own dtype. Returns the shard folder.

    The folder bears its name only when it is whole; one that is already whole is left as it is. Raises ConvertError,
    ShardError, SpecError, OSError.
    """
    local = Path(model_name).expanduser()
    target = save_dir / (local.resolve().name if local.is_dir() else model_name.replace("/", "_"))
    if _is_finished(target, family):
        log.warning("%s is a finished conversion already: nothing to do", target)
        return target
    refuse_filled(target, "it is not a finished conversion: move it away first")
    store = open_checkpoint(local if local.is_dir() else _download(model_name))
    _check_family(store, family)
    partial = target.with_name(f".{target.name}.partial")
    with Whole(partial, target):
        dtype = torch.float32
        for unit in range(store.spec.unit_count):
            tensors = store.read_unit(unit)
            if unit == 0:
                dtype = tensors["tokens.weight"].dtype
            write_unit(partial, store.spec, unit, tensors)
        write_index(partial, store.spec, dtype)
        copy_tokenizer(store.folder, partial)
        copy_generation_config(store.folder, partial)
        write_sums(partial)
    return target


def export_hf(
    family: str, ckpt: Path, target: Path, dtype: torch.dtype | None = None, max_file_bytes: int = MAX_FILE_BYTES
) -> Path:
    """Write a shard folder or training checkpoint as a plain HF checkpoint; `dtype` None keeps that of the weights.

    One file, or several of at most `max_file_bytes` and an index. Optimizer state stays behind. Raises as `import_hf`.
    """
    store = ShardStore(ckpt)
    _check_family(store, family)
    if missing := store.missing_units():
        raise ConvertError(
            f"{ckpt} holds only some of the layers ({store.spec.unit_name(missing[0])} is not there): give --ckpt-path "
            "the folders of all sites, or bring them together with converters/assemble.py"
        )
    refuse_filled(target, "it would be lost: move it away, or name another --save-path")
    partial = target.with_name(f".{target.name}.partial")
    with Whole(partial, target):
        shards: list[list[str]] = [[]]
        pending: dict[str, Tensor] = {}
        pending_bytes = total_bytes = 0
        found: torch.dtype | None = None
        for name, tensor in _tensors(store, dtype):
            found = found or tensor.dtype
            if pending and pending_bytes + tensor.nbytes > max_file_bytes:
                save_tensors(partial / f"{len(shards)}.part", pending)
                pending, pending_bytes = {}, 0
                shards.append([])
            pending[name] = tensor
            shards[-1].append(name)
            pending_bytes += tensor.nbytes
            total_bytes += tensor.nbytes
        save_tensors(partial / f"{len(shards)}.part", pending)
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        if len(shards) == 1:
            files = [SINGLE]
        else:
            where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
            write_json(partial / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": where})
        for i, file in enumerate(files, start=1):
            (partial / f"{i}.part").rename(partial / file)
        write_json(partial / "config.json", hf_config(store.spec, found or torch.float32))
        copy_tokenizer(ckpt, partial)
        copy_generation_config(ckpt, partial)
    return target


def _tensors(store: ShardStore, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    for unit in range(store.spec.unit_count):
        tensors = store.read_unit(unit)
        for name, hf_name in own_names(store.spec, unit).items():
            tensor = tensors[name]
            cast = tensor if dtype is None else tensor.to(dtype)
            if dtype == torch.float16 and cast.isinf().sum() > tensor.isinf().sum():
                raise ConvertError(f"{hf_name} has values beyond fp16's 65504: export with --bf16, or without either")
            yield hf_name, cast


class Whole:
    """A folder that gets its name when all is written, and goes away if anything fails."""

    def __init__(self, partial: Path, target: Path) -> None:
        self.partial, self.target = partial, target

    def __enter__(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)  # a conversion that was killed
        self.partial.mkdir(parents=True)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            if self.target.is_dir():
                self.target.rmdir()  # empty: it was checked
            self.partial.rename(self.target)
        else:
            shutil.rmtree(self.partial, ignore_errors=True)


def _is_finished(target: Path, family: str) -> bool:
    if not (target / INDEX).is_file():
        return False
    try:
        store = ShardStore(target)
    except (ShardError, SpecError):
        return False
    by_unit = store.files in (weight_map(store.spec, unit_file), weight_map(store.spec, old_unit_file))
    return store.spec.family == family and by_unit and not store.missing_units()


def refuse_filled(target: Path, why: str) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConvertError(f"{target} is there already, and {why}")


def _check_family(store: ShardStore, family: str) -> None:
    found = store.spec.family
    if found != family:
        raise ConvertError(f"{store.folder} is a {found} model, not {family}: use the {found} script")


def _download(model_name: str) -> Path:
    """Fetch a hub model's config, tokenizer and weights (pickled ones only where there are no others)."""
    if model_name.count("/") > 1 or model_name.startswith((".", "/", "~")):
        raise ConvertError(f"{model_name} is not a folder: name a folder that holds a model, or a hub id")
    from huggingface_hub import snapshot_download

    small = ["*.json", "*.txt", "*.jinja", "tokenizer.model"]
    try:
        # Some repositories keep the publisher's own format in a folder beside HF's.
        folder = Path(snapshot_download(model_name, allow_patterns=[*small, "*.safetensors"], ignore_patterns="*/*"))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(model_name, allow_patterns="pytorch_model*.bin", ignore_patterns="*/*")
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConvertError(f"{model_name} is no folder here and the hub does not give it: {reason}") from error
    return folder
