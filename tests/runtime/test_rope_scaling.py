"""--rope-scaling: rows longer than the model's positions, from the flag to a folder that transformers loads."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from farspan.converters.hf import export_hf
from farspan.runtime.flags.config import Config, ConfigError
from farspan.runtime.setup.prepare import check_model, open_model
from launch import Run
from tiny import make_model
from transformers import AutoModelForCausalLM

Flags = Callable[..., dict[str, Any]]


def test_a_run_with_rows_twice_as_long_as_the_model(flags: Flags, tmp_path: Path) -> None:
    told = flags(seq_length=128, rope_scaling="yarn:2", total_steps=2, checkpoint_steps=1)
    with Run(2, 1, told) as run:
        run.succeed()
    folder = tmp_path / "ck" / "checkpoint_2"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.rope_parameters["rope_type"] == "yarn"
    assert model.config.max_position_embeddings == 128
    exported = AutoModelForCausalLM.from_pretrained(export_hf("gptneox", folder, tmp_path / "out"))
    ids = torch.arange(100)[None] % 20
    assert torch.equal(exported(ids).logits, model(ids).logits)

    for other, now in ((None, "none"), ("linear:2", "linear:2")):
        with Run(1, 1, {**told, "rope_scaling": other, "seq_length": 64, "total_steps": 3}) as run:
            end = run.wait(60)[0]
        assert end.code == 1
        assert f"{folder} was trained with --rope-scaling yarn:2, and now it is {now}, which makes" in end.err
    with Run(1, 1, {**told, "total_steps": 3}) as run:
        run.succeed()
    # The folder knows its scaling: a run that begins from it needs no flag.
    begun = {**told, "model_name": folder, "rope_scaling": None, "checkpoint_path": tmp_path / "begun"}
    with Run(1, 1, {**begun, "total_steps": 1, "checkpoint_steps": 0}) as run:
        run.succeed()


def refusal(model: Path, **told: Any) -> str:  # noqa: ANN401 - whatever a flag takes
    config = Config(model_name=str(model), **told)
    with pytest.raises(ConfigError) as caught:
        check_model(config, open_model(config)[1])
    return str(caught.value)


def test_too_long_a_row_names_what_would_take_it(model: Path, tmp_path: Path) -> None:
    llama = make_model(tmp_path / "llama", "llama")
    assert refusal(llama, seq_length=150).endswith("; --rope-scaling linear:3, dynamic:3 or yarn:3 lets it take them")
    # With 2 turning dimensions in a head there is no dynamic scaling, and it is not offered.
    start = "--seq-length 150 is more than the model's"
    where = re.escape(f"({model}/config.json)")
    assert re.fullmatch(
        f"{start} 64 positions {where}; --rope-scaling linear:3 or yarn:3 lets it take them",
        refusal(model, seq_length=150),
    )
    assert re.fullmatch(
        f"{start} 128 positions with --rope-scaling linear:2 {where}; --rope-scaling linear:3 lets it take them",
        refusal(model, seq_length=150, rope_scaling="linear:2"),
    )


def test_a_gptj_has_no_such_way(tmp_path: Path) -> None:
    gptj = make_model(tmp_path / "gptj", "gptj")
    assert refusal(gptj, seq_length=65).endswith(f"64 positions ({gptj}/config.json)")
    assert refusal(gptj, seq_length=65, rope_scaling="linear:2") == (
        f"--rope-scaling linear:2: the rotary positions of a gptj cannot be scaled ({gptj}/config.json)"
    )
