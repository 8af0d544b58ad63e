"""`farspan`: one command for what the scripts do, whose help is there before torch is."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from farspan import __main__ as command
from farspan.__main__ import main
from farspan.modules.families.registry import FAMILIES

REPO = Path(__file__).resolve().parents[1]


def test_the_installed_command_is_this_one() -> None:
    scripts = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["farspan"].partition(":")
    assert getattr(import_module(module), name) is command.main


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["train", "--help"],
        ["check", "--help"],
        ["preprocess", "--help"],
        ["convert", "--help"],
        ["convert", "from-hf", "gptj", "--help"],
        ["convert", "to-hf", "llama", "--help"],
    ],
    ids=" ".join,
)
def test_help_imports_no_torch(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was imported')")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    helped = subprocess.run(
        [sys.executable, "-m", "farspan", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (helped.returncode, helped.stderr) == (0, "")
    assert helped.stdout.startswith("usage: ")


def test_its_help_names_every_command_and_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    for word in command.COMMANDS:
        assert f"farspan {word} " in told
    for family in FAMILIES:
        assert family in told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "trian is none of its words: is it train?"),
        (["42"], "42 is none of its words: there are train, check, preprocess, convert"),
        (["convert", "gptj-6b"], "is it gptj?"),
        (["convert", "from-hf", "gpt-neox", "--help"], "is it gptneox?"),
        (["convert", "form-hf", "gptj"], "is it from-hf?"),
        (["convert", "to-hf"], "usage: farspan convert"),
        ([], "usage: farspan COMMAND"),
    ],
    ids=" ".join,
)
def test_what_is_no_command(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert said in told.err


@pytest.mark.parametrize(("word", "flags"), [("train", ["--lr", "1"]), ("check", ["--check", "--lr", "1"])])
def test_train_and_check_are_dist_train(word: str, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr("farspan.runtime.cli.main", lambda argv: given.append(argv) or 7)
    assert main([word, "--lr", "1"]) == 7
    assert given == [flags]


def test_preprocess_and_convert_are_the_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preprocess", "--output", str(tmp_path / "tokens")]) == 2
    assert "--tokenizer-name is needed" in capsys.readouterr().err
    gone = str(tmp_path / "gone")
    assert main(["convert", "from-hf", "gptj", "--model-name", gone, "--save-dir", str(tmp_path)]) == 1
    assert main(["convert", "to-hf", "llama", "--ckpt-path", gone, "--save-path", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count(f"error: {gone} is not a folder") == 2


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"farspan {command.__version__}\n"
