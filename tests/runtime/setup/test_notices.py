"""What a run says of flags that are likely not meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from farspan.runtime.checkpoints.checkpoint import Progress
from farspan.runtime.flags.config import Config, ConfigError
from farspan.runtime.setup.notices import notices, other_batch
from farspan.runtime.setup.prepare import open_model
from launch import Run

Flags = Callable[..., dict[str, Any]]


def test_a_learning_rate_that_ruins_pretrained_weights() -> None:
    (line,) = notices(Config(lr=0.01), "cpu")
    assert line.startswith("--lr 0.01 is likely to ruin pretrained weights: 1e-5 is usual")
    assert notices(Config(lr=1e-3), "cpu") == []
    assert notices(Config(lr=0.01, load_pretrained_model=False), "cpu") == []
    assert notices(Config(), "cpu") == []  # the default is none of these
    assert Config().lr == 1e-5


@pytest.mark.parametrize(
    ("told", "device", "said"),
    [
        ({}, "cuda", True),
        ({}, "cpu", False),
        ({"bf16": True}, "cuda", False),
        ({"fp16": True}, "cuda", False),
        ({"pp_mode": "1f1b"}, "cuda", False),
    ],
)
def test_gpipe_in_fp32_on_a_gpu(told: dict[str, Any], device: str, said: bool) -> None:
    lines = notices(Config(**told), device)
    assert len(lines) == said
    assert all("--bf16" in line and "--pp-mode 1f1b" in line for line in lines)


def batch_line(then: int | None, **told: Any) -> str | None:  # noqa: ANN401 - whatever a flag takes
    return other_batch(Config(total_steps=8, micro_batch_size=2, **told), Progress(global_batch=then))


def test_another_global_batch() -> None:
    assert batch_line(8, batch_size=4, data_group_size=2) is None
    assert batch_line(8, batch_size=8, data_group_size=1) is None  # another number of replicas, the same batch
    assert batch_line(None, batch_size=4, data_group_size=2) is None  # of before it was kept
    assert batch_line(8, batch_size=8, data_group_size=2) == (
        "a step takes 16 sequences now (--batch-size 8 × --data-group-size 2) and took 8 before: the data goes on with "
        "the very next sequence, --total-steps stays, and the learning rate goes by steps, so the run reads another "
        "amount of text; --batch-size 4 keeps 8"
    )
    uneven = batch_line(8, batch_size=8, data_group_size=3)
    assert uneven is not None
    assert uneven.endswith("another amount of text")  # no --batch-size keeps it
    epochs = other_batch(Config(nepochs=2, batch_size=8, micro_batch_size=8), Progress(global_batch=4))
    assert epochs is not None
    assert "--nepochs is counted as if all steps had taken so many" in epochs


def test_a_run_says_them(flags: Flags) -> None:
    with Run(1, 1, flags(total_steps=1)) as run:
        run.succeed()
    assert "--lr 0.003 is likely to ruin pretrained weights" in run.err(0)
    assert "a step takes" not in run.err(0)
    with Run(1, 2, flags(total_steps=2)) as run:
        run.succeed()
    assert "a step takes 8 sequences now (--batch-size 4 × --data-group-size 2) and took 4 before" in run.err(0)
    assert "--batch-size 2 keeps 4" in run.err(0)
    assert "a step takes" not in run.err(1)


@pytest.mark.parametrize(
    ("name", "told", "script"),
    [
        ("EleutherAI/gpt-j-6B", {}, "gptj"),
        ("EleutherAI/pythia-70m", {}, "gptneox"),
        ("openlm-research/open_llama_3b", {}, "llama"),
        ("me/mine", {"model_type": "llama"}, "llama"),
    ],
)
def test_a_name_on_the_hub_is_pointed_to_its_converter(
    name: str, told: dict[str, Any], script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        open_model(Config(model_name=name, **told))
    assert f"python converters/convert_from_hf_{script}.py --model-name {name} --save-dir pretrained_models" in str(
        caught.value
    )
    assert str(caught.value).endswith(f"--model-name pretrained_models/{name.replace('/', '_')}")
