"""Files as they are found: compressed, broken, strange, changed under the run; tables; and tokens made before."""

from __future__ import annotations

import gzip
import json
import logging
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from chars import mixture, text_of, write
from farspan.runtime.data.open_tasks import open_tasks
from farspan.runtime.data.preprocess import main as preprocess
from farspan.runtime.data.sources import lines
from farspan.runtime.data.sources.lines import LineFile
from farspan.runtime.data.task_spec import DataError
from farspan.runtime.data.tokenizer import Vocabulary
from farspan.runtime.flags.config import Config
from tiny import make_task, make_tokenizer


def all_of(file: LineFile) -> list[bytes]:
    return [line.strip() for line in file.read(np.arange(file.rows))]


@pytest.mark.parametrize("chunk", [1, 3, 7, 1 << 24])
def test_the_index_finds_every_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """BOM, CRLF, blank lines and spaces before, between and after, no last line break; whatever the chunks."""
    monkeypatch.setattr(lines, "CHUNK", chunk)
    content = b'\xef\xbb\xbf\r\n{"a": 1}\r\n\n \t\n  {"b": 2}\n\n\n{"c":\t3}  \r\n   \n{"d": 4}'
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    file = LineFile(path, tmp_path / "cache")
    assert all_of(file) == [b'{"a": 1}', b'{"b": 2}', b'{"c":\t3}', b'{"d": 4}']
    assert [file.where(i) for i in range(4)] == [f"{path}:{n}" for n in (2, 5, 8, 10)]
    path.write_bytes(content + b"\n\n ")
    assert all_of(LineFile(path, tmp_path / "cache")) == all_of(file)


def test_the_index_is_made_once_and_anew_when_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = lines._write_index
    monkeypatch.setattr(lines, "_write_index", lambda *words: (made.append(1), real(*words)))
    path, cache = write(tmp_path / "a.jsonl", ["one", "two"]), tmp_path / "cache"
    for _ in range(3):
        assert LineFile(path, cache).rows == 2
    assert len(made) == 1
    write(path, ["one", "two", "six"])
    assert LineFile(path, cache).rows == 3
    stat = path.stat()
    write(path, ["one", "tw", "four"])  # the same size at another time
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert json.loads(all_of(LineFile(path, cache))[2]) == {"text": "four"}
    assert len(made) == 3
    assert len(list(cache.iterdir())) == 2  # an index and its seal: what belonged to the file's older states is gone


@pytest.mark.parametrize("kind", ["gz", "zst", "zst without size", "two frames"])
def test_compressed_files_read_like_plain_ones(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    plain = write(tmp_path / "a.jsonl", [f"text {i}" for i in range(5000)])
    content = plain.read_bytes()
    path = tmp_path / f"b.jsonl.{'gz' if kind == 'gz' else 'zst'}"
    half = len(content) // 2
    sizeless = zstandard.ZstdCompressor(write_content_size=False)
    path.write_bytes(
        {
            "gz": gzip.compress(content[:half]) + gzip.compress(content[half:]),
            "zst": zstandard.compress(content),
            "zst without size": sizeless.compress(content),
            "two frames": zstandard.compress(content[:half]) + zstandard.compress(content[half:]),
        }[kind]
    )
    want = mixture(tmp_path, str(plain), 30).draw(50).tokens
    assert (mixture(tmp_path, str(path), 30).draw(50).tokens == want).all()
    assert f"{path.name} takes 0.1 MB in" in caplog.text
    caplog.clear()
    mixture(tmp_path, str(path), 30)
    assert caplog.text == ""  # the second time it is there


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_that_is_cut_off_or_broken(tmp_path: Path, suffix: str) -> None:
    content = write(tmp_path / "a.jsonl", [f"text {i * 7919 % 1000}" for i in range(3000)]).read_bytes()
    zstd = zstandard.ZstdCompressor(write_checksum=True)  # as the command zstd does
    packed = gzip.compress(content) if suffix == ".gz" else zstd.compress(content)
    path = tmp_path / f"b.jsonl{suffix}"
    for harmed, reason in (
        (packed[: len(packed) // 2], "is cut off"),
        (packed[:-1], "is cut off"),
        (packed[:100] + bytes(50) + packed[150:], "is not good"),
        (b"no such format", "is not good"),
    ):
        path.write_bytes(harmed)
        with pytest.raises(DataError, match=rf"b\.jsonl\{suffix} {reason}"):
            mixture(tmp_path, str(path), 8)
    assert not list((tmp_path / "cache").iterdir())  # nothing half-made is left to be believed


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*none\.jsonl"):
        mixture(tmp_path, str(tmp_path / "none.jsonl"), 4)
    with pytest.raises(DataError, match=r"cannot read .*: Is a directory"):
        mixture(tmp_path, str(tmp_path), 4)
    for name in ("x" * 300, "a\0b", "\ud800"):
        for suffix in (".jsonl", ".csv"):
            with pytest.raises(DataError, match="cannot read "):
                mixture(tmp_path, [{"path": name + suffix}], 4)
    for content in (b"", b"\n \n\r\n", b"\xef\xbb\xbf"):
        (tmp_path / "empty.jsonl").write_bytes(content)
        with pytest.raises(DataError, match=r"empty\.jsonl is empty"):
            mixture(tmp_path, str(tmp_path / "empty.jsonl"), 4)
    (tmp_path / "empty.jsonl.zst").write_bytes(zstandard.compress(b""))
    with pytest.raises(DataError, match=r"empty\.jsonl\.zst is empty"):
        mixture(tmp_path, str(tmp_path / "empty.jsonl.zst"), 4)


def test_windows_lines_bom_and_no_final_newline(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}')
    tokens = mixture(tmp_path, str(path), 8).draw(1).tokens
    assert sorted(text_of(tokens).split("\n")[1:]) == ["one", "two"]


def test_a_line_of_30_mb(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * 30_000_000}) + '\n{"text": "y"}\n')
    file = LineFile(path, tmp_path / "cache")
    assert [len(json.loads(line)["text"]) for line in all_of(file)] == [30_000_000, 1]


def test_a_file_that_grows_or_vanishes_is_read_on(tmp_path: Path) -> None:
    """What was there at the start is the task; the next start finds that it is another."""
    path = write(tmp_path / "a.jsonl", [f"text {i}" for i in range(600)])
    want = mixture(tmp_path, str(path), 20).draw(400).tokens
    grown = mixture(tmp_path, str(path), 20)
    state = grown.state()
    with path.open("a") as file:
        file.write('{"text": "new"}\n' * 50)
    assert (grown.draw(400).tokens == want).all()
    with pytest.raises(DataError, match="650 lines, and had 600"):
        mixture(tmp_path, str(path), 20).load_state(state)
    gone = mixture(tmp_path, str(path), 20)
    path.unlink()
    assert gone.draw(400).tokens.shape == (400, 20)


def test_a_file_that_is_cut_short_ends_the_run_with_its_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["x" * 50] * 5000)
    made = mixture(tmp_path, str(path), 20)
    os.truncate(path, 1000)
    with pytest.raises(DataError, match=r"a\.jsonl was cut short"):
        made.draw(5000)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"a\.jsonl: .*cache.*--data-cache"):
        mixture(tmp_path, str(write(tmp_path / "a.jsonl", ["x"])), 4)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow past `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_full_disk_is_told_and_nothing_is_left(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / "a.jsonl", ["x"] * 3000)
    if suffix:
        content, path = path.read_bytes(), tmp_path / "a.jsonl.gz"
        path.write_bytes(gzip.compress(content))
    with full_disk(4096), pytest.raises(DataError, match=r"a\.jsonl.*: .*(written|File too large) \(.*cache"):
        LineFile(path, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    assert LineFile(path, tmp_path / "cache").rows == 3000


@pytest.mark.parametrize("kind", ["parquet", "csv", "hf"])
def test_tables(tmp_path: Path, kind: str) -> None:
    """Through datasets, from local files: the same documents as in jsonl, rows named where they are bad."""
    import datasets

    rows = [{"text": f"text {i}", "n": i} for i in range(300)]
    table = datasets.Dataset.from_list([*rows])
    folder = tmp_path / "data"
    folder.mkdir()
    file = folder / ("a.csv" if kind == "csv" else "a.parquet")
    table.to_csv(file) if kind == "csv" else table.to_parquet(file)
    path = f"hf://{folder}" if kind == "hf" else str(file)
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for task in ({"text": "text"}, {"template": "{n}: {text}", "loss_on": "completion"}):
        got, want = (mixture(tmp_path, [{"path": p, **task}], 25) for p in (path, str(jsonl)))
        for a, b in zip(got.draw(40)[:2], want.draw(40)[:2], strict=True):
            assert (a == b).all()
        assert got.sequences() == want.sequences()
    with pytest.raises(DataError, match=r", row \d+: expected .*\"n\""):
        mixture(tmp_path, [{"path": path, "text": "n"}], 8).draw(1)


def test_a_table_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*none\.parquet: no such file"):
        mixture(tmp_path, str(tmp_path / "none.parquet"), 8)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"bad\.parquet: datasets cannot read it: "):
        mixture(tmp_path, str(tmp_path / "bad.parquet"), 8)


def drawn_from(folder: Path, **flags: Any) -> tuple[np.ndarray, np.ndarray]:  # noqa: ANN401 - whatever a flag takes
    config = Config(tokenizer_name=str(folder / "tok"), data_cache=str(folder / "cache"), seq_length=20, **flags)
    return open_tasks(config, Vocabulary(config)).draw(60)[:2]


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("loss_on", ["all", "completion"])
def test_preprocessed_is_the_same_task(tmp_path: Path, workers: str, loss_on: str) -> None:
    """The rows of the folder are the rows of the file, to the token and to the mask."""
    make_tokenizer(tmp_path / "tok")
    path = make_task(tmp_path / "a.jsonl", lines=600)
    task = {"path": str(path), "template": "{text} red {text} ball", "loss_on": loss_on}
    (tmp_path / "file.json").write_text(json.dumps([task]))
    told = ["--task-config", str(tmp_path / "file.json"), "--tokenizer-name", str(tmp_path / "tok")]
    assert preprocess([*told, "--output", str(tmp_path / "out"), "--data-workers", workers]) == 0
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert (meta["dtype"], meta["documents"], meta["masked"]) == ("uint16", 600, loss_on == "completion")
    got = drawn_from(tmp_path, task_name=str(tmp_path / "out"))
    want = drawn_from(tmp_path, task_config=str(tmp_path / "file.json"))
    for a, b in zip(got, want, strict=True):
        assert (a == b).all()
    assert want[1].all() == (loss_on == "all")


def test_a_folder_of_tokens_says_what_made_it(tmp_path: Path) -> None:
    """A task or flags that would have made other tokens are refused with both values."""
    make_tokenizer(tmp_path / "tok")
    path, out = make_task(tmp_path / "a.jsonl"), tmp_path / "out"
    task = {"template": "{text} red {text}", "loss_on": "completion"}

    def config(**changes: str) -> str:
        (tmp_path / "tasks.json").write_text(json.dumps([{"path": str(out), **changes}]))
        return str(tmp_path / "tasks.json")

    (tmp_path / "file.json").write_text(json.dumps([{"path": str(path), **task}]))
    told = ["--tokenizer-name", str(tmp_path / "tok"), "--output", str(out), "--document-separator", " the "]
    assert preprocess(["--task-config", str(tmp_path / "file.json"), *told]) == 0
    want = drawn_from(tmp_path, task_config=str(tmp_path / "file.json"), document_separator=" the ")
    same = {"document_separator": " the "}
    for said in ({"task_name": str(out)}, {"task_config": config(**task)}, {"task_config": config()}):
        got = drawn_from(tmp_path, **said, **same)
        assert (got[1] == want[1]).all()
    for changes, theirs, ours in (
        ({"text": "text"}, r'template "\{text\} red \{text\}", loss_on "completion"', 'text "text", loss_on "all"'),
        ({"template": "{text} red {text}"}, 'loss_on "completion"', 'loss_on "all"'),
        ({"loss_on": "all"}, "template .*", 'text "text"'),
    ):
        with pytest.raises(DataError, match=f"out was tokenised with .*{theirs}, and this run says .*{ours}"):
            drawn_from(tmp_path, task_config=config(**changes), **same)
    with pytest.raises(DataError, match=r'--document-separator " the ", and this run says --document-separator "\\n"'):
        drawn_from(tmp_path, task_name=str(out))
    meta = json.loads((out / "meta.json").read_text())
    meta["made"]["--eos"] = [3]
    del meta["crc32"]  # as of before there were sums
    (out / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match=r"tokenised with --eos \[3\], and this run says --eos \[\]"):
        drawn_from(tmp_path, task_name=str(out), **same)
    del meta["made"]
    (out / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match=r"meta\.json: .* has no made; preprocess again"):
        drawn_from(tmp_path, task_name=str(out), **same)


def test_preprocess_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tokenizer(tmp_path / "tok")
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "the red ball"}\nbad\n{"text": "a ball"}\n')
    told = ["--task-name", str(path), "--tokenizer-name", str(tmp_path / "tok"), "--output", str(tmp_path / "out")]
    assert preprocess(told) == 1
    assert "a.jsonl:2: not JSON" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == []  # nothing half-made
    assert preprocess([*told, "--bad-lines", "skip"]) == 0
    assert preprocess(told) == 1
    assert "is there already" in capsys.readouterr().err
    assert preprocess([*told[:1], f"{path},{path}", *told[2:]]) == 2
    assert "one task at a time" in capsys.readouterr().err
    assert preprocess(told[2:]) == 2
    assert "one of --task-name and --task-config" in capsys.readouterr().err
    assert preprocess([*told, "--data-workers", "-1"]) == 2
    assert "--data-workers -1 must not be negative" in capsys.readouterr().err
    for bad in ("", ".", "/"):
        assert preprocess([*told[:-1], bad]) == 2
        assert "must be the name of a folder to make" in capsys.readouterr().err


def test_preprocess_cannot_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tokenizer(tmp_path / "tok")
    path = make_task(tmp_path / "a.jsonl", lines=400)
    told = ["--task-name", str(path), "--tokenizer-name", str(tmp_path / "tok"), "--output"]
    assert preprocess([*told, str(path / "out")]) == 1
    assert "a.jsonl: cannot be written: Not a directory" in capsys.readouterr().err.replace("/.out.partial", "")
    with full_disk(4096):
        assert preprocess([*told, str(tmp_path / "out")]) == 1
    assert "out: cannot be written: File too large" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "tok"]


def test_a_folder_of_tokens_that_does_not_fit(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tok")
    path, out = make_task(tmp_path / "a.jsonl"), tmp_path / "out"
    told = ["--task-name", str(path), "--tokenizer-name", str(tmp_path / "tok"), "--output", str(out)]
    assert preprocess(told) == 0
    os.truncate(out / "tokens.bin", 10)
    with pytest.raises(DataError, match=r"tokens\.bin is damaged"):
        drawn_from(tmp_path, task_name=str(out))
    make_tokenizer(tmp_path / "tok", extra=3)
    assert preprocess([*told[:-1], str(tmp_path / "other")]) == 0
    make_tokenizer(tmp_path / "tok")
    with pytest.raises(DataError, match="was tokenised by another tokenizer"):
        drawn_from(tmp_path, task_name=str(tmp_path / "other"))
