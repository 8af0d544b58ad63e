"""Real data where `FARSPAN_DATA` names some, and what stands in for it where it does not, so that no test is skipped.

Each test that looks at the data, by whatever fixture, bears the mark `data`: `.ci/run` runs these without it as well.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
from pretrained import Pretrained

OWN = Path(__file__).parent / "pretrained"


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "real_data" in getattr(item, "fixturenames", ()):
            item.add_marker("data")


@pytest.fixture(scope="session")
def real_data() -> Path | None:
    """The folder of `FARSPAN_DATA`, or None where it is not set."""
    told = os.environ.get("FARSPAN_DATA")
    if told is not None and not Path(told).is_dir():
        pytest.fail(f"FARSPAN_DATA is {told!r}, and no such folder is there")
    return Path(told) if told is not None else None


@pytest.fixture(scope="session")
def pretrained(real_data: Path | None) -> Pretrained:
    """stories260K, or the one of our own."""
    if real_data is None:
        return Pretrained(OWN, (OWN / "greedy.txt").read_text(encoding="utf-8"))
    readme = (real_data / "README.md").read_text(encoding="utf-8")
    story = readme[readme.index('"Once upon a time') + 1 :].split('"')[0]
    return Pretrained(real_data / "stories260K", story)


@pytest.fixture(scope="session")
def problems(real_data: Path | None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with `question` and `answer` a line: GSM8K, or sums."""
    if real_data is not None:
        return real_data / "gsm8k" / "train.jsonl"
    path, rng = tmp_path_factory.mktemp("problems") / "sums.jsonl", random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(200):
            a, b = rng.randint(1, 99), rng.randint(1, 99)
            row = {
                "question": f"A list has {a} elements, and {b} more are appended. How many elements does it have?",
                "answer": f"It had {a}. With {b} more, it has {a} + {b} = {a + b} elements.\n#### {a + b}",
            }
            file.write(json.dumps(row) + "\n")
    return path
