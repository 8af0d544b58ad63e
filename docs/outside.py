"""A hook of mkdocs: pages that lie beside docs/ belong to the site, under links that hold at GitHub too.

And each room has a page of what its files hold, made from their docstrings.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPO = Path(__file__).resolve().parents[1]
OUTSIDE = ("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")
ROOMS = ("comm", "modules", "pipeline", "runtime", "converters")


def on_files(files: Files, config: Any) -> Files:  # noqa: ANN401 - mkdocs' own
    for name in OUTSIDE:
        files.append(File.generated(config, name, abs_src_path=str(REPO / name)))
    for room in ROOMS:
        files.append(File.generated(config, f"api/{room}.md", content=reference(room)))
    return files


def reference(room: str) -> str:
    names = [path.relative_to(REPO) for path in sorted((REPO / room).rglob("*.py"))]
    parts = [f"## {name}\n\n::: {'.'.join(name.with_suffix('').parts)}" for name in names]
    return "\n\n".join([f"# {room}", *parts]) + "\n"


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:  # noqa: ANN401 - mkdocs' own
    """From docs/ they are `../NAME`; from beside docs/ its pages are `docs/NAME` or `../docs/NAME`.

    Within code, GitHub needs a bar escaped in a table, and mkdocs shows the backslash.
    """
    markdown = re.sub(r"`[^`\n]*`", lambda code: code[0].replace(r"\|", "|"), markdown)
    if page.file.src_uri in OUTSIDE:
        return re.sub(r"\]\(((?:\.\./)?)docs/", r"](\1", markdown)
    return re.sub(rf"\]\(\.\./({'|'.join(map(re.escape, OUTSIDE))})", r"](\1", markdown)
