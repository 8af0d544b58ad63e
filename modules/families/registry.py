"""All families: each file of this folder that holds a `FAMILY`. A further family is a further file."""

from importlib import import_module
from pathlib import Path

from .family import Family


def _found() -> dict[str, Family]:
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.py"))
    modules = (import_module(f".{name}", __package__) for name in names if name not in ("family", "registry"))
    return {module.FAMILY.name: module.FAMILY for module in modules}


FAMILIES = _found()
"""By their names here, which `--model-type` takes."""
