"""What the converter scripts and `farspan convert` call. Flags are read before torch is imported."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..modules.families.registry import FAMILIES
from ..modules.urls import url_fault


def main_from(family: str, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """`convert_from_hf_*.py`. Returns the exit status."""
    what = f"Cut a {FAMILIES[family].architecture} checkpoint by layer."
    parser = argparse.ArgumentParser(prog=prog, description=what)
    parser.add_argument("--model-name", required=True, help="a folder with an HF checkpoint, or a hub id")
    parser.add_argument("--save-dir", required=True, help="the shard folder is made in here")
    args = _parse(parser, argv)
    from .hf import import_hf

    return _report(lambda: import_hf(family, args.model_name, Path(args.save_dir)))


def main_to(family: str, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """`convert_to_hf_*.py`. Returns the exit status."""
    what = f"Write a shard folder as one {FAMILIES[family].architecture}."
    parser = argparse.ArgumentParser(prog=prog, description=what)
    parser.add_argument(
        "--ckpt-path", required=True, nargs="+", help="a shard folder or a training checkpoint; or those of all sites"
    )
    parser.add_argument("--save-path", required=True, help="the new folder")
    parser.add_argument("--overwrite", action="store_true", help="replace --save-path where it is there already")
    parser.add_argument("--config-name", help="accepted and not needed: a checkpoint has its config.json")
    for flag in ("--n-stages", "--n-layer-per-stage"):
        parser.add_argument(flag, type=int, help="accepted and not needed: a checkpoint is cut by layer")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--fp16", dest="dtype", action="store_const", const="float16")
    precision.add_argument("--bf16", dest="dtype", action="store_const", const="bfloat16")
    args = _parse(parser, argv)
    import torch

    dtype = getattr(torch, args.dtype) if args.dtype else None
    from .sites import export_sites

    return _report(lambda: export_sites(family, args.ckpt_path, Path(Path(args.save_path)), dtype, args.overwrite))


def main_assemble(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """`assemble.py`. Returns the exit status."""
    parser = argparse.ArgumentParser(prog=prog, description="Make one folder of those that several sites hold.")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a site's checkpoint_N: a folder, or host:path")
    parser.add_argument("--save-path", required=True, help="the new folder")
    parser.add_argument("--model-only", action="store_true", help="leave the optimizer's state behind")
    args = _parse(parser, argv)
    from .sites import assemble

    return _report(lambda: assemble(args.folders, Path(Path(args.save_path)), args.model_only))


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, all of whose words are paths on this machine."""
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        for word in value if isinstance(value, list) else [value]:
            if fault := url_fault(name if name == "folders" else f"--{name.replace('_', '-')}", word):
                parser.error(fault)
    return args


def _report(convert: Callable[[], Path]) -> int:
    """Run a conversion; its folder goes to stdout, what a person must mend to stderr as one line."""
    from ..modules.shards import ShardError
    from ..modules.spec import SpecError
    from .hf import ConvertError

    try:
        folder = convert()
    except (ConvertError, ShardError, SpecError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{folder}\n")
    return 0
