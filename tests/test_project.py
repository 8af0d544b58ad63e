"""What says the same in several files of the project says the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())


def test_the_versions_of_python_that_are_promised_are_tested() -> None:
    workflow = yaml.safe_load((REPO / ".github" / "workflows" / "tests.yml").read_text())
    tests = workflow["jobs"]["tests"]
    promised = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["project"]["classifiers"]))
    assert tests["strategy"]["matrix"]["python"] == promised
    assert PROJECT["project"]["requires-python"] == f">={promised[0]}"
    assert [step["run"].split(" #")[0] for step in tests["steps"] if "run" in step] == ["bash tests/run.sh"]


def test_the_licence_is_there_in_full() -> None:
    assert PROJECT["project"]["license"] == "Apache-2.0"
    for name in PROJECT["project"]["license-files"]:
        text = (REPO / name).read_text()
        assert "Apache License\n                           Version 2.0, January 2004" in text
        for part in ("1. Definitions.", "9. Accepting Warranty", "END OF TERMS AND CONDITIONS"):
            assert part in text


def test_its_types_can_be_used_by_others() -> None:
    assert PROJECT["tool"]["setuptools"]["package-data"]["farspan"] == ["py.typed"]
    assert (REPO / "py.typed").is_file()


def test_all_types_are_checked_strictly_and_in_one_place() -> None:
    assert PROJECT["tool"]["mypy"]["strict"] is True
    loosened = {"disallow_", "check_untyped", "disable_error_code", "ignore_errors"}
    options = [PROJECT["tool"]["mypy"], *PROJECT["tool"]["mypy"]["overrides"]]
    assert not [key for table in options for key in table if any(key.startswith(start) for start in loosened)]
    run = (REPO / "tests/run.sh").read_text()
    assert "bash tests/types.sh" in run
    assert "mypy" not in run


def test_hooks_fetch_nothing() -> None:
    config = yaml.safe_load((REPO / ".pre-commit-config.yaml").read_text())
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {hook["language"] for hook in hooks} == {"system"}
    for tool in ("ruff format", "ruff check", "tests/types.sh"):
        assert sum(tool in hook["entry"] for hook in hooks) == 1, tool


def test_the_changelog_has_a_place_for_what_is_new() -> None:
    headings = re.findall(r"^(##+) (.+)$", (REPO / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == ("##", "[Unreleased]")
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert {name for level, name in headings if level == "###"} <= kinds


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_what_these_pages_name_is_there(name: str) -> None:
    text = (REPO / name).read_text()
    assert name in (REPO / "README.md").read_text()
    rooms = "comm|modules|pipeline|runtime|converters|tests|example_scripts"
    for path in re.findall(rf"`(?:python |bash )?((?:{rooms})/[\w./]*\w)", text) + re.findall(r"\]\(([\w./]+)\)", text):
        assert (REPO / path).exists(), path
    assert max(map(len, text.splitlines())) <= 120
