"""Stopping and going on is the same as never stopping; a checkpoint is whole or it is not loaded."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from farspan.converters.hf import import_hf
from farspan.modules.manifest import FORMAT
from farspan.modules.shards import ShardStore, write_index
from farspan.runtime.data.chat import NAMED
from farspan.runtime.checkpoints.checkpoint import MANIFEST, CheckpointError, Progress, problem
from farspan.runtime.flags.config import Config
from farspan.runtime.data.continuity import brief
from farspan.runtime.setup.prepare import same_model, same_optimizer
from launch import RESUMABLE, Run, read_metrics
from safetensors.torch import load_file
from tiny import make_model, spell_as_before
from transformers import AutoModelForCausalLM

Flags = Callable[..., dict[str, Any]]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, the optimizer's too."""
    return {k: v for file in sorted(folder.rglob("*.safetensors")) for k, v in load_file(file).items()}


def curve(folder: Path) -> list[tuple[float, ...]]:
    return [tuple(row[key] for key in ("step", "loss", "lr", "grad_norm", "tokens")) for row in read_metrics(folder)]


def train(run_flags: dict[str, Any], stages: int = 2, replicas: int = 1) -> Path:
    with Run(stages, replicas, run_flags) as run:
        run.succeed()
    return Path(run_flags["checkpoint_path"])


def assert_same(a: Path, b: Path) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize(
    ("stages", "replicas", "changes"),
    [
        (2, 2, {}),
        (2, 1, {"bf16": True, "pp_mode": "1f1b"}),
        (2, 1, {"fp16": True, "initial_loss_scale": 2.0**20, "loss_scale_window": 2, "hysteresis": 1}),
        (1, 2, {"optimizer": "8bit-adam", "use_offload": True, "bf16": True}),
        (1, 1, {"optimizer": "adam-l2", "gradient_accumulate_step": 2, "total_steps": 12, "checkpoint_steps": 6}),
    ],
)
def test_resuming_is_never_having_stopped(
    flags: Flags, tmp_path: Path, stages: int, replicas: int, changes: dict[str, Any]
) -> None:
    """Bit for bit, in losses, weights, moments and the data's cursor."""
    told = flags(**{"checkpoint_steps": 3, "warmup_steps": 2, **changes})
    if changes.get("optimizer") == "8bit-adam":  # smaller matrices keep fp32 moments
        told["model_name"] = make_model(tmp_path / "wide", "gptneox", hidden_size=128, layers=1)
    whole = train({**told, "checkpoint_path": tmp_path / "whole"}, stages, replicas)
    last, half = told["total_steps"], told["checkpoint_steps"]
    # A run that lost all that came after its first checkpoint, as a kill would leave it.
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / f"checkpoint_{last}")
    (cut / "latest").write_text(str(half))
    train({**told, "checkpoint_path": cut}, stages, replicas)
    assert curve(cut) == curve(whole)
    assert_same(cut / f"checkpoint_{last}", whole / f"checkpoint_{last}")
    states = [json.loads((f / f"checkpoint_{last}" / "trainer.json").read_text()) for f in (cut, whole)]
    assert states[0] == states[1]


def test_another_optimizer_is_refused(flags: Flags, tmp_path: Path) -> None:
    """Its moments have the same names; `adam` is another name of `adamw`."""
    folder = train(flags(total_steps=2, optimizer="adam"), stages=1) / "checkpoint_2"
    assert json.loads((folder / "trainer.json").read_text())["optimizer"] == "adamw"
    with Run(1, 1, flags(optimizer="adam-l2")) as run:
        end = run.wait(60)[0]
    assert end.code == 1
    assert f"{folder} was written with --optimizer adamw, which a run cannot change halfway" in end.err
    train(flags(total_steps=3), stages=1)


@pytest.mark.parametrize("then", [None, "adamw", "adam-l2", "8bit-adam"])
@pytest.mark.parametrize("told", ["adam", "adamw", "adam-l2", "8bit-adam"])
def test_what_is_said_of_the_optimizer_of_a_checkpoint(then: str | None, told: str) -> None:
    config, progress = Config(optimizer=told), Progress(optimizer=then)
    if then not in (None, told, config.optimizer_kind):
        with pytest.raises(CheckpointError, match=f"ck was written with --optimizer {then}, which a run cannot"):
            same_optimizer(config, progress, Path("ck"))
        return
    notice = same_optimizer(config, progress, Path("ck"))
    # Before the kind was kept, only the flag can say that there may be anything to tell.
    assert (notice is not None) == (then is None and told == "adam")
    assert notice is None or "give --optimizer adam-l2" in notice


@pytest.mark.parametrize(
    ("added", "says"),
    [
        (
            list(NAMED["chatml"].tokens),
            "with 66 tokens, and now there are 64: give rank 0 the --chat-template chatml of",
        ),
        (["<a>", "<b>"], "give rank 0 the --special-tokens (or --chat-template) of before again"),
        ([], "is of another model than --model-name m"),
    ],
)
def test_tokens_that_a_missing_flag_added(model: Path, tmp_path: Path, added: list[str], says: str) -> None:
    """A vocabulary that has grown is no other model, and the flag that made it grow is named."""
    spec = ShardStore(model).spec
    grown, folder = spec.grown(66), tmp_path / "checkpoint_3"
    folder.mkdir()
    write_index(folder, grown, torch.float32)
    trainer = {"format": FORMAT, "data": {"drawn": 0, "made": {"--special-tokens": brief(added)}, "tasks": {}}}
    (folder / "trainer.json").write_text(json.dumps(trainer))
    same_model(Config(), grown, folder)
    with pytest.raises(CheckpointError, match=re.escape(says)):
        same_model(Config(model_name="m"), spec, folder)
    with pytest.raises(CheckpointError, match="is of another model"):
        same_model(Config(), ShardStore(make_model(tmp_path / "other", layers=2)).spec, folder)


def test_dropout_resumes_too(flags: Flags, tmp_path: Path) -> None:
    model = make_model(tmp_path / "drop", "gptneox", hidden_dropout=0.2, attention_dropout=0.1)
    told = flags(model_name=model, checkpoint_steps=3)
    whole = train({**told, "checkpoint_path": tmp_path / "whole"})
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    (cut / "latest").write_text("3")
    train({**told, "checkpoint_path": cut})
    assert curve(cut) == curve(whole)
    still = train({**flags(), "checkpoint_path": tmp_path / "still"})
    assert curve(still)[0] != curve(whole)[0]  # so dropout did act


@pytest.mark.parametrize(("stages", "replicas", "split"), [(1, 1, None), (3, 1, "1,3,1"), (2, 2, None), (4, 1, None)])
def test_another_grid_takes_over(flags: Flags, tmp_path: Path, stages: int, replicas: int, split: str | None) -> None:
    """From 2 stages to any other shape with the same global batch, the losses go on as they would have."""
    told = flags(checkpoint_steps=3, batch_size=4, micro_batch_size=1)
    whole = train({**told, "checkpoint_path": tmp_path / "whole"})
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    (cut / "latest").write_text("3")
    train({**told, "checkpoint_path": cut, "batch_size": 4 // replicas, "layer_split": split}, stages, replicas)
    torch.testing.assert_close(
        [row["loss"] for row in read_metrics(cut)], [row["loss"] for row in read_metrics(whole)], rtol=1e-5, atol=0
    )


def test_the_checkpoint_is_the_trained_model(flags: Flags, model: Path) -> None:
    """`from_pretrained` gives the logits of the weights that were trained, which are not those of the start."""
    folder = train(flags())
    ids = torch.arange(16)[None]
    trained, info = AutoModelForCausalLM.from_pretrained(folder / "checkpoint_6", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    before = AutoModelForCausalLM.from_pretrained(model)
    state = {k: v for k, v in weights(folder / "checkpoint_6").items() if ".exp_avg" not in k}
    before.load_state_dict({k.replace("embed_out", "lm_head"): v for k, v in state.items()})
    assert torch.equal(trained(ids).logits, before(ids).logits)
    assert not torch.equal(trained(ids).logits, AutoModelForCausalLM.from_pretrained(model)(ids).logits)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_to_one_rank_saves_and_ends_all(flags: Flags, tmp_path: Path, number: int, told: int) -> None:
    long = flags(total_steps=100_000, lr=1e-3)
    with Run(2, 1, long) as run:
        run.wait_for_step(5)
        run.signal(told, signal.Signals(number))
        run.succeed(30, status=RESUMABLE)
    step = int((tmp_path / "ck" / "latest").read_text())
    assert step >= 5
    assert read_metrics(tmp_path / "ck")[-1]["step"] == step
    with Run(2, 1, long) as run:  # and it goes on from there
        run.wait_for_step(step + 3)
    assert f"resuming from {tmp_path / 'ck' / f'checkpoint_{step}'}" in run.err(0)


def test_killed_at_any_moment_the_next_start_goes_on(flags: Flags, tmp_path: Path) -> None:
    """Kill all ranks at moments spread over steps and saves; in the end the run is the one that was never killed."""
    told = flags(total_steps=60, checkpoint_steps=2)
    whole = train({**told, "checkpoint_path": tmp_path / "whole"})
    cut = {**told, "checkpoint_path": tmp_path / "cut"}
    for goal in (5, 18, 33, 47):
        with Run(2, 1, cut) as run:
            run.wait_for_step(goal)
    train(cut)
    assert curve(tmp_path / "cut") == curve(whole)
    assert_same(tmp_path / "cut" / "checkpoint_60", whole / "checkpoint_60")


def test_a_finished_run_has_nothing_to_do(flags: Flags) -> None:
    folder = train(flags())
    rows = curve(folder)
    with Run(2, 1, flags()) as run:
        run.succeed()
    assert "nothing to do" in run.err(0)
    assert curve(folder) == rows


def test_load_checkpoint_false_starts_over(flags: Flags) -> None:
    rows = curve(train(flags()))
    with Run(2, 1, flags(load_checkpoint="false")) as run:
        run.succeed()
        assert "starting over; those in" in run.err(0)
    assert curve(run.folder) == rows


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (2, "model-00003-of-00007.safetensors"),
        (2, "optimizer/state-00007-of-00007.safetensors"),
        (1, "trainer.json"),
        (1, "model.safetensors.index.json"),
    ],
)
def test_a_flipped_byte_is_found_and_passed_over(flags: Flags, tmp_path: Path, number: int, name: str) -> None:
    """Only one rank reads some of these; all go on from the checkpoint before."""
    folder = train(flags(checkpoint_steps=3), number)
    file = folder / "checkpoint_6" / name
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with Run(number, 1, flags(checkpoint_steps=3)) as run:
        run.succeed()
    assert f"resuming from {folder / 'checkpoint_3'}" in run.err(0)
    assert f"passing over {folder / 'checkpoint_6'}" in run.err(0)
    assert f"{name} is damaged: its checksum is not what manifest.json says" in run.err(0)


def test_the_only_checkpoint_is_damaged(flags: Flags, tmp_path: Path) -> None:
    file = train(flags(total_steps=2)) / "checkpoint_2" / "optimizer/state-00004-of-00007.safetensors"
    file.write_bytes(b"x" * file.stat().st_size)
    with Run(2, 1, flags()) as run:
        ended = run.wait(60)
    for end in ended.values():
        assert end.code == 1
        assert "no checkpoint is complete for every rank" in end.err.splitlines()[-1]
        assert "optimizer/state-00004-of-00007.safetensors is damaged" in end.err.splitlines()[-1]


def test_a_checkpoint_path_that_is_a_file_is_named(flags: Flags, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    by_rank = {0: {"checkpoint_path": tmp_path / "file", "data_cache": tmp_path / "cache"}}
    with Run(1, 1, flags(), by_rank=by_rank) as run:
        end = run.wait(60)[0]
    assert end.code == 1
    assert "unexpected" not in end.err
    assert f"{tmp_path / 'file'}: File exists" in end.err


@pytest.mark.parametrize("harm", ["no manifest", "short file", "missing file"])
def test_a_damaged_checkpoint_is_passed_over(flags: Flags, tmp_path: Path, harm: str) -> None:
    folder = train(flags(checkpoint_steps=3))
    newest = folder / "checkpoint_6"
    assert problem(newest) is None
    file = newest / "optimizer/state-00004-of-00007.safetensors"
    if harm == "no manifest":
        (newest / MANIFEST).unlink()
    elif harm == "short file":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    assert problem(newest) is not None
    with Run(2, 1, flags(checkpoint_steps=3)) as run:
        run.succeed()
    assert f"resuming from {folder / 'checkpoint_3'}" in run.err(0)
    assert f"passing over {newest}" in run.err(0)
    assert problem(newest) is None  # written anew


def test_each_rank_with_a_folder_of_its_own(flags: Flags, model: Path, tmp_path: Path) -> None:
    """Two sites, no shared file system: each keeps its own layers, and they resume together."""
    sites = {rank: {"checkpoint_path": tmp_path / f"site{rank}"} for rank in range(2)}
    told = flags(checkpoint_steps=3, checkpoint_path=tmp_path / "logs")
    with Run(2, 1, told, by_rank=sites) as run:
        run.succeed()
    files = [
        {f.name for f in (tmp_path / f"site{rank}" / "checkpoint_6").glob("*-0*.safetensors")} for rank in range(2)
    ]
    assert "model-00002-of-00007.safetensors" in files[0]
    assert "model-00002-of-00007.safetensors" not in files[1]
    for rank in range(2):
        (tmp_path / f"site{rank}" / "latest").write_text("3")
    before = curve(tmp_path / "site0")
    with Run(2, 1, told, by_rank=sites) as run:
        run.succeed()
    assert curve(tmp_path / "site0") == before
    shutil.rmtree(tmp_path / "site1")
    with Run(2, 1, told, by_rank=sites) as run:
        ended = run.wait(30)
    assert all(end.code == 1 for end in ended.values())
    assert "rank 1" in ended[0].err
    assert "no checkpoint is complete for every rank" in ended[0].err


def test_checkpoints_of_before_go_on(flags: Flags, tmp_path: Path) -> None:
    """Their weights and moments lay side by side, as block-00000.safetensors and block-00000.optim.safetensors."""
    told = flags(checkpoint_steps=3)
    whole = train({**told, "checkpoint_path": tmp_path / "whole"})
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    (cut / "latest").write_text("3")
    spell_as_before(cut / "checkpoint_3")
    assert (cut / "checkpoint_3" / "block-00000.optim.safetensors").is_file()
    train({**told, "checkpoint_path": cut})
    assert curve(cut) == curve(whole)
    assert_same(cut / "checkpoint_6", whole / "checkpoint_6")


def test_every_safetensors_file_of_a_checkpoint_is_the_model(flags: Flags, model: Path) -> None:
    """Tools that glob take no moment for a weight, and miss none."""
    folder = train(flags(total_steps=1)) / "checkpoint_1"
    found = [name for file in folder.glob("*.safetensors") for name in load_file(file)]
    assert sorted(found) == sorted(load_file(model / "model.safetensors"))
    by_prefix = [path for path in folder.glob("model*.safetensors")]
    assert len(by_prefix) == len(list(folder.glob("*.safetensors"))) == 7
    moments = {name for file in folder.glob("optimizer/*.safetensors") for name in load_file(file)}
    assert {f"{name}.exp_avg" for name in found} < moments


def test_a_stage_starts_with_its_own_shards_alone(flags: Flags, model: Path, tmp_path: Path) -> None:
    shards = import_hf("gptneox", str(model), tmp_path / "shards")
    by_rank: dict[int, dict[str, Any]] = {}
    for rank, theirs in enumerate(((5, 6, 7), (1, 2, 4))):
        site = tmp_path / f"shards{rank}"
        shutil.copytree(shards, site)
        for number in theirs:
            (site / f"model-{number:05d}-of-00007.safetensors").unlink()
        by_rank[rank] = {"model_name": site}
    by_rank[1]["task_name"] = None  # rank 0 alone needs the data
    with Run(2, 1, flags(), by_rank=by_rank) as run:
        run.succeed()
    own = curve(tmp_path / "ck")
    assert own == curve(train({**flags(), "checkpoint_path": tmp_path / "shared"}))
