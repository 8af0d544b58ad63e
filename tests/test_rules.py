"""The house rules: who may import whom and under which name, and what no room does."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest

REPO = Path(__file__).resolve().parents[1]

# Room → the other rooms that it may import.
ROOMS: dict[str, tuple[str, ...]] = {
    "comm": (),
    "modules": (),
    "pipeline": ("comm", "modules"),
    "runtime": ("comm", "modules", "pipeline"),
    "converters": ("modules",),
}
# Room within a room → the others there that it may import, from the ground up; of the files beside them, BASES alone.
INNER_ROOMS: dict[str, tuple[str, ...]] = {
    "comm/lanes": (),
    "comm/codecs": (),
    "comm/groups": ("lanes",),
    "comm/meeting": ("lanes", "groups"),
    "modules/families": (),
    "runtime/flags": (),
    "runtime/data": ("flags",),
    "runtime/optim": ("flags",),
    "runtime/checkpoints": ("flags", "data", "optim"),
    "runtime/observe": ("flags",),
    "runtime/training": ("flags", "data", "optim", "checkpoints", "observe"),
    "runtime/setup": ("flags", "data", "optim", "checkpoints", "observe", "training"),
    "runtime/preflight": ("flags", "data", "optim", "checkpoints", "observe", "setup"),
}
BASES = {"comm": ("errors", "topology")}
# Inner room → what it does without when it is imported: worker processes load it, and start in a moment.
WITHOUT = {"runtime/flags": ("torch",), "runtime/data": ("torch",)}
# Room → what it may import from outside, beside the standard library; the two rooms that are not here may import all.
PACKAGES: dict[str, tuple[str, ...]] = {
    "comm": ("torch", "psutil", "cupy"),
    "modules": ("torch", "safetensors", "transformers", "numpy", "tokenizers", "sentencepiece", "google"),
    "pipeline": ("torch",),
}
# Room → the only files outside it, but for tests and benchmarks, that may import it.
ENTRY_SCRIPTS = {
    "runtime": ("dist_train.py", "dist_clm_train.py", "preprocess.py", "__main__.py"),
    "converters": ("converters/convert_*.py", "converters/assemble.py", "__main__.py"),
}
# Imported where they are used, never because a room's file was imported.
HEAVY = ("wandb", "transformers", "sentencepiece", "datasets", "cupy", "bitsandbytes", "tensorboard", "matplotlib")
# Lines that a function of a room may have, and those that may have less.
LONGEST, SHORTER = 80, {("runtime/train.py", "train"): 60}
# Named by nobody here: a library calls them.
CALLED_BY_OTHERS = {"emit", "has_extended_api"}


class Import(NamedTuple):
    """One imported thing: its full dotted name, whether that is how it was written, and whether a function does it."""

    line: int
    name: str
    relative: bool
    lazy: bool


def imports_of(path: PurePosixPath, tree: ast.AST, lazy: bool = False) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, False, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ["farspan", *path.parent.parts]
            base = package[: len(package) + 1 - node.level] if node.level else []
            if node.level > len(package):
                base = ["(above farspan)"]
            base += node.module.split(".") if node.module else []
            yield from (Import(node.lineno, ".".join([*base, a.name]), node.level > 0, lazy) for a in node.names)
        else:
            typing_only = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports_of(path, node, lazy or function or typing_only)


def is_one_of(path: PurePosixPath, patterns: Iterable[str]) -> bool:
    """From the top of the checkout: runtime/data/preprocess.py is not preprocess.py."""
    return any(fnmatchcase(path.as_posix(), pattern) for pattern in patterns)


def is_entry_script(path: PurePosixPath) -> bool:
    return any(is_one_of(path, patterns) for patterns in ENTRY_SCRIPTS.values())


def import_faults(path: PurePosixPath, tree: ast.AST) -> Iterator[tuple[int, str]]:
    room = path.parts[0] if path.parts[0] in ROOMS and not is_entry_script(path) else None
    for line, name, relative, lazy in imports_of(path, tree):
        first, second = [*name.split("."), ""][:2]
        inside = first == "farspan"
        if first in ROOMS:
            yield line, f"{name} by its folder's name: the same file under two names is two modules"
        if room is None:
            free = path.parts[0] in ("tests", "benchmarks")
            if inside and not free and not is_one_of(path, ENTRY_SCRIPTS.get(second, ("*",))):
                yield line, f"only its entry scripts may import {second}"
            continue
        if inside and not relative:
            yield line, f"{name}: between rooms, imports are relative"
        if inside and second in ROOMS and second != room and second not in ROOMS[room]:
            yield line, f"{room} does not know {second}"
        if relative and second not in ROOMS and name != "farspan.__version__":
            yield line, f"{name} is in no room"
        outside = not relative and not inside and first not in ROOMS and first not in sys.stdlib_module_names
        if outside and first not in PACKAGES.get(room, (first,)):
            yield line, f"{room} does not know {first}"
        if first in HEAVY and not lazy:
            yield line, f"{first} is heavy or optional: import it in the function that uses it"


def inner_faults(path: PurePosixPath, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """What a file of an inner room does against `INNER_ROOMS`."""
    if len(path.parts) < 3 or (inner := "/".join(path.parts[:2])) not in INNER_ROOMS:
        return
    room, own = path.parts[:2]
    may = (own, *INNER_ROOMS[inner], *BASES.get(room, ()))
    for line, name, relative, lazy in imports_of(path, tree):
        _, second, third, *_ = [*name.split("."), "", ""]
        if relative and second == room and third not in may:
            yield line, f"{inner} does not know {room}/{third}"
        if not relative and not lazy and name.split(".")[0] in WITHOUT.get(inner, ()):
            yield line, f"{inner} does without {name.split('.')[0]}"


def habit_faults(path: PurePosixPath, tree: ast.AST) -> Iterator[tuple[int, str]]:
    if is_entry_script(path):
        return
    may_print = path.parts[0] in ("benchmarks", "example_scripts")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and path.parts[0] in ROOMS:
            most = SHORTER.get((path.as_posix(), node.name), LONGEST)
            if (node.end_lineno or 0) - node.lineno >= most:
                yield node.lineno, f"{node.name} has more than {most} lines"
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "print" and not may_print:
            yield node.lineno, "print"
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                yield node.lineno, "a bare except"
            if all(isinstance(s, ast.Pass) or ast.unparse(s) == "..." for s in node.body):
                yield node.lineno, "an error is swallowed"


def defined_and_named(tree: ast.AST) -> tuple[set[str], set[str]]:
    """The functions and classes that a file defines, and what it names in an expression."""
    defined, named = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute):
            named.add(node.id if isinstance(node, ast.Name) else node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            named.add(node.value)
    return defined, named


def faults(path: str, source: str) -> list[str]:
    """What `source` does against the rules, were it the file `path` of the repository."""
    where, tree = PurePosixPath(path), ast.parse(source)
    found = [*import_faults(where, tree), *inner_faults(where, tree), *habit_faults(where, tree)]
    if where.name == "__init__.py" and where.parent.parts:
        found.append((1, f"a room with an __init__.py hides every other package called {where.parent.name}"))
    return [f"{path}:{line}: {what}" for line, what in found]


def sources() -> list[Path]:
    folders = [*ROOMS, "tests", "benchmarks", "example_scripts"]
    return sorted([*REPO.glob("*.py"), *(path for folder in folders for path in (REPO / folder).rglob("*.py"))])


def test_every_file_keeps_the_rules() -> None:
    files = [path.relative_to(REPO).as_posix() for path in sources()]
    assert {path.split("/")[0] for path in files} >= {*ROOMS, "tests", "dist_train.py", "__init__.py"}
    assert [fault for path in files for fault in faults(path, (REPO / path).read_text(encoding="utf-8"))] == []


def test_nothing_in_a_room_serves_tests_alone() -> None:
    """What tests need lies in tests/support."""
    defined, named = set(), set(CALLED_BY_OTHERS)
    for path in sources():
        place = path.relative_to(REPO).parts[0]
        here = defined_and_named(ast.parse(path.read_text(encoding="utf-8")))
        defined |= here[0] if place in ROOMS else set()
        named |= here[1] if place != "tests" else set()
    assert {name for name in defined - named if not name.startswith("__")} == set()


def test_only_the_fixture_and_the_benchmark_ask_for_data() -> None:
    """So every test that depends on it is known, and `.ci/run` can run it without."""
    asking = {path.relative_to(REPO).as_posix() for path in sources() if "FARSPAN_" + "DATA" in path.read_text("utf-8")}
    assert asking == {"tests/conftest.py", "tests/pretrained/make.py", "benchmarks/parity.py", "tests/test_ci.py"}


def test_what_is_tested_is_this_checkout() -> None:
    import farspan

    assert farspan.__file__ is not None
    assert Path(farspan.__file__).resolve().parent == REPO


@pytest.mark.parametrize(
    ("path", "source", "what"),
    [
        ("comm/x.py", "from ..modules.spec import ModelSpec", "comm does not know modules"),
        ("comm/x.py", "from .. import pipeline", "comm does not know pipeline"),
        ("comm/x.py", "import numpy", "comm does not know numpy"),
        ("comm/x.py", "def f():\n    from numpy.random import rand", "comm does not know numpy"),
        ("modules/x.py", "from ..comm.link import Sender", "modules does not know comm"),
        ("modules/x.py", "import psutil", "modules does not know psutil"),
        ("pipeline/x.py", "from ..runtime.config import Config", "pipeline does not know runtime"),
        ("pipeline/x.py", "import safetensors.torch", "pipeline does not know safetensors"),
        ("runtime/x.py", "from ..converters import hf", "runtime does not know converters"),
        ("converters/hf.py", "from ..comm import codec", "converters does not know comm"),
        ("converters/hf.py", "def f():\n    from ..runtime import train", "converters does not know runtime"),
        ("example_scripts/x.py", "from farspan.runtime.train import main", "only its entry scripts may import runtime"),
        ("setup.py", "import farspan.converters.hf", "only its entry scripts may import converters"),
        ("dist_train.py", "from farspan import converters", "only its entry scripts may import converters"),
        ("converters/convert_x.py", "import farspan.runtime", "only its entry scripts may import runtime"),
        ("runtime/data/preprocess.py", "from ...converters import hf", "runtime does not know converters"),
        ("runtime/__main__.py", "def f():\n    print('x')", "print"),
        ("comm/x.py", "import comm", "by its folder's name"),
        ("comm/lanes/x.py", "from ..groups.group import Group", "comm/lanes does not know comm/groups"),
        ("comm/groups/x.py", "from ..link import Sender", "comm/groups does not know comm/link"),
        ("comm/groups/x.py", "from ...pipeline.stage import Stage", "comm does not know pipeline"),
        ("runtime/data/x.py", "from ..optim.optimizer import Optimizer", "runtime/data does not know runtime/optim"),
        ("runtime/observe/x.py", "def f():\n    from .. import train", "runtime/observe does not know runtime/train"),
        ("runtime/data/x.py", "from torch import Tensor", "runtime/data does without torch"),
        ("tests/comm/test_x.py", "from comm.link import Sender", "by its folder's name"),
        ("runtime/x.py", "import farspan.comm", "imports are relative"),
        ("runtime/x.py", "from farspan.comm.link import Sender", "imports are relative"),
        ("runtime/x.py", "from .. import dist_train", "farspan.dist_train is in no room"),
        ("runtime/x.py", "from ... import other", "is in no room"),
        ("comm/__init__.py", "", "hides every other package called comm"),
        ("runtime/x.py", "def f():\n    print('x')", "print"),
        ("runtime/x.py", "def f():" + "\n    x()" * 80, "f has more than 80 lines"),
        ("runtime/train.py", "def train():" + "\n    x()" * 60, "train has more than 60 lines"),
        ("tests/test_x.py", "try:\n    f()\nexcept:\n    raise", "a bare except"),
        ("runtime/x.py", "try:\n    f()\nexcept OSError:\n    pass", "an error is swallowed"),
        ("runtime/x.py", "try:\n    f()\nexcept OSError:\n    ...", "an error is swallowed"),
        ("runtime/x.py", "import wandb", "wandb is heavy or optional"),
        ("runtime/x.py", "if True:\n    from datasets.load import load", "datasets is heavy or optional"),
        ("modules/x.py", "class X:\n    import transformers", "transformers is heavy or optional"),
        ("comm/x.py", "try:\n    import cupy\nexcept ImportError:\n    raise", "cupy is heavy or optional"),
    ],
)
def test_each_rule_can_fail(path: str, source: str, what: str) -> None:
    (fault,) = faults(path, source)
    assert what in fault


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("comm/x.py", "import torch\nimport psutil\nfrom .errors import WireError\nfrom . import codec"),
        ("comm/x.py", "def f():\n    import cupy"),
        ("comm/meeting/x.py", "from ..errors import WireError\nfrom ..lanes.lane import Lane\nfrom .store import Key"),
        ("runtime/data/x.py", "from ..flags.config import Config\ndef f():\n    import torch"),
        ("modules/x.py", "if TYPE_CHECKING:\n    from transformers import PreTrainedConfig"),
        ("runtime/x.py", "from .. import __version__, comm\nimport tqdm\ndef f():\n    import wandb"),
        ("runtime/x.py", "try:\n    f()\nexcept OSError as error:\n    raise ValueError from error"),
        ("dist_train.py", "from farspan.runtime.train import main\nprint(main)"),
        ("converters/convert_x.py", "from farspan.converters.hf import main"),
        (
            "__main__.py",
            "from farspan.runtime.cli import main\nfrom farspan.converters.command import main_to\nprint(1)",
        ),
        ("benchmarks/x.py", "import farspan.runtime.train\nprint(1)"),
        ("__init__.py", "__version__ = '1'"),
    ],
)
def test_what_keeps_the_rules_passes(path: str, source: str) -> None:
    assert faults(path, source) == []


def test_every_folder_of_a_room_is_known() -> None:
    """And none that is known is gone."""
    folders = {p.parent.relative_to(REPO).as_posix() for p in sources() if p.relative_to(REPO).parts[0] in ROOMS}
    assert {"/".join(folder.split("/")[:2]) for folder in folders} == {*ROOMS, *INNER_ROOMS}


def test_inner_rooms_have_an_order() -> None:
    """The table lists them from the ground up, so no circle is possible."""
    for number, (inner, may) in enumerate(INNER_ROOMS.items()):
        room = inner.split("/")[0]
        assert {f"{room}/{other}" for other in may} <= set([*INNER_ROOMS][:number]), inner


def test_the_data_rooms_load_without_torch() -> None:
    files = [path.relative_to(REPO) for folder in WITHOUT for path in sorted((REPO / folder).rglob("*.py"))]
    names = [".".join(["farspan", *file.with_suffix("").parts]) for file in files]
    loads = f"for name in {names}: importlib.import_module(name)"
    code = f"import importlib, sys\n{loads}\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
