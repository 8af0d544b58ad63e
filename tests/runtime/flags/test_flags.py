"""Flags that no other test is about; and that there is no flag without a test."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from chars import Chars, text_of, write
from farspan.modules.shards import ShardStore
from farspan.pipeline.stage import Stage
from farspan.runtime.data.open_tasks import open_tasks
from farspan.runtime.data.tokenizer import Vocabulary
from farspan.runtime.flags.config import Config
from farspan.runtime.optim.optimizer import Optimizer
from faults import slow_forward, slow_to_open
from launch import REPO, Run

Flags = Callable[..., dict[str, Any]]


def test_every_flag_is_in_a_test() -> None:
    words = "\n".join(path.read_text() for path in (REPO / "tests").rglob("test_*.py"))
    for field in fields(Config):
        dashed = "--" + field.name.replace("_", "-")
        named = (f"{field.name}=", f'"{field.name}"', f'{dashed}"', f"{dashed} ", f'{dashed.removeprefix("--")}"')
        assert any(word in words for word in named), f"no test says anything of {dashed}"


@pytest.mark.parametrize("told", [{"adam_beta1": 0.5}, {"adam_beta2": 0.9}, {"adam_eps": 0.1}], ids=str)
def test_adams_constants(model: Path, told: dict[str, float]) -> None:
    """Two updates are torch's own with these constants, and not with the default ones."""

    def trained(config: Config) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        store = ShardStore(model)
        stage = Stage(store.spec, range(1, 2), dtype=torch.float32, device=torch.device("cpu"))
        optimizer = Optimizer(stage, config)
        start = []
        for index, (tensor, view) in enumerate(zip(optimizer.tensors, optimizer.gradients.views, strict=True)):
            generator = torch.Generator().manual_seed(index)
            optimizer.set_weight(index, torch.randn(tensor.parameter.shape, generator=generator))
            start.append(tensor.parameter.detach().clone())
            view.copy_(torch.randn(view.shape, generator=generator))
        optimizer.step(0.1, 1.0)
        for view in optimizer.gradients.views:
            view.neg_().mul_(0.5)
        optimizer.step(0.1, 1.0)
        return start, [tensor.parameter.detach() for tensor in optimizer.tensors]

    config = Config(weight_decay=0.0, **told)  # type: ignore[arg-type]
    start, ours = trained(config)
    _, usual = trained(Config(weight_decay=0.0))
    for index, (before, after, default) in enumerate(zip(start, ours, usual, strict=True)):
        weight = torch.nn.Parameter(before)
        generator = torch.Generator().manual_seed(index)
        torch.randn(weight.shape, generator=generator)
        gradient = torch.randn(weight.shape, generator=generator)
        torchs = torch.optim.AdamW(
            [weight], lr=0.1, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps, weight_decay=0.0
        )
        for factor in (1.0, -0.5):
            weight.grad = factor * gradient
            torchs.step()
        torch.testing.assert_close(after, weight.detach())
        assert not torch.allclose(after, default)


def test_document_separator(model: Path, tmp_path: Path) -> None:
    """As it is typed in a shell: \\n is a line break; it stands before each document."""
    config = Config(model_name=str(model), document_separator=r"\n\t|")
    frame = Vocabulary(config).frame
    write(tmp_path / "a.jsonl", ["ab", "ab"])
    task = Config(task_name=str(tmp_path / "a.jsonl"), seq_length=10, data_cache=str(tmp_path), wire_timeout=60.0)
    mixture = open_tasks(task, Chars(frame))  # type: ignore[arg-type]
    assert text_of(mixture.draw(1).tokens) == "\n\t|ab\n\t|ab"


def test_only_debug_shows_tracebacks(flags: Flags, tmp_path: Path) -> None:
    for debug in (False, True):
        with Run(1, 1, flags(model_name=tmp_path / "nowhere", debug=debug or None)) as run:
            ended = run.wait(60)[0]
        assert ended.code == 1
        assert ("Traceback" in ended.err) == debug, ended.err
        assert ended.err.splitlines()[-1].startswith("farspan: rank 0: ")


def test_no_wait_outlasts_the_wire_timeout(flags: Flags) -> None:
    """A rank that computes for ever, and whose heart goes on beating, is named by who waits for it."""
    with Run(2, 1, flags(wire_timeout=2.0), faults={1: partial(slow_forward, 60.0)}) as run:
        ended = run.wait(40)
    assert all(end.code == 1 for end in ended.values())
    assert "receiving gradients" in ended[0].err
    assert "rank 1" in ended[0].err
    assert "after 2." in ended[0].err, ended[0].err


def test_random_weights_need_none_on_disk(flags: Flags, model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "model.safetensors").unlink()
    with Run(2, 1, flags(model_name=bare, load_pretrained_model="false", total_steps=2)) as run:
        run.succeed()
    assert (tmp_path / "ck" / "latest").read_text() == "2"


def test_the_join_timeout_is_for_joining(flags: Flags) -> None:
    """Opening a large data set on rank 0 may take longer: the others are there, and wait."""
    with Run(2, 1, flags(join_timeout=5.0, total_steps=1), faults={0: partial(slow_to_open, 7.0)}) as run:
        run.succeed()


def test_a_rank_whose_data_is_slow_is_named_as_that(flags: Flags) -> None:
    with Run(2, 1, flags(wire_timeout=2.0), faults={0: partial(slow_to_open, 60.0)}) as run:
        ended = run.wait(40)
    assert ended[1].code == 1
    assert "rank 0 has not come to 'site nonce' within 2 s; is its disk or its data slow?" in ended[1].err
    assert "A longer --wire-timeout" in ended[1].err
    assert "were all" not in ended[1].err
