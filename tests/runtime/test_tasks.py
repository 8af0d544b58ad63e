"""The mixture draws by weight, packs without losing a token, and its cursor is exact."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from farspan.runtime.tasks import DataError, TaskMixture, parse_tasks


def encode(text: str) -> list[int]:
    return [ord(c) for c in text]


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_parsing_weights_and_paths() -> None:
    assert parse_tasks("a.jsonl:0.2, b.jsonl") == [(Path("a.jsonl"), 0.2), (Path("b.jsonl"), 1.0)]
    assert parse_tasks("/x:y/a.jsonl") == [(Path("/x:y/a.jsonl"), 1.0)]
    assert parse_tasks("/x:y/a.jsonl:3") == [(Path("/x:y/a.jsonl"), 3.0)]
    assert parse_tasks("a.jsonl:1,a.jsonl:1") == [(Path("a.jsonl"), 1.0)] * 2
    for bad in ("", ",", "a.jsonl:0", "a.jsonl:-1", "a.jsonl:nan", "a.jsonl:inf"):
        with pytest.raises(DataError):
            parse_tasks(bad)


def test_an_epoch_packs_every_document_once(tmp_path: Path) -> None:
    texts = [f"document {i} " + "x" * (i % 7) for i in range(20)]
    path = write(tmp_path / "a.jsonl", texts)
    total = sum(len("\n" + text) for text in texts)
    mixture = TaskMixture([(path, 1.0)], encode, length=1, seed=3)
    epochs = ["".join(map(chr, mixture.draw(total)[:, 0])) for _ in range(2)]
    for epoch in epochs:
        assert sorted(epoch.split("\n")[1:]) == sorted(texts)
    assert epochs[0] != epochs[1]  # another order each time


def test_rows_follow_one_another(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [f"text {i}" for i in range(9)])
    long = TaskMixture([(path, 1.0)], encode, length=60, seed=0).draw(1)
    short = TaskMixture([(path, 1.0)], encode, length=20, seed=0).draw(3)
    assert (long.reshape(-1) == short.reshape(-1)).all()


@pytest.mark.parametrize("stop", [0, 1, 7, 40, 93])
def test_the_cursor_is_exact(tmp_path: Path, stop: int) -> None:
    tasks = [
        (write(tmp_path / "a.jsonl", [f"a{i}" * (i % 5 + 1) for i in range(13)]), 0.4),
        (write(tmp_path / "b.jsonl", [f"b{i}" for i in range(5)]), 0.6),
        (tmp_path / "a.jsonl", 0.3),
    ]
    whole = TaskMixture(tasks, encode, length=11, seed=5)
    want = whole.draw(120)
    first = TaskMixture(tasks, encode, length=11, seed=5)
    assert (first.draw(stop) == want[:stop]).all()
    state = json.loads(json.dumps(first.state()))
    second = TaskMixture(tasks, encode, length=11, seed=5)
    second.load_state(state)
    assert (second.draw(120 - stop) == want[stop:]).all()
    assert second.state() == whole.state()


def test_the_draw_follows_the_weights(tmp_path: Path) -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 5.0}
    tasks = [(write(tmp_path / f"{name}.jsonl", [name * 50] * 3), w) for name, w in weights.items()]
    rows = TaskMixture(tasks, encode, length=60, seed=1).draw(4000)
    drawn = Counter(next(chr(t) for t in row if chr(t) != "\n") for row in rows)
    for name, weight in weights.items():
        p = weight / 8
        assert abs(drawn[name] / 4000 - p) < 4 * np.sqrt(p * (1 - p) / 4000)


def test_another_seed_draws_otherwise(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [f"text {i}" for i in range(50)])
    draws = [TaskMixture([(path, 1.0)], encode, length=100, seed=seed).draw(2) for seed in (1, 2)]
    assert (draws[0] != draws[1]).any()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "not JSON"),
        (b'{"text": 5}', 'string under "text"'),
        (b'{"txt": "a"}', 'string under "text"'),
        (b"[1]", 'string under "text"'),
        (b'{"text": null}', 'string under "text"'),
        (b'{"text": "\xff"}', "not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=f"bad.jsonl:3: .*{reason}"):
        TaskMixture([(path, 1.0)], encode, length=4, seed=0).draw(50)


def test_windows_lines_bom_and_no_final_newline(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}')
    tokens = TaskMixture([(path, 1.0)], encode, length=8, seed=0).draw(1)[0]
    assert sorted("".join(map(chr, tokens)).split("\n")[1:]) == ["one", "two"]


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["x"] * 5)
    state = TaskMixture([(path, 1.0)], encode, length=4, seed=0).state()
    write(path, ["x"] * 6)
    with pytest.raises(DataError, match="6 lines, and had 5"):
        TaskMixture([(path, 1.0)], encode, length=4, seed=0).load_state(state)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*none\.jsonl"):
        TaskMixture([(tmp_path / "none.jsonl", 1.0)], encode, length=4, seed=0)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl is empty"):
        TaskMixture([(tmp_path / "empty.jsonl", 1.0)], encode, length=4, seed=0)
    with pytest.raises(DataError, match="no line of it gives any token"):
        TaskMixture([(write(tmp_path / "a.jsonl", ["x"]), 1.0)], lambda text: [], length=4, seed=0).draw(1)
