"""README.md says what the code does: its flag table is made from the flags themselves."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from farspan.runtime.config import GROUPS

REPO = Path(__file__).resolve().parents[1]
STATED = r" \[([^\[]*)\]$"
"""A default that the help states in its own words, at its end."""


def flag_table() -> str:
    """The README's table; `python tests/test_readme.py` prints it anew."""
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    for group in GROUPS:
        lines.append(f"| **{group.__doc__}** | | |")
        for f in fields(group):
            text = f.metadata["help"].replace("|", "\\|")
            stated = re.search(STATED, text)
            default = (
                stated.group(1) if stated else str(f.default).lower() if isinstance(f.default, bool) else f.default
            )
            choices = f" {{{', '.join(f.metadata['choices'])}}}" if f.metadata["choices"] else ""
            lines.append(f"| `--{f.name.replace('_', '-')}`{choices} | {default} | {re.sub(STATED, '', text)} |")
    return "\n".join(lines)


def test_the_flag_table_is_the_flags() -> None:
    assert flag_table() in (REPO / "README.md").read_text()


def test_the_files_that_the_readme_names_exist() -> None:
    text = (REPO / "README.md").read_text() + (REPO / "ARCHITECTURE.md").read_text()
    named = re.findall(
        r"`((?:comm|modules|pipeline|runtime|converters|tests|benchmarks|example_scripts)/[\w./]*\w)`", text
    )
    assert len(named) > 10
    for name in named:
        assert (REPO / name).exists(), name


if __name__ == "__main__":
    import sys

    sys.stdout.write(flag_table() + "\n")
