"""fp16: the loss scale follows its rules, leaves no trace in the numbers; an overflow skips everywhere or nowhere."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from farspan.runtime.flags.config import Config
from farspan.runtime.optim.precision import LossScaler
from faults import inf_gradient
from launch import Run, read_metrics
from safetensors.torch import load_file

Flags = Callable[..., dict[str, Any]]


def scaler(**told: Any) -> LossScaler:  # noqa: ANN401 - whatever a flag takes
    made = LossScaler.of(Config(fp16=True, **told))
    assert made is not None
    return made


def scales(made: LossScaler, verdicts: str) -> list[float]:
    """The scale after each update: `.` is a clean one, `x` an overflow."""
    seen = []
    for verdict in verdicts:
        made.update(verdict == ".")
        seen.append(made.scale)
    return seen


@pytest.mark.parametrize(
    ("told", "verdicts", "expected"),
    [
        ({"loss_scale_window": 3}, "......", [8, 8, 16, 16, 16, 32]),
        ({"loss_scale_window": 3, "hysteresis": 1}, "..x...", [8, 8, 4, 4, 4, 8]),  # an overflow restarts the window
        ({"hysteresis": 2}, "xxx", [8, 4, 2]),  # the first one is forgiven
        ({"hysteresis": 2}, "x.x.x", [8, 8, 4, 4, 2]),  # and only a whole window brings forgiveness back
        ({"hysteresis": 2, "loss_scale_window": 2}, "x..xx", [8, 8, 16, 16, 8]),
        ({"hysteresis": 1, "min_loss_scale": 3}, "xxxx", [4, 3, 3, 3]),
        ({"loss_scale": 100, "loss_scale_window": 1}, ".x.x", [100, 100, 100, 100]),
    ],
)
def test_the_scale_follows_its_rules(told: dict[str, Any], verdicts: str, expected: list[float]) -> None:
    assert scales(scaler(initial_loss_scale=8.0, **told), verdicts) == expected


def test_without_hysteresis_it_is_torchs_own() -> None:
    ours = scaler(hysteresis=1, loss_scale_window=4, min_loss_scale=2.0**-90)
    theirs, tracker = torch.tensor(32768.0), torch.tensor(0, dtype=torch.int32)
    rng = random.Random(0)
    for _ in range(200):
        overflow = rng.random() < 0.3
        ours.update(not overflow)
        torch._amp_update_scale_(theirs, tracker, torch.tensor(float(overflow)), 2.0, 0.5, 4)
        assert (ours.scale, ours.clean) == (theirs.item(), tracker.item())


def test_a_state_goes_on_where_it_was() -> None:
    verdicts = "x..x....xx..x......."
    for cut in range(len(verdicts)):
        whole, half = scaler(loss_scale_window=3), scaler(loss_scale_window=3)
        expected = scales(whole, verdicts)
        scales(half, verdicts[:cut])
        taken = LossScaler.of(Config(fp16=True, loss_scale_window=3), half.state())
        assert taken is not None
        assert scales(taken, verdicts[cut:]) == expected[cut:]
        assert taken.state() == whole.state()


@pytest.mark.parametrize("told", [{"loss_scale": 4.0}, {"initial_loss_scale": 4.0, "hysteresis": 1}])
def test_overflows_that_no_scale_ends_are_hopeless(told: dict[str, Any]) -> None:
    made = scaler(**told)
    scales(made, "x" * 19 + ".")
    scales(made, "x" * 19)
    assert not made.hopeless
    scales(made, "xxx")
    assert made.hopeless


def test_only_fp16_is_scaled() -> None:
    assert LossScaler.of(Config(bf16=True)) is None
    assert LossScaler.of(Config()) is None


def train(run_flags: dict[str, Any], folder: Path, stages: int = 1, replicas: int = 1, **options: Any) -> list[dict]:  # noqa: ANN401
    with Run(stages, replicas, {**run_flags, "checkpoint_path": folder}, **options) as run:
        run.succeed()
    return read_metrics(folder)


def test_fp16_sees_what_fp32_sees_whatever_the_scale(flags: Flags, tmp_path: Path) -> None:
    exact = train(flags(), tmp_path / "fp32")
    for scale in (64.0, 8192.0):
        half = train(flags(fp16=True, loss_scale=scale), tmp_path / f"{scale}")
        for key in ("loss", "grad_norm"):
            assert [row[key] for row in half] == pytest.approx([row[key] for row in exact], rel=1e-2), key
        assert [row["loss_scale"] for row in half] == [scale] * 6
        # Adam's steps hardly show a factor on all gradients; its moments do.
        want, have = (weights(tmp_path / name / "checkpoint_6") for name in ("fp32", f"{scale}"))
        for name in want:
            if ".exp_avg" in name:
                assert (want[name] - have[name]).norm() <= 0.05 * want[name].norm() + 1e-12, name
    assert "loss_scale" not in exact[0]


def test_a_scale_that_is_too_large_comes_down_and_training_recovers(flags: Flags, tmp_path: Path) -> None:
    """No fault is injected: at 2^28 the gradients of the logits do not fit into fp16."""
    told = flags(fp16=True, initial_loss_scale=2.0**28, hysteresis=2, loss_scale_window=6, total_steps=24)
    told |= {"warmup_steps": 4, "max_grad_norm": 1.0}
    rows = train(told, tmp_path / "ck", 2, 2)
    expected = scaler(initial_loss_scale=2.0**28, loss_scale_window=6)
    applied = 0
    for before, row in zip([{"skipped": 0}, *rows], rows, strict=False):
        finite = row["skipped"] == before["skipped"]
        assert row["loss_scale"] == expected.scale
        assert (row["grad_norm"] is not None) == finite
        # The learning rate waits for the skipped updates.
        assert row["lr"] == pytest.approx(3e-3 * (applied / 4 if applied < 4 else (24 - applied) / 20))
        expected.update(finite)
        applied += finite
    assert 4 <= rows[-1]["skipped"] <= 16
    assert rows[0]["grad_norm"] is None
    assert rows[-1]["loss"] < rows[0]["loss"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.rglob("*.safetensors")) for k, v in load_file(file).items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("mode", ["allreduce", "zero1"])
def test_an_inf_in_one_stage_of_one_replica_skips_the_update_everywhere(
    flags: Flags, tmp_path: Path, mode: str
) -> None:
    """Whichever rank it hits, the run is the same bit for bit: nobody updated, and nobody's scale differs."""
    told = flags(fp16=True, checkpoint_steps=1, hysteresis=1, total_steps=5, dp_mode=mode)
    runs = []
    for rank in (1, 2):  # the last stage of replica 0, the first stage of replica 1
        folder = tmp_path / str(rank)
        rows = train(told, folder, 2, 2, faults={rank: partial(inf_gradient, 2)})
        assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1]
        assert [row["loss_scale"] for row in rows] == [32768.0] * 3 + [16384.0] * 2
        assert_same(weights(folder / "checkpoint_2"), weights(folder / "checkpoint_3"))
        assert rows[4]["grad_norm"] is not None
        runs.append(([(row["loss"], row["grad_norm"]) for row in rows], weights(folder / "checkpoint_5")))
    assert runs[0][0] == runs[1][0]
    assert_same(runs[0][1], runs[1][1])


def test_without_a_loss_scale_an_inf_ends_the_run(flags: Flags) -> None:
    with Run(2, 1, flags(bf16=True), faults={1: partial(inf_gradient, 2)}) as run:
        ended = run.wait()
    for end in ended.values():
        assert end.code == 1
        assert "update 3: the gradient norm is inf" in end.err


def test_overflows_at_the_lowest_scale_end_the_run(flags: Flags) -> None:
    with Run(1, 1, flags(fp16=True, loss_scale=2.0**40, total_steps=60)) as run:
        ended = run.wait()
    assert ended[0].code == 1
    assert "update 20: the gradient norm is" in ended[0].err
    assert read_metrics(run.folder)[-1]["skipped"] == 19
