"""Flags, files and models that cannot be: one clear line on the rank that knows, and no rank is left running or ends
with 0. What goes wrong between ranks is in `test_faults.py`."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from farspan.comm.meeting.store import StoreClient
from farspan.converters.hf import import_hf
from faults import signalled, worker_lost
from launch import RESUMABLE, Ended, Run
from tiny import make_model

Flags = Callable[..., dict[str, Any]]
TOGETHER_S = 15.0
LOST_S = 10.0


def ended_together(run: Run, within_s: float = TOGETHER_S) -> dict[int, Ended]:
    ended = run.wait(60)
    for rank, end in ended.items():
        assert end.code not in (0, -signal.SIGKILL), f"rank {rank} ended with {end.code}:\n{end.err}"
        assert "Traceback" not in end.err, f"rank {rank}:\n{end.err}"
        assert "farspan: " in end.err, f"rank {rank} said nothing"
    times = [end.at for end in ended.values()]
    assert max(times) - min(times) < within_s
    return ended


def last_line(end: Ended) -> str:
    return next(line for line in reversed(end.err.splitlines()) if line.startswith("farspan: "))


def fails(run_flags: dict[str, Any], who: int, *words: str, stages: int = 2, **options: Any) -> None:  # noqa: ANN401
    with Run(stages, 1, run_flags, **options) as run:
        ended = ended_together(run)
    line = last_line(ended[who])
    for word in words:
        assert word in line, line


def test_wrong_folder(flags: Flags, tmp_path: Path) -> None:
    fails(flags(), 1, "nowhere", by_rank={1: {"model_name": tmp_path / "nowhere"}})


def test_wrong_folder_on_the_master(flags: Flags, tmp_path: Path) -> None:
    fails(flags(), 0, "nowhere", by_rank={0: {"model_name": tmp_path / "nowhere"}})


def test_the_other_ranks_name_the_first_cause(flags: Flags, tmp_path: Path) -> None:
    fails(flags(), 0, "First cause: rank 1", "nowhere", by_rank={1: {"model_name": tmp_path / "nowhere"}})


def test_missing_shard(flags: Flags, model: Path, tmp_path: Path) -> None:
    shards = import_hf("gptneox", str(model), tmp_path / "shards")
    (shards / "model-00006-of-00007.safetensors").unlink()
    fails(flags(model_name=shards), 1, "model-00006-of-00007.safetensors", "missing")


def test_wrong_model_type(flags: Flags) -> None:
    fails(flags(model_type="llama"), 0, "--model-type llama", "gptneox")


def test_world_is_not_the_grid(flags: Flags) -> None:
    fails(flags(world_size=3), 0, "--world-size 3", "2")


def test_batch_not_divisible(flags: Flags) -> None:
    fails(flags(batch_size=5), 1, "--batch-size 5", "--micro-batch-size 2")


def test_a_bad_flag_on_one_rank_ends_all(flags: Flags) -> None:
    fails(flags(), 0, "rank 1", "--batch-size 5", by_rank={1: {"batch_size": 5}})


def test_several_bad_flags_are_one_line_to_the_others(flags: Flags) -> None:
    told = {1: {"batch_size": 5, "no_such": 1}}
    fails(flags(), 0, "rank 1: unknown flag --no-such", "(and 1 more, which it has printed)", by_rank=told)


def test_a_bad_flag_on_the_master_ends_all(flags: Flags) -> None:
    fails(flags(), 1, "rank 0", "--no-such-flag", by_rank={0: {"no_such_flag": 1}})


def test_what_is_wrong_is_said_once_though_nobody_else_is_there(flags: Flags) -> None:
    with Run(2, 1, flags(no_such_flag=1), ranks=[0]) as run:
        ended = run.wait(60)[0]
    assert ended.code == 2
    assert ended.err.count("--no-such-flag") == 1, ended.err


def test_a_second_interrupt_while_waiting_for_others(flags: Flags) -> None:
    with Run(2, 1, flags(), ranks=[0]) as run:
        StoreClient("127.0.0.1", run.port, 1, b"", 60.0).get("handshake/0")  # it waits for rank 1
        run.signal(0, signal.SIGINT)
        for _ in range(100):
            time.sleep(0.1)
            if "farspan: " in run.err(0):  # at once, though it waits for the other rank to come and hear of it
                break
        run.signal(0, signal.SIGINT)
        ended = run.wait(30)[0]
    assert ended.code == RESUMABLE
    assert "Traceback" not in ended.err
    assert ended.err.count("stopped by SIGINT before the first step") == 1, ended.err


def test_no_tokenizer(flags: Flags, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    fails(flags(tokenizer_name=tmp_path / "none"), 0, "--tokenizer-name", "no tokenizer")


def test_sequence_past_the_positions(flags: Flags) -> None:
    fails(flags(seq_length=65), 0, "--seq-length 65", "64 positions")


def test_empty_task_file(flags: Flags, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    fails(flags(task_name=tmp_path / "empty.jsonl"), 0, "empty.jsonl is empty")


def test_malformed_line(flags: Flags, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "the sun"}\n{"text": \n')
    fails(flags(task_name=tmp_path / "bad.jsonl"), 0, "bad.jsonl:2", "not JSON")


def test_more_stages_than_layers(flags: Flags, tmp_path: Path) -> None:
    model = make_model(tmp_path / "short", "gptneox", layers=1)
    fails(flags(model_name=model), 1, "--pipeline-group-size 2", "1 layers")


def test_a_split_that_drops_a_layer(flags: Flags) -> None:
    fails(flags(num_layers=2), 0, "--num-layers 2", "5 layers", "--num-layers 3")


def test_a_lost_rank_is_the_first_cause_though_a_worker_died_with_it(flags: Flags, tmp_path: Path) -> None:
    """Who kills all processes of a job hits a worker of rank 0 first, and others a moment later."""
    hit = {
        0: partial(worker_lost, "in a step"),
        1: partial(signalled, "in a step", signal.SIGKILL, str(tmp_path / "t")),
    }
    with Run(2, 1, flags(heartbeat_period=3), faults=hit) as run:
        ended = run.wait()[0]
    assert "farspan: rank 0: lost rank 1" in ended.err
    assert "--data-workers" not in ended.err


def test_backend_that_is_not_there(flags: Flags) -> None:
    fails(flags(dist_backend="nccl"), 0, "--dist-backend nccl", "gloo")


def test_broken_latest(flags: Flags, tmp_path: Path) -> None:
    (tmp_path / "ck" / "checkpoint_4").mkdir(parents=True)
    (tmp_path / "ck" / "latest").write_text("4")
    fails(flags(), 0, "checkpoint_4", "manifest.json")


def test_weights_of_another_shape(flags: Flags, model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    fails(flags(model_name=other), 0, "model.safetensors", "128", "64")


def test_two_versions_of_a_tied_matrix(flags: Flags, tmp_path: Path) -> None:
    here, there = (make_model(tmp_path / str(seed), "llama", seed=seed, tie_word_embeddings=True) for seed in (1, 2))
    told = "the weights differ: model.embed_tokens.weight is not the same on rank 0 and rank 1"
    fails(flags(model_name=here), 0, told, by_rank={1: {"model_name": there}})


def test_weights_that_are_no_numbers_are_not_saved(flags: Flags, tmp_path: Path) -> None:
    fails(flags(lr=1e39, total_steps=1), 1, "no longer finite", "not saved", "lower --lr")
    assert not (tmp_path / "ck" / "latest").exists()


def test_a_run_in_which_every_update_overflows(flags: Flags, tmp_path: Path) -> None:
    fails(flags(fp16=True, loss_scale=1e38, total_steps=2), 0, "all 2 updates overflowed", "--loss-scale")


def test_diverging(flags: Flags) -> None:
    fails(flags(lr=1e30, max_grad_norm=0, total_steps=40), 0, "gradient norm", "lower --lr")
