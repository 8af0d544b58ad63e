"""A hook of mkdocs: pages that lie beside docs/ belong to the site, under links that hold at GitHub too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPO = Path(__file__).resolve().parents[1]
OUTSIDE = ("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")


def on_files(files: Files, config: Any) -> Files:  # noqa: ANN401 - mkdocs' own
    for name in OUTSIDE:
        files.append(File.generated(config, name, abs_src_path=str(REPO / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:  # noqa: ANN401 - mkdocs' own
    """From docs/ they are `../NAME`; from beside docs/ its pages are `docs/NAME` or `../docs/NAME`.

    Within code, GitHub needs a bar escaped in a table, and mkdocs shows the backslash.
    """
    markdown = re.sub(r"`[^`\n]*`", lambda code: code[0].replace(r"\|", "|"), markdown)
    if page.file.src_uri in OUTSIDE:
        return re.sub(r"\]\(((?:\.\./)?)docs/", r"](\1", markdown)
    return re.sub(rf"\]\(\.\./({'|'.join(map(re.escape, OUTSIDE))})", r"](\1", markdown)
