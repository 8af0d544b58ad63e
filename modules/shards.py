"""Weights on disk, one unit at a time, under their Hugging Face names.

A shard folder is a Hugging Face checkpoint whose files happen to be cut by unit (embedding, layers, head):

    config.json  model.safetensors.index.json  model-00001-of-00030.safetensors  …  model-00030-of-00030.safetensors

The index says where each tensor lies, so any other safetensors checkpoint is read the same way; cut by layer, a site
needs no more on its disk than the layers it trains. Folders of before have embed.safetensors, block-00000.safetensors
… and head.safetensors instead, and are read alike.
"""

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .json_file import read_json, short
from .layers import hf_names, unit_shapes
from .spec import ModelSpec, hf_config

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
GENERATION = "generation_config.json"


class ShardError(RuntimeError):
    """Weights that are missing, broken or of another model. One line: what, where, what to do."""


class ShardStore:
    """A folder of weights, read by unit. Raises SpecError for its config and ShardError for everything else.

    Files that the index names may be absent (another site holds them) until one of their tensors is wanted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.spec = ModelSpec.from_folder(self.folder)
        self.files = self._locate()  # HF tensor name → file name
        self._check_names()

    def unit_files(self, unit: int) -> set[str]:
        """The names of the files that hold a unit's tensors: a tied head's are two."""
        return {self.files[name] for name in hf_names(self.spec, unit).values()}

    def has_unit(self, unit: int) -> bool:
        """Whether all files of the unit are here."""
        return all((self.folder / file).is_file() for file in self.unit_files(unit))

    def missing_units(self) -> list[int]:
        return [unit for unit in range(self.spec.unit_count) if not self.has_unit(unit)]

    def read_unit(self, unit: int) -> dict[str, Tensor]:
        """Our parameter name → CPU tensor in the dtype on disk. No other tensor of the files is read."""
        names, shapes = hf_names(self.spec, unit), unit_shapes(self.spec, unit)
        wanted: dict[str, list[str]] = defaultdict(list)
        for name, hf_name in names.items():
            wanted[self.files[hf_name]].append(name)
        tensors: dict[str, Tensor] = {}
        for file, inside in sorted(wanted.items()):
            if not (self.folder / file).is_file():
                raise ShardError(
                    f"{self.folder / file} is missing and {self.spec.unit_name(unit)} lies in it: "
                    "copy the file here, or give this layer to a process that has it"
                )
            found = self._fetch(file, [names[name] for name in inside])
            for name in inside:
                tensor, shape = found[names[name]], shapes[name]
                if tensor.shape != shape:
                    raise ShardError(
                        f"{self.folder / file}: {names[name]} is {list(tensor.shape)}, config.json makes it "
                        f"{list(shape)}: the two are not of one model"
                    )
                tensors[name] = tensor
        return {name: tensors[name] for name in names}

    def _locate(self) -> dict[str, str]:
        index = self.folder / INDEX
        if index.is_file():
            return dict(read_json(index, {"weight_map": {str: str}}, ShardError, "fetch it again")["weight_map"])
        if (self.folder / SINGLE).is_file():
            with opened(self.folder / SINGLE) as file:
                return dict.fromkeys(file.keys(), SINGLE)
        for named in (unit_file, old_unit_file):
            if any((self.folder / named(self.spec, unit)).is_file() for unit in range(self.spec.unit_count)):
                return weight_map(self.spec, named)  # layer files without their index: their names say enough
        if any(self.folder.glob("pytorch_model*.bin")):
            raise ShardError(
                f"{self.folder} holds pytorch_model.bin and no safetensors: "
                f"run converters/convert_from_hf_{self.spec.family}.py on it first"
            )
        raise ShardError(f"{self.folder} has a config.json but no *.safetensors: copy the weights there")

    def _fetch(self, file: str, names: list[str]) -> dict[str, Tensor]:
        """HF name → tensor, from one file that is there."""
        with opened(self.folder / file) as content:
            for name in sorted(set(names) - set(content.keys())):
                raise ShardError(f"{self.folder / file} has no tensor {name}: fetch or convert it again")
            return {name: content.get_tensor(name) for name in names}

    def _check_names(self) -> None:
        """Every tensor of the model lies somewhere, and there is no other.

        A stranger would be dropped in silence: a bias that the config denies, a layer too many.
        """
        facts = self.spec.facts
        known = {name for unit in range(self.spec.unit_count) for name in hf_names(self.spec, unit).values()}
        missing = sorted(known - self.files.keys())
        for name in missing:
            if name.removeprefix(facts.base_prefix) in self.files:
                raise ShardError(
                    f"{self.folder} was saved from the bare model ({name} lacks its {facts.base_prefix!r}): "
                    f"save it again from {facts.architecture}"
                )
        if missing:
            raise ShardError(f"{self.folder} has no tensor {missing[0]}: config.json and weights are not of one model")
        if self.spec.tied:
            known.add(f"{facts.modules['out']}.weight")  # some writers repeat the embedding here
        for name in sorted(self.files.keys() - known):
            if not name.endswith(facts.buffers):
                raise ShardError(
                    f"{self.folder}: {short(name)} in {short(self.files[name])} is no part of the model that "
                    "config.json describes: check that the two belong together"
                )


def unit_file(spec: ModelSpec, unit: int) -> str:
    """ "model-00018-of-00030.safetensors": named as tools that never read the index look for weights."""
    return f"model-{_place(spec, unit)}.safetensors"


def old_unit_file(spec: ModelSpec, unit: int) -> str:
    """What `unit_file` was in folders of before: "embed.safetensors", "block-00016.safetensors", "head.safetensors"."""
    return f"{spec.unit_name(unit)}.safetensors"


def state_file(spec: ModelSpec, unit: int) -> str:
    """Where the optimizer's state of a unit lies in a checkpoint: in a folder of its own, so that no tool takes moments
    for weights."""
    return f"optimizer/state-{_place(spec, unit)}.safetensors"


def old_state_file(spec: ModelSpec, unit: int) -> str:
    return f"{spec.unit_name(unit)}.optim.safetensors"


def _place(spec: ModelSpec, unit: int) -> str:
    return f"{unit + 1:05d}-of-{spec.unit_count:05d}"


def own_names(spec: ModelSpec, unit: int) -> dict[str, str]:
    """`hf_names` of the tensors that lie in the unit's own file: all, but for a tied head's weight."""
    return {
        name: hf_name
        for name, hf_name in hf_names(spec, unit).items()
        if not (spec.tied and unit == spec.head_unit and name == "out.weight")
    }


def weight_map(spec: ModelSpec, named: Callable[[ModelSpec, int], str] = unit_file) -> dict[str, str]:
    """HF tensor name → file name, for a folder cut by unit."""
    return {hf_name: named(spec, unit) for unit in range(spec.unit_count) for hf_name in own_names(spec, unit).values()}


def write_unit(folder: Path, spec: ModelSpec, unit: int, tensors: Mapping[str, Tensor]) -> Path:
    """Write a unit's tensors, given under our names, to its file, and wait for the disk. Raises ShardError.

    A tied head's weight may be among `tensors`; it is the embedding's to write.
    """
    names, shapes = own_names(spec, unit), unit_shapes(spec, unit)
    if names.keys() - tensors.keys() or tensors.keys() - shapes.keys():
        raise ShardError(
            f"{spec.unit_name(unit)} has parameters {sorted(names)}, not {sorted(tensors)}: nothing was written"
        )
    for name in names:
        if tensors[name].shape != shapes[name]:
            raise ShardError(
                f"{spec.unit_name(unit)}: {name} is {list(tensors[name].shape)}, not {list(shapes[name])}: "
                "nothing was written"
            )
    path = Path(folder) / unit_file(spec, unit)
    save_tensors(path, {hf_name: tensors[name] for name, hf_name in names.items()})
    return path


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file that is whole once it bears its name, also after a power cut. Raises `ShardError`."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # safetensors leaves 0600, which the rest of a team could not read
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, metadata={"format": "pt"})
        partial.chmod(mode)
        _to_disk(partial)
        os.replace(partial, path)
    except (SafetensorError, OSError) as error:
        raise ShardError(f"{path} cannot be written: {error}") from error


def write_index(folder: Path, spec: ModelSpec, dtype: torch.dtype) -> None:
    """Write the index of all units and config.json. Needs no tensor, so any process can do it."""
    elements = sum(
        shape.numel()
        for unit in range(spec.unit_count)
        for name, shape in unit_shapes(spec, unit).items()
        if name in own_names(spec, unit)
    )
    index = {"metadata": {"total_size": elements * dtype.itemsize}, "weight_map": weight_map(spec)}
    write_json(Path(folder) / INDEX, index)
    write_json(Path(folder) / "config.json", hf_config(spec, dtype))


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _to_disk(path)


def copy_tokenizer(src: Path, dst: Path) -> None:
    """Copy the tokenizer's files, those that are there."""
    for name in TOKENIZER_FILES:
        _copy(src, dst, name)


def copy_generation_config(src: Path, dst: Path) -> None:
    """Copy what a model's folder says of how it generates, if it does. A tokenizer's folder may be another model's."""
    _copy(src, dst, GENERATION)


def _copy(src: Path, dst: Path, name: str) -> None:
    if (Path(src) / name).is_file():
        shutil.copyfile(Path(src) / name, Path(dst) / name)


def opened(path: Path) -> safe_open:
    """A safetensors file. Raises `ShardError`."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ShardError(f"{path} cannot be read as safetensors ({error}): fetch or convert it again") from error


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
