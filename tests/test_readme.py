"""The pages say what the code does: their table of flags is made from the flags, and what they name is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from farspan.runtime.flags.config import GROUPS

REPO = Path(__file__).resolve().parents[1]
FLAGS = REPO / "docs" / "flags.md"
PAGES = [*REPO.glob("docs/*.md"), *(REPO / name for name in ("README.md", "benchmarks/README.md"))]
ROOMS = "comm|modules|pipeline|runtime|converters|tests|benchmarks|example_scripts|docs"
STATED = r" \[([^\[]*)\]$"
"""A default that the help states in its own words, at its end."""

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))


def flag_table() -> str:
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
    return "\n".join(lines) + "\n"


def flags_page() -> str:
    """docs/flags.md with its table made anew. `python tests/test_readme.py` writes it."""
    return FLAGS.read_text().partition("| flag |")[0] + flag_table()


def test_the_flag_table_is_the_flags() -> None:
    assert FLAGS.read_text() == flags_page(), "python tests/test_readme.py writes it anew"


@pytest.mark.parametrize("page", [*PAGES, REPO / "ARCHITECTURE.md"], ids=lambda page: str(page.relative_to(REPO)))
def test_the_files_that_a_page_names_exist(page: Path) -> None:
    for name in re.findall(rf"`(?:python |bash )?((?:{ROOMS})/[\w./]*\w)[` ]", page.read_text()):
        assert (REPO / name).exists(), name


def test_the_readme_is_short() -> None:
    assert len((REPO / "README.md").read_text().splitlines()) <= 150


@each_page
def test_a_pages_lines_fit(page: Path) -> None:
    """A row of a table is one line, however long."""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        assert len(line) <= 120 or line.startswith("|"), f"line {number} has {len(line)} characters"


def prose(page: Path) -> Iterator[str]:
    """Its lines outside of code."""
    code = False
    for line in page.read_text().splitlines():
        code ^= line.startswith("```")
        if not code and not line.startswith("```"):
            yield line


def anchors(page: Path) -> set[str]:
    """What its headings are called in links, at GitHub."""
    headings = [line.lstrip("#").strip().lower() for line in prose(page) if line.startswith("#")]
    return {re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings}


@each_page
def test_a_pages_links_lead_somewhere_at_github_too(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", "\n".join(prose(page))):
        to = (page.parent / target).resolve() if target else page
        assert to.exists(), target
        assert not anchor or anchor in anchors(to), f"{target}#{anchor}"


@each_page
def test_a_list_or_a_table_begins_behind_an_empty_line(page: Path) -> None:
    """Else GitHub shows one, and mkdocs does not."""
    before = ""
    for line in prose(page):
        begins = re.match(r"(?:\*|\d+\.) |\|", line)
        assert not (begins and before and not re.match(r"\s*(?:(?:\*|\d+\.) |\|)|  ", before)), line
        before = line


if __name__ == "__main__":
    FLAGS.write_text(flags_page())
