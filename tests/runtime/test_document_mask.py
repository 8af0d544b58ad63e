"""--document-mask: where documents lie in drawn rows, and runs that train as a plain loop with HF's own masks does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from chars import mixture, text_of, write
from farspan.runtime.data.mixture import positions_of
from farspan.runtime.data.open_tasks import open_tasks
from farspan.runtime.data.preprocess import main as preprocess
from farspan.runtime.data.recipe import Frame
from farspan.runtime.data.tokenizer import Vocabulary
from farspan.runtime.flags.config import Config
from grids import train_plainly
from launch import Run, read_metrics
from tiny import make_model, make_task, make_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

Flags = Callable[..., dict[str, Any]]
ROWS, LENGTH, UPDATES, LR = 4, 24, 3, 3e-3


# ---- where documents lie


def from_separators(tokens: np.ndarray, separator: str) -> np.ndarray:
    """Positions, read off the separators that stand before documents and nowhere else."""
    want = np.zeros_like(tokens)
    for row, own in zip(tokens, want, strict=True):
        for at in range(1, len(row)):
            own[at] = 0 if chr(row[at]) == separator else own[at - 1] + 1
    return want


def test_positions_of() -> None:
    starts = np.array([[0, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 1], [0] * 6], dtype=bool)
    assert positions_of(starts).tolist() == [[0, 1, 0, 0, 1, 2], [0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("length", [5, 33, 400])
def test_a_position_says_how_far_its_document_has_come(tmp_path: Path, length: int) -> None:
    """Over blocks and epochs, with documents of one token and of many rows, and two tasks."""
    rng = np.random.default_rng(0)
    texts = ["x" * int(n) for n in rng.choice([0, 1, 3, 40, 90], size=700)]
    a, b = write(tmp_path / "a.jsonl", texts), write(tmp_path / "b.jsonl", texts[::-1])
    made = mixture(tmp_path, f"{a}:0.3,{b}:0.7", length, Frame("|"), document_mask=True)
    drawn = made.draw(120_000 // length)
    assert drawn.positions is not None
    assert max(task.cursor.epoch for task in made.tasks) > 0
    assert (drawn.positions == from_separators(drawn.tokens, "|")).all()


def test_documents_without_a_token_begin_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["", "|ab", "", "", "|c", "|defghi", ""])
    drawn = mixture(tmp_path, str(path), 7, Frame(""), document_mask=True).draw(40)
    assert (drawn.positions == from_separators(drawn.tokens, "|")).all()


def test_tokens_are_those_without_the_flag_and_stopping_changes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["x" * (n % 37) for n in range(900)])
    whole = mixture(tmp_path, str(path), 50, document_mask=True).draw(300)
    plain = mixture(tmp_path, str(path), 50).draw(300)
    assert plain.positions is None
    assert (plain.tokens == whole.tokens).all()
    for stop in (1, 77, 200):
        first = mixture(tmp_path, str(path), 50, document_mask=True)
        first.draw(stop)
        second = mixture(tmp_path, str(path), 50, document_mask=True, data_workers=stop % 2)
        second.load_state(first.state())
        rest = second.draw(300 - stop)
        second.close()
        assert text_of(rest.tokens) == text_of(whole.tokens[stop:])
        assert (rest.positions == whole.positions[stop:]).all()


def test_a_folder_of_tokens_knows_its_documents(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tok")
    path = make_task(tmp_path / "a.jsonl", lines=300)
    told = ["--task-name", str(path), "--tokenizer-name", str(tmp_path / "tok")]
    assert preprocess([*told, "--output", str(tmp_path / "out")]) == 0
    drawn = []
    for task in (path, tmp_path / "out"):
        config = Config(
            task_name=str(task), tokenizer_name=str(tmp_path / "tok"), seq_length=LENGTH,
            data_cache=str(tmp_path / "cache"), document_mask=True,
        )  # fmt: skip
        drawn.append(open_tasks(config, Vocabulary(config)).draw(30))
    assert (drawn[0].positions == drawn[1].positions).all()
    assert (drawn[0].positions[:, 1:] == 0).sum() > 30


# ---- training


def documents_of(positions: Tensor) -> dict[str, Tensor]:
    """What a transformers model needs to keep documents apart."""
    number = (positions == 0).cumsum(1)
    return {"position_ids": positions, "attention_mask": (number[:, :, None] == number[:, None, :]).tril()[:, None]}


def plain_loop(folder: Path, task_name: str) -> tuple[list[float], list[float], PreTrainedModel]:
    """Losses, gradient norms and the trained model."""
    told = Config(
        model_name=str(folder), task_name=task_name, seq_length=LENGTH, data_cache=str(folder / "cache"),
        document_mask=True,
    )  # fmt: skip
    mixture = open_tasks(told, Vocabulary(told))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").train()
    drawn = (mixture.draw(ROWS) for _ in range(UPDATES))
    pairs = ((torch.from_numpy(d.tokens), torch.from_numpy(d.positions)) for d in drawn)
    batches = ({"input_ids": ids, "labels": ids, **documents_of(positions)} for ids, positions in pairs)
    losses, norms = train_plainly(model, batches, LR, UPDATES)
    return losses, norms, model.eval()


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, path: Path, tokenizer: Any) -> float:  # noqa: ANN401
    """Over the documents of `path` one after another, cut into rows."""
    documents = [tokenizer("\n" + json.loads(line)["text"])["input_ids"] for line in path.read_text().splitlines()]
    ids = torch.tensor([token for document in documents for token in document])
    starts = torch.tensor([at == 0 for document in documents for at in range(len(document))])
    total, count = 0.0, 0
    for row, begins in zip(ids.split(LENGTH), starts.split(LENGTH), strict=True):
        positions = torch.from_numpy(positions_of(begins.numpy()))[None]
        logits = model(row[None], **documents_of(positions)).logits[0, :-1]
        total += float(F.cross_entropy(logits, row[1:], reduction="sum"))
        count += len(row) - 1
    return total / count


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Path]:
    """A tied Llama, tasks, and held-out text."""
    folder = tmp_path_factory.mktemp("documents")
    model = make_model(folder / "model", "llama", tie_word_embeddings=True)
    a, b = make_task(folder / "a.jsonl"), make_task(folder / "b.jsonl", seed=1)
    return model, f"{a}:0.3,{b}:0.7", make_task(folder / "held.jsonl", lines=9, seed=5)


@pytest.fixture(scope="module")
def reference(world: tuple[Path, str, Path]) -> tuple[list[float], list[float], float]:
    model, task_name, held = world
    losses, norms, trained = plain_loop(model, task_name)
    return losses, norms, held_out_loss(trained, held, Vocabulary(Config(tokenizer_name=str(model))).tokenizer)


@pytest.mark.parametrize(
    ("stages", "replicas", "changes"),
    [
        (1, 1, {}),
        (2, 1, {"micro_batch_size": 1, "recompute": "block"}),
        (3, 1, {"micro_batch_size": 2, "recompute": "selective", "pp_mode": "1f1b"}),
        (2, 2, {"micro_batch_size": 1}),
    ],
)
def test_a_grid_equals_a_plain_loop_with_masks(
    flags: Flags,
    tmp_path: Path,
    world: tuple[Path, str, Path],
    reference: tuple[list[float], list[float], float],
    stages: int,
    replicas: int,
    changes: dict[str, Any],
) -> None:
    model, task_name, held = world
    told = flags(
        model_name=model, task_name=task_name, evaluation_data=held, seq_length=LENGTH, total_steps=UPDATES, lr=LR,
        document_mask=True, batch_size=ROWS // replicas, **changes,
    )  # fmt: skip
    with Run(stages, replicas, told) as run:
        run.succeed()
    losses, norms, held_out = reference
    rows = read_metrics(tmp_path / "ck")
    torch.testing.assert_close([row["loss"] for row in rows], losses, rtol=1e-5, atol=0)
    torch.testing.assert_close([row["grad_norm"] for row in rows], norms, rtol=1e-5, atol=0)
    assert rows[-1]["eval_loss"] == pytest.approx(held_out, rel=1e-5)


def test_resuming_is_never_having_stopped(flags: Flags, tmp_path: Path) -> None:
    """Bit for bit, with a middle stage that gets positions alone; and the flag did act."""
    told = flags(document_mask=True, checkpoint_steps=3, gradient_accumulate_step=3)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    with Run(3, 1, {**told, "checkpoint_path": whole}) as run:
        run.succeed()
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoint_6")
    (cut / "latest").write_text("3")
    with Run(3, 1, {**told, "checkpoint_path": cut}) as run:
        run.succeed()
    with Run(1, 1, {**told, "checkpoint_path": tmp_path / "off", "document_mask": None}) as run:
        run.succeed()
    curves = [[(row["loss"], row["grad_norm"]) for row in read_metrics(f)] for f in (whole, cut, tmp_path / "off")]
    assert curves[0] == curves[1]
    assert curves[0][0] != pytest.approx(curves[2][0], rel=1e-4)
    for file in ("trainer.json", "optimizer/state-00004-of-00007.safetensors", "model-00007-of-00007.safetensors"):
        assert (cut / "checkpoint_6" / file).read_bytes() == (whole / "checkpoint_6" / file).read_bytes()
