"""Evaluation: every target once, one number on every grid, and training goes on as if there had been none."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zstandard
from chars import Chars, text_of, write
from farspan.comm.topology import Topology
from farspan.modules.loss import IGNORED
from farspan.runtime.data.mixture import DataError
from farspan.runtime.data.preprocess import main as preprocess
from farspan.runtime.data.tokenizer import Vocabulary
from farspan.runtime.flags.config import Config
from farspan.runtime.training.evaluation import HeldOut, open_held_out
from farspan.runtime.training.milestones import perplexity
from launch import Run, read_metrics
from tiny import WORDS, make_model, make_task, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

Flags = Callable[..., dict[str, Any]]
LENGTH = 16


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences that are not drawn for training: 11 rows and a piece, which no grid here divides."""
    path = make_task(tmp_path_factory.mktemp("held") / "held.jsonl", lines=11, seed=9)
    path.write_text(path.read_text().replace("\n", "\n\n", 1))  # a blank line is no document
    return path


def stream(path: Path, model: Path) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = filter(str.strip, path.read_text().splitlines())
    return [t for line in lines for t in tokenizer("\n" + json.loads(line)["text"])["input_ids"]]


def plain_loop(folder: Path, tokens: list[int]) -> tuple[float, int]:
    """A transformers model over the rows one by one; loss and the number of targets."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for at in range(0, len(tokens), LENGTH):
        row = torch.tensor([tokens[at : at + LENGTH]])
        with torch.no_grad():
            logits = model(row).logits[0, :-1]
        total += float(F.cross_entropy(logits, row[0, 1:], reduction="sum"))
        count += row.shape[1] - 1
    return total / count, count


def read(told: Path, *, replicas: int = 1, length: int = LENGTH, **flags: Any) -> HeldOut:  # noqa: ANN401
    """`open_held_out` with characters as tokens."""
    defaults = {"batch_size": 2, "data_cache": str(told.parent / "cache"), "wire_timeout": 60.0}
    config = Config(evaluation_data=str(told), seq_length=length, **{**defaults, **flags})
    made = open_held_out(config, Topology(replicas, 1), Chars())  # type: ignore[arg-type]
    assert made is not None
    return made


@pytest.mark.parametrize(("length", "rows", "replicas"), [(4, 2, 1), (4, 1, 3), (5, 3, 2), (7, 1, 1), (64, 2, 2)])
def test_every_target_counts_once(tmp_path: Path, length: int, rows: int, replicas: int) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("abcdefg", "hij", "k", "lmnopqrstu")))
    text = "\nabcdefg\nhij\nk\nlmnopqrstu"
    made = read(path, batch_size=rows, replicas=replicas, length=length)
    assert made.tokens.shape[1:] == (replicas, rows, length)
    flat, labels = made.tokens.flatten().tolist(), made.labels.flatten().tolist()
    assert "".join(map(chr, flat[: len(text)])) == text
    cut = [text[at : at + length] for at in range(0, len(text), length)]
    want = [ord(c) for row in cut for c in row[1:]]
    assert [label for label in labels if label != IGNORED] == want
    for at, label in enumerate(labels):
        assert label in (IGNORED, flat[min(at + 1, len(flat) - 1)])
    assert made.size == (-(-len(cut) // (rows * replicas)), len(want))
    assert made.digest == read(path, batch_size=7, length=3).digest  # the text's, whatever the grid


def test_the_number_of_batches_can_be_limited(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "abcdefghijklmnopq"}\n{"text": "not read at all"}')
    made = read(path, length=4, evaluation_num_batch=2)
    assert made.size == (2, 12)
    assert "".join(map(chr, made.tokens.flatten().tolist())) == "\nabcdefghijklmno"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x.jsonl is empty"),
        (b"\n \n", "x.jsonl is empty"),
        (b'{"text": ""}', "holds no token that follows another"),
        (b'{"text": "ab"}\n{"text": 3}\n', 'x.jsonl:2: expected an object with a string under "text"'),
        (b'{"text": "ab"}\n\n{"text": \n', "x.jsonl:3: not JSON"),
        (b'{"text": "\xff"}\n', "x.jsonl:1: not UTF-8"),
        (None, "cannot read"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "x.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match="--evaluation-data: ") as caught:
        read(path)
    assert message in str(caught.value)


CHATTY = [
    {"path": "qa.jsonl", "template": "{question}|{answer}", "loss_on": "completion"},
    {"path": "b.jsonl.gz", "text": "story"},
]


def tasks_file(folder: Path, tasks: list[dict[str, Any]]) -> Path:
    """Of `tasks`, with the files that `CHATTY` names beside it."""
    (folder / "qa.jsonl").write_text('{"question": "ab", "answer": "cde"}\n{"question": "f", "answer": "gh"}\n')
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b'{"story": "klmno"}\n'))
    config = folder / "tasks.json"
    config.write_text(json.dumps([{**task, "path": str(folder / task["path"])} for task in tasks]))
    return config


def targets_of(made: HeldOut) -> str:
    return "".join(chr(label) for label in made.labels.flatten().tolist() if label != IGNORED)


def test_a_name_in_json_is_a_list_of_tasks(tmp_path: Path) -> None:
    """Read in their order, each beginning a row; only completions are targets."""
    made = read(tasks_file(tmp_path, CHATTY), length=8)
    assert text_of(made.tokens.numpy()) == "\nab|cde\n" + "f|gh____" + "\nklmno__" + "_" * 8
    assert targets_of(made) == "cde" + "gh" + "klmno"
    assert made.size == (2, 10)


def test_padded_rows_hold_a_document_each(tmp_path: Path) -> None:
    made = read(tasks_file(tmp_path, CHATTY), length=6, batch_size=1, rows="padded")
    assert text_of(made.tokens.numpy()) == "\nab|cd" + "e_____" + "\nf|gh_" + "\nklmno"
    assert targets_of(made) == "cd" + "gh" + "klmno"  # a row's first token follows none


def test_the_digest_knows_what_is_to_be_predicted(tmp_path: Path) -> None:
    chatty = read(tasks_file(tmp_path, CHATTY[:1]))
    assert chatty.digest == read(tasks_file(tmp_path, CHATTY[:1]), batch_size=5, length=3).digest
    assert chatty.digest != read(tasks_file(tmp_path, [{**CHATTY[0], "loss_on": "all"}])).digest


@pytest.mark.parametrize("kind", ["gz", "zst", "csv", "tokens", "workers"])
def test_whatever_a_task_can_be(tmp_path: Path, kind: str) -> None:
    """The same rows and targets as of the plain file."""
    make_tokenizer(tmp_path / "tok")
    plain = make_task(tmp_path / "x.jsonl", lines=30)
    content, texts = plain.read_bytes(), [json.loads(line)["text"] for line in plain.read_text().splitlines()]
    path, flags = tmp_path / f"y.{'jsonl.' if kind in ('gz', 'zst') else ''}{kind}", {}
    match kind:
        case "gz":
            path.write_bytes(gzip.compress(content))
        case "zst":
            path.write_bytes(zstandard.compress(content))
        case "csv":
            path.write_text("\n".join(["text", *texts]))
        case "tokens":
            told = ["--task-name", str(plain), "--tokenizer-name", str(tmp_path / "tok"), "--output", str(path)]
            assert preprocess(told) == 0
        case "workers":
            path, flags = plain, {"data_workers": 2}
    vocabulary = Vocabulary(Config(tokenizer_name=str(tmp_path / "tok")))

    def of(told: Path, **more: Any) -> HeldOut:  # noqa: ANN401
        config = Config(
            evaluation_data=str(told), data_cache=str(tmp_path / "cache"), seq_length=16, batch_size=3, **more
        )
        made = open_held_out(config, Topology(2, 1), vocabulary)
        assert made is not None
        return made

    got, want = of(path, **flags), of(plain)
    assert torch.equal(got.tokens, want.tokens)
    assert torch.equal(got.labels, want.labels)
    assert got.digest == want.digest


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([{"path": "qa.jsonl", "text": "question", "weight": 0.5}], "task 1: weight and repeats"),
        ([CHATTY[0], {"path": "qa.jsonl", "text": "question", "repeats": 2}], "task 2: weight and repeats"),
        ([{"path": "qa.jsonl", "txt": "question"}], "task 1: unknown key 'txt'"),
        ([], "a list of tasks"),
        ([{"path": "none.jsonl"}], "none.jsonl: No such file"),
    ],
)
def test_a_bad_list_of_tasks_is_one_line(tmp_path: Path, tasks: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match="--evaluation-data: ") as caught:
        read(tasks_file(tmp_path, tasks))
    assert message in str(caught.value)


def test_lines_in_a_file_named_json_are_told_from_tasks(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", ["one", "two"])
    with pytest.raises(DataError, match=r"x\.json is not JSON: .* on each line is named \.jsonl"):
        read(path)


def test_bad_lines_can_be_skipped(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "ab"}\nbad\n{"text": "cd"}\n')
    assert targets_of(read(path, bad_lines="skip")) == "ab\ncd"
    with pytest.raises(DataError, match=r"x\.jsonl:2: not JSON.*--bad-lines skip"):
        read(path)


def test_all_ranks_say_so(flags: Flags, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with Run(2, 1, flags(evaluation_data=tmp_path / "bad.jsonl")) as run:
        for end in run.wait(30).values():
            assert end.code == 1
            assert "bad.jsonl:1: expected an object" in end.err


@pytest.mark.parametrize(
    ("stages", "replicas", "changes"),
    [
        (1, 1, {}),
        (2, 2, {"batch_size": 2, "micro_batch_size": 1}),
        (3, 1, {"layer_split": "1,3,1", "pp_mode": "1f1b"}),
        (1, 2, {"batch_size": 10, "micro_batch_size": 5}),  # one batch, and the second replica's share is short
        (2, 2, {"batch_size": 12, "micro_batch_size": 3}),  # the second replica has nothing at all
    ],
)
def test_the_loss_is_a_plain_loops(
    flags: Flags, tmp_path: Path, held_out: Path, model: Path, stages: int, replicas: int, changes: dict[str, Any]
) -> None:
    """Of the checkpoint that was written after it, over the very same rows."""
    told = flags(evaluation_data=held_out, evaluation_steps=2, total_steps=3, warmup_steps=2, **changes)
    with Run(stages, replicas, told, by_rank={r: {"evaluation_data": None} for r in range(1, 4)}) as run:
        run.succeed()
    rows = read_metrics(tmp_path / "ck")
    assert ["eval_loss" in row for row in rows] == [False, True, True]  # every second step, and the end
    tokens = stream(held_out, model)
    loss, _ = plain_loop(tmp_path / "ck" / "checkpoint_3", tokens)
    assert rows[2]["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert rows[2]["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert f"held-out loss {loss:.4f}"[:-1] in run.err(0)


def test_completions_alone(flags: Flags, tmp_path: Path, model: Path) -> None:
    """Of a list of tasks, on a grid: the loss of a plain loop over the answers' words."""
    rng = random.Random(0)
    asked = [[" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(2)] for _ in range(15)]
    path, config = tmp_path / "qa.jsonl", tmp_path / "held.json"
    path.write_text("".join(json.dumps({"q": q, "a": a}) + "\n" for q, a in asked))
    config.write_text(json.dumps([{"path": str(path), "template": "{q} and {a}", "loss_on": "completion"}]))
    with Run(2, 2, flags(evaluation_data=config, total_steps=1, warmup_steps=1, batch_size=2)) as run:
        run.succeed()
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids: list[int] = []
    labels: list[int] = []
    for q, a in asked:
        made, answer = tokenizer(f"{q} and {a}")["input_ids"], len(a.split())
        ids += made
        labels += [IGNORED] * (len(made) - answer) + made[-answer:]
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for row, own in zip(torch.tensor(ids).split(LENGTH), torch.tensor(labels).split(LENGTH), strict=True):
        with torch.no_grad():
            logits = hf(row[None]).logits[0, :-1]
        total += float(F.cross_entropy(logits, own[1:], reduction="sum"))
        count += int((own[1:] != IGNORED).sum())
    (found,) = read_metrics(tmp_path / "ck")
    assert found["eval_loss"] == pytest.approx(total / count, rel=1e-5)


def test_the_model_as_it_came(flags: Flags, tmp_path: Path, held_out: Path, model: Path) -> None:
    """The first update's learning rate is 0, so what is evaluated after it are the weights of the start."""
    with Run(2, 1, flags(evaluation_data=held_out, evaluation_num_batch=2, total_steps=1, warmup_steps=1)) as run:
        run.succeed()
    (row,) = read_metrics(tmp_path / "ck")
    loss, _ = plain_loop(model, stream(held_out, model)[: 2 * 4 * LENGTH])
    assert row["eval_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("stages", "replicas", "changes"),
    [(2, 2, {"gradient_accumulate_step": 2, "total_steps": 12}), (3, 1, {"pp_mode": "1f1b"})],
)
def test_training_does_not_notice(
    flags: Flags, tmp_path: Path, held_out: Path, stages: int, replicas: int, changes: dict[str, Any]
) -> None:
    """Losses and gradient norms are the same bits with evaluations between the updates and without; dropout too."""
    model = make_model(tmp_path / "drop", "gptneox", hidden_dropout=0.2, attention_dropout=0.1)
    curves = []
    for extra in ({}, {"evaluation_data": held_out, "evaluation_steps": 1}):
        told = flags(model_name=model, checkpoint_path=tmp_path / f"ck{len(extra)}", **changes, **extra)
        with Run(stages, replicas, told) as run:
            run.succeed()
        rows = read_metrics(told["checkpoint_path"])
        assert all(("eval_loss" in row) == bool(extra) for row in rows)
        curves.append([(row["loss"], row["grad_norm"]) for row in rows])
    assert curves[0] == curves[1]


def test_perplexity() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1e4) == math.inf
