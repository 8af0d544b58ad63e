"""The mixture draws by weight, packs without losing a token, and its cursor is exact."""

from __future__ import annotations

import json
import os
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chars import mixture, text_of, write
from farspan.runtime.data.mixture import TaskMixture
from farspan.runtime.data.recipe import Frame
from farspan.runtime.data.task_spec import DataError, TaskSpec, parse_tasks, read_task_config, short_names


def test_parsing_weights_and_paths() -> None:
    def pairs(text: str) -> list[tuple[str, float]]:
        return [(spec.path, spec.weight) for spec in parse_tasks(text)]

    assert pairs("a.jsonl:0.2, b.jsonl") == [("a.jsonl", 0.2), ("b.jsonl", 1.0)]
    assert pairs("/x:y/a.jsonl") == [("/x:y/a.jsonl", 1.0)]
    assert pairs("/x:y/a.jsonl:3") == [("/x:y/a.jsonl", 3.0)]
    assert pairs("a.jsonl:1,a.jsonl:1") == [("a.jsonl", 1.0)] * 2
    assert pairs("hf://org/data:0.3,hf://org/more") == [("hf://org/data", 0.3), ("hf://org/more", 1.0)]
    assert pairs("a.jsonl:1e9") == [("a.jsonl", 1e9)]
    for bad in ("", ",", *(f"a.jsonl:{w}" for w in ("0", "-1", "nan", "inf", "1e308", "1.1e9", "1" * 400))):
        with pytest.raises(DataError):
            parse_tasks(bad)


def test_task_config_and_task_name_make_the_same_objects(tmp_path: Path) -> None:
    file = tmp_path / "tasks.json"
    file.write_text('[{"path": "a.jsonl", "weight": 0.2}, {"path": "b.jsonl", "text": "text"}]')
    assert read_task_config(file) == parse_tasks("a.jsonl:0.2,b.jsonl")
    file.write_text('[{"path": "a", "template": "{q}\\n{a}", "loss_on": "completion", "repeats": 2, "weight": 3}]')
    assert read_task_config(file) == [
        TaskSpec("a", 3, template="{q}\n{a}", loss_on="completion", repeats=2),
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "not JSON"),
        ("{}", "a list of tasks"),
        ("[]", "a list of tasks"),
        ('[{"weight": 1}]', "task 1: no path"),
        ('[{"path": "a", "wait": 1}]', "unknown key 'wait'"),
        ('[{"path": "a", "weight": "1"}]', 'weight must be of type float, not "1"'),
        ('[{"path": "a", "weight": true}]', "weight must be of type float"),
        ('[{"path": "a", "weight": 0}]', "weight must be a positive number"),
        ('[{"path": "a", "weight": 1e308}]', "weight must be a positive number, and 1e+09 at most"),
        ('[{"path": "a", "weight": NaN}]', "weight must be a positive number"),
        ('[{"path": "a", "weight": ' + "9" * 400 + "}]", "weight must be a positive number"),
        ('[{"path": "a", "repeats": -1}]', "repeats must be 0"),
        ('[{"path": "a", "repeats": 1.5}]', "repeats must be of type int"),
        ('[{"path": "a", "text": "t", "template": "{t}"}]', "text and template exclude one another"),
        ('[{"path": "a", "loss_on": "answer"}]', "loss_on 'answer' is not one of all, completion"),
        ('[{"path": "a", "loss_on": "completion"}]', "needs a template or messages"),
        ('[{"path": "a", "template": "{q", "loss_on": "all"}]', "template: "),
        ('[{"path": "a", "template": "none"}]', "must hold fields by their names"),
        ('[{"path": "a", "template": "{}"}]', "must hold fields by their names"),
        ('[{"path": "a", "template": "{q!r}"}]', "must hold fields by their names"),
        ('[{"path": "a", "template": "{q}", "loss_on": "completion"}]', "has but one"),
    ],
)
def test_a_bad_task_config_is_named(tmp_path: Path, row: str, reason: str) -> None:
    file = tmp_path / "tasks.json"
    file.write_text(row)
    with pytest.raises(DataError, match=r"tasks\.json") as caught:
        read_task_config(file)
    assert reason in str(caught.value)


def test_an_epoch_packs_every_document_once(tmp_path: Path) -> None:
    texts = [f"document {i} " + "x" * (i % 7) for i in range(20)]
    path = write(tmp_path / "a.jsonl", texts)
    total = sum(len("\n" + text) for text in texts)
    made = mixture(tmp_path, str(path), 1, seed=3)
    epochs = [text_of(made.draw(total).tokens) for _ in range(2)]
    for epoch in epochs:
        assert sorted(epoch.split("\n")[1:]) == sorted(texts)
    assert epochs[0] != epochs[1]  # another order each time


def test_rows_follow_one_another(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [f"text {i}" for i in range(9)])
    long = mixture(tmp_path, str(path), 60).draw(1).tokens
    short = mixture(tmp_path, str(path), 20).draw(3).tokens
    assert (long.reshape(-1) == short.reshape(-1)).all()


def various(folder: Path) -> list[dict[str, object]]:
    """Tasks of every kind of cursor: long and short epochs, masks, bad lines, a limit of repeats, a path twice."""
    rng = random.Random(4)
    a = write(folder / "a.jsonl", [f"a{i}" * rng.randint(1, 5) for i in range(700)])
    b = write(folder / "b.jsonl", [f"b{i}" for i in range(5)])
    c = folder / "c.jsonl"
    rows = [{"q": f"q{i}" * rng.randint(1, 4), "a": f"A{i}"} for i in range(300)]
    c.write_text("".join("broken\n" if i % 7 == 0 else json.dumps(row) + "\n" for i, row in enumerate(rows)))
    return [
        {"path": str(a), "weight": 0.4},
        {"path": str(b), "weight": 0.6},
        {"path": str(c), "weight": 0.5, "template": "{q}={a}", "loss_on": "completion"},
        {"path": str(b), "weight": 0.3, "repeats": 30},
    ]


@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_the_cursor_is_exact_at_100_points(tmp_path: Path, rows: str) -> None:
    """Stopped anywhere, going on is never having stopped: tokens, targets, counts. The state stays small."""
    tasks, total = various(tmp_path), 900
    flags = {"rows": rows, "bad_lines": "skip", "seed": 5}
    whole = mixture(tmp_path, tasks, 11, **flags)
    want = whole.draw(total)
    assert not want.targets.all()
    rng = random.Random(0)
    first, at = mixture(tmp_path, tasks, 11, **flags), 0
    for stop in sorted(rng.sample(range(total), 100)):
        first.draw(stop - at)
        at = stop
        state = json.dumps(first.state())
        assert len(state) < 4096
        second = mixture(tmp_path, tasks, 11, **flags)
        second.load_state(json.loads(state))
        rest = second.draw(min(40, total - stop))
        assert (rest.tokens == want.tokens[stop : stop + 40]).all()
        assert (rest.targets == want.targets[stop : stop + 40]).all()
    first.draw(total - at)
    assert first.state() == whole.state()
    assert first.shares() == whole.shares()


def rows_of(made: TaskMixture, key: str, rows: int = 40) -> str:
    """The next rows of one task, whatever the weights would choose."""
    task = dict(made.keyed())[key]
    tokens = np.zeros((rows, 11), dtype=np.int64)
    for row in tokens:
        task.read(row, np.zeros(11, dtype=bool), True)
    return text_of(tokens)


@pytest.mark.parametrize("old", [False, True])
def test_tasks_come_and_go_and_the_others_read_on(tmp_path: Path, old: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Put before the others, after them, or taken away: each known task gives its very next token. Also from a
    checkpoint whose cursors had no order."""
    paths = [write(tmp_path / f"{n}.jsonl", [f"{n}{i}" for i in range(900)]) for n in "abcd"]
    a, b, c, d = map(str, paths)

    def resumed(names: list[str], state: dict[str, Any]) -> TaskMixture:
        made = mixture(tmp_path, ",".join(names), 11)
        made.load_state(json.loads(json.dumps(state)))
        return made

    first = mixture(tmp_path, f"{a},{b}", 11)
    first.draw(50)
    state = json.loads(json.dumps(first.state()))
    for task in state["tasks"].values() if old else ():
        del task["order"]
    want = {key: rows_of(first, key) for key in (a, b)}
    for names in ([a, b], [c, a, b], [b], [b, c, a], [a, c, d, b]):
        made = resumed(names, state)
        again = resumed([c, *reversed(names)] if c not in names else names[::-1], made.state())
        for key in {a, b} & set(names):
            assert rows_of(made, key) == want[key], names
            assert rows_of(again, key) == want[key], names
        orders = [task.cursor.order for task in again.tasks]
        assert len(set(orders)) == len(orders)
    assert "1 task(s) of the checkpoint are not named any more" in caplog.text


def test_two_of_a_path_do_not_take_each_others_place(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl", ["x"] * 5))
    tasks = [{"path": path}, {"path": path, "template": "{text}!"}]
    state = mixture(tmp_path, tasks, 4).state()
    mixture(tmp_path, tasks, 4).load_state(state)
    with pytest.raises(DataError, match=r"its text, template, messages, loss_on, end token .* is not what it was"):
        mixture(tmp_path, tasks[::-1], 4).load_state(state)


def test_a_state_of_20_tasks_is_below_4_kib(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 40)
    folder.mkdir()
    paths = [write(folder / f"{i}.jsonl", ["x" * 50] * 3) for i in range(20)]
    made = mixture(tmp_path, ",".join(map(str, paths)), 16)
    made.draw(500)
    made.drawn *= 10**6
    for task in made.tasks:
        for name, value in vars(task.cursor).items():
            setattr(task.cursor, name, value * 1000)
    assert len(json.dumps(made.state())) < 4096


def test_the_draw_follows_the_weights(tmp_path: Path) -> None:
    """Shares lie within four standard deviations of the weights, and the counts are those of what was drawn."""
    weights = {"a": 1.0, "b": 2.0, "c": 5.0}
    tasks = ",".join(f"{write(tmp_path / f'{n}.jsonl', [n * 50] * 3)}:{w}" for n, w in weights.items())
    made = mixture(tmp_path, tasks, 60)
    rows = made.draw(4000).tokens
    drawn = Counter(next(chr(t) for t in row if chr(t) != "\n") for row in rows)
    for name, weight in weights.items():
        p = weight / 8
        assert abs(drawn[name] / 4000 - p) < 4 * np.sqrt(p * (1 - p) / 4000)
        share = made.shares()[name]
        assert share["sequences"] == drawn[name]
        assert share["tokens"] == drawn[name] * 60
        assert share["epochs"] == pytest.approx(drawn[name] * 60 / (3 * 51), abs=1 / 3)


def test_another_seed_draws_otherwise(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [f"text {i}" for i in range(50)])
    draws = [mixture(tmp_path, str(path), 100, seed=seed).draw(2).tokens for seed in (1, 2)]
    assert (draws[0] != draws[1]).any()


def test_repeats_are_a_limit(tmp_path: Path) -> None:
    """Every document of a limited task comes exactly so often; then the others go on alone, or the draw ends."""
    few, many = write(tmp_path / "few.jsonl", ["one", "two"]), write(tmp_path / "many.jsonl", ["x" * 30] * 9)
    tasks = [{"path": str(few), "repeats": 3, "weight": 5}, {"path": str(many)}]
    made = mixture(tmp_path, tasks, 16)
    drawn = made.draw(50)
    text = text_of(drawn.tokens)
    # 24 characters in 2 rows, the last padded.
    assert (text.count("one"), text.count("two"), text.count("_")) == (3, 3, 8)
    assert drawn.targets.sum() == 50 * 16 - 8
    assert made.shares()["few"]["epochs"] == 3
    alone = mixture(tmp_path, tasks[:1], 16)
    drawn = alone.draw(5)  # what is left of it stays blank
    assert text_of(drawn.tokens)[24:] == "_" * (16 * 5 - 24)
    assert drawn.targets.sum() == 24
    assert alone.drawn == 2
    with pytest.raises(DataError, match="as often as their repeats allow, after 2 sequences"):
        alone.draw(3)


def test_sequences_of_an_epoch(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["x" * i for i in range(700)])
    packed, padded = mixture(tmp_path, str(path), 50), mixture(tmp_path, str(path), 50, rows="padded")
    assert packed.sequences() == -(-sum(i + 1 for i in range(700)) // 50)
    assert padded.sequences() == sum(-(-(i + 1) // 50) for i in range(700))
    padded.draw(padded.sequences())
    assert padded.shares()[path.stem]["epochs"] == 1


@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_the_most_that_repeats_allow(tmp_path: Path, rows: str) -> None:
    """Known before, and on the way; blank lines at the end of a task, which give no row, included."""
    a = write(tmp_path / "a.jsonl", ["x" * (i % 23) for i in range(40)])
    b = tmp_path / "b.jsonl"
    b.write_text('{"text": "one"}\n' + "bad\n" * 300)
    tasks = [{"path": str(a), "repeats": 7}, {"path": str(b), "repeats": 3, "weight": 0.2}]
    made = mixture(tmp_path, tasks, 10, rows=rows, bad_lines="skip")
    most = made.most()
    assert most is not None
    made.draw(17)
    assert made.most() == most
    made.draw(most + 9)
    assert made.drawn == made.most() == most
    unlimited = [tasks[0], {"path": str(b)}]
    assert mixture(tmp_path, unlimited, 10, rows=rows, bad_lines="skip").most() is None


def test_padded_rows_hold_one_document(tmp_path: Path) -> None:
    """A longer document goes on in the next row: nothing is cut off."""
    path = write(tmp_path / "a.jsonl", ["abcdefghijkl", "mno"])
    drawn = mixture(tmp_path, str(path), 8, Frame("", (), (ord("$"),)), rows="padded").draw(3)
    assert sorted(map(text_of, drawn.tokens)) == ["abcdefgh", "ijkl$___", "mno$____"]
    assert (drawn.targets == (drawn.tokens != ord("_"))).all()


@pytest.mark.parametrize("begin", [(), (1, 2)])
def test_completions_alone_are_targets(tmp_path: Path, begin: tuple[int, ...]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"q": "what?", "a": "this", "n": 5}) + "\n")
    task = {"path": str(path), "template": "{q} [{n}] {a}.", "loss_on": "completion"}
    frame = Frame("\n", begin, (3,))
    tokens, targets, _ = mixture(tmp_path, [task], 17 + len(begin), frame).draw(1)
    assert text_of(tokens) == "".join(map(chr, begin)) + "\nwhat? [5] this.\3"
    assert text_of(tokens[targets]) == "this.\3"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "not JSON"),
        (b'{"text": 5}', 'string under "text"'),
        (b'{"txt": "a"}', 'string under "text"'),
        (b"[1]", "expected an object, found a list"),
        (b'{"text": null}', 'string under "text"'),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b"[" * 100_000, "not JSON that can be read"),
        (b'{"n": ' + b"1" * 10_000 + b"}", "not JSON that can be read"),
        (b'{"text": "a", "n": NaN}', "not JSON: NaN is no number"),
        (b'{"text": "a", "n": [-Infinity]}', "not JSON: -Infinity is no number"),
    ],
)
def test_a_bad_line_is_named_or_skipped(
    tmp_path: Path, line: bytes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=f"bad.jsonl:3: .*{reason}"):
        mixture(tmp_path, str(path), 4).draw(50)
    made = mixture(tmp_path, str(path), 5, bad_lines="skip")
    assert text_of(made.draw(4).tokens) == "\ngood" * 4
    assert made.shares()[path.stem]["bad_lines"] == 4  # one in each epoch
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1  # named in the first
    assert f"skipping {path}:3: " in said[0]
    path.write_bytes(b'{"text": "good"}\n' + (line + b"\n") * 5)
    made = mixture(tmp_path, str(path), 5, bad_lines="skip")
    made.draw(4)
    said = [record.getMessage() for record in caplog.records][1:]
    assert len(said) == 3
    assert said[2].endswith("further ones are only counted")
    assert made.shares()[path.stem]["bad_lines"] >= 15


def test_a_template_names_the_key_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "x", "a": "y"}\n{"q": "x"}\n')
    with pytest.raises(DataError, match=r'a\.jsonl:2: .*under "a"'):
        mixture(tmp_path, [{"path": str(path), "template": "{q} {a}"}], 4)


def test_numbers_in_a_template(tmp_path: Path) -> None:
    """Integers stay as they are written, however long; what is no number is a bad line."""
    path = tmp_path / "a.jsonl"
    numbers = ["7", "-0.5", "18446744073709551615", "123456789012345678901234567890", "-9223372036854775809", "1e30"]
    path.write_text("".join(f'{{"n": {n}, "m": 1}}\n' for n in numbers))
    task = {"path": str(path), "template": "{m}={n};"}
    text = text_of(mixture(tmp_path, [task], 117, Frame("")).draw(1).tokens)
    assert sorted(text.split(";")[:-1]) == sorted(f"1={n}" for n in [*numbers[:-1], "1e+30"])
    for bad in ("1e999", "-1e999"):
        path.write_text(f'{{"n": {bad}, "m": 1}}\n')
        with pytest.raises(DataError, match=r'a\.jsonl:1: -?inf under "n" is no number'):
            mixture(tmp_path, [task], 4).draw(1)


def test_no_line_gives_a_token(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["", ""])
    with pytest.raises(DataError, match="no line of it gives any token"):
        mixture(tmp_path, str(path), 4, Frame("")).draw(1)
    path.write_text('{"text": ""}\n' + "bad\n" * 600)
    with pytest.raises(DataError, match="no line of it gives any token"):
        mixture(tmp_path, str(path), 4, Frame(""), bad_lines="skip").draw(1)


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["x"] * 5)
    state = mixture(tmp_path, str(path), 4).state()
    write(path, ["x"] * 6)
    with pytest.raises(DataError, match="6 lines, and had 5"):
        mixture(tmp_path, str(path), 4).load_state(state)
    write(path, ["xy"] * 5)
    with pytest.raises(DataError, match="75 bytes, and had 70"):
        mixture(tmp_path, str(path), 4).load_state(state)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(tmp_path: Path, workers: int) -> None:
    """The same rows, and a cursor that another number of processes goes on from. None is left behind."""
    tasks, flags = various(tmp_path), {"bad_lines": "skip", "seed": 2}
    alone = mixture(tmp_path, tasks, 13, **flags)
    several = mixture(tmp_path, tasks, 13, data_workers=workers, **flags)
    try:
        for got, want in zip(several.draw(300)[:2], alone.draw(300)[:2], strict=True):
            assert (got == want).all()
        state = several.state()
        assert state == alone.state()
    finally:
        several.close()
    assert_gone(several)
    resumed = mixture(tmp_path, tasks, 13, **flags)
    resumed.load_state(state)
    assert (resumed.draw(100).tokens == alone.draw(100).tokens).all()


def assert_gone(made: TaskMixture) -> None:
    for pid in made._pool.pids:  # type: ignore[attr-defined]
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_heeds_no_signal_from_its_first_moment_on(tmp_path: Path, number: signal.Signals) -> None:
    """A launcher's SIGTERM, which reaches all processes, comes while it is still being made."""
    path = write(tmp_path / "a.jsonl", ["x" * 40] * 20)
    made = mixture(tmp_path, str(path), 8, data_workers=2)
    try:
        for pid in made._pool.pids:  # type: ignore[attr-defined]
            os.kill(pid, number)
        assert made.draw(10).tokens.shape == (10, 8)
        for pid in made._pool.pids:  # type: ignore[attr-defined]
            os.kill(pid, 0)
    finally:
        made.close()
    assert_gone(made)


def test_a_worker_that_dies_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["x" * 40] * 2000)
    made = mixture(tmp_path, str(path), 8, data_workers=1)
    try:
        made.draw(1)
        os.kill(made._pool.pids[0], signal.SIGKILL)  # type: ignore[attr-defined]
        with pytest.raises(DataError, match=r"ended by itself \(exit code -9"):
            made.draw(20_000)
    finally:
        made.close()
    assert_gone(made)


def test_short_names_are_files_and_what_tells_them_apart() -> None:
    paths = [
        "/data/a.jsonl.zst",
        "/x/gsm8k/train.jsonl",
        "/x/math/train.jsonl",
        "hf://org/set",
        "v1.2-b.csv",
        "c.tokens/",
    ]
    assert short_names(paths) == ["a", "gsm8k/train", "math/train", "set", "v1.2-b", "c"]
    assert short_names(["/x/a.jsonl", "/x/a.jsonl", "/x/a.csv", "x/a.gz"]) == ["x/a", "x/a#2", "x/a#3", "x/a#4"]
