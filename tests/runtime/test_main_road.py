"""The whole road by its real scripts: HF checkpoint → layer shards → several processes → a folder that HF loads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import REPO, flags_of, free_port, read_metrics
from tiny import make_model, make_task
from transformers import AutoModelForCausalLM, AutoTokenizer

DEADLINE_S = 120
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def script(*words: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, env=ENV, timeout=DEADLINE_S, cwd=REPO
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def launch(commands: list[list[str]], env: dict[str, str]) -> None:
    processes = [
        subprocess.Popen(words, env=env, cwd=REPO, stderr=subprocess.PIPE, text=True, start_new_session=True)
        for words in commands
    ]
    try:
        for process in processes:
            _, err = process.communicate(timeout=DEADLINE_S)
            assert process.returncode == 0, err
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(("family", "launcher"), [("gptj", "by hand"), ("llama", "torchrun")])
def test_the_whole_road(tmp_path: Path, family: str, launcher: str) -> None:
    source = make_model(tmp_path / "hf" / "tiny-model", family)
    task = make_task(tmp_path / "a.jsonl")
    script(f"converters/convert_from_hf_{family}.py", "--model-name", source, "--save-dir", tmp_path / "shards")
    shards = tmp_path / "shards" / "tiny-model"
    told = flags_of(
        {
            "model_name": shards,
            "tokenizer_name": shards,
            "model_type": family,
            "task_name": f"{task}:1.0",
            "checkpoint_path": tmp_path / "ck",
            "pipeline_group_size": 2,
            "num_layers": 3,
            "seq_length": 16,
            "batch_size": 4,
            "micro_batch_size": 2,
            "total_steps": 4,
            "lr": 1e-2,
            "use_cuda": "false",
        }
    )
    train = [str(REPO / "dist_train.py"), *told]
    if launcher == "by hand":
        url = f"tcp://127.0.0.1:{free_port()}"
        commands = [
            [sys.executable, *train, "--world-size", "2", "--rank", str(rank), "--dist-url", url] for rank in range(2)
        ]
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        commands = [[*torchrun, *train]]
    launch(commands, ENV)
    assert [row["step"] for row in read_metrics(tmp_path / "ck")] == [1, 2, 3, 4]

    script(
        f"converters/convert_to_hf_{family}.py", "--ckpt-path", tmp_path / "ck" / "checkpoint_4",
        "--save-path", tmp_path / "out", "--n-stages", 2, "--n-layer-per-stage", 3,
    )  # fmt: skip
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("the small red ball", return_tensors="pt").input_ids
    logits = [
        AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        for folder in (tmp_path / "out", tmp_path / "ck" / "checkpoint_4", source)
    ]
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])


def test_a_run_outlives_who_reads_it(tmp_path: Path) -> None:
    told = {
        "model_name": make_model(tmp_path / "model"), "task_name": make_task(tmp_path / "a.jsonl"), "rank": 0,
        "checkpoint_path": tmp_path / "ck", "seq_length": 16, "batch_size": 2, "micro_batch_size": 2, "log_steps": 1,
        "total_steps": 4, "lr": 1e-2, "use_cuda": "false", "dist_url": f"tcp://127.0.0.1:{free_port()}",
    }  # fmt: skip
    with subprocess.Popen(
        [sys.executable, REPO / "dist_train.py", *flags_of(told)], env=ENV, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline()
        process.stderr.close()
        try:
            assert process.wait(DEADLINE_S) == 0
        finally:
            process.kill()
    assert (tmp_path / "ck" / "latest").read_text() == "4"


def test_help_ends_well() -> None:
    assert "--pipeline-group-size" in script("dist_train.py", "--help")


def test_wrong_flags_are_told_together_a_line_each() -> None:
    told = "--model-name m --no-such 1 --lr fast --total-stesp 4 --batch-size 7 --rank 0 --world-size 2"
    done = subprocess.run(
        [sys.executable, "dist_train.py", *told.split(), "--pipeline-group-size", "2", "--task-name", "a.jsonl"],
        capture_output=True,
        text=True,
        cwd=REPO,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "farspan: rank 0: argument --lr: invalid float value: 'fast'",
        "farspan: rank 0: unknown flag --no-such; dist_train.py --help lists all of them",
        "farspan: rank 0: unknown flag --total-stesp: is it --total-steps?; dist_train.py --help lists all of them",
        "farspan: rank 0: --dist-url is needed: tcp://host:port of rank 0 (or start with torchrun, srun or mpirun)",
        "farspan: rank 0: --batch-size 7 is not a multiple of --micro-batch-size 8",
        "farspan: rank 0: --checkpoint-path is needed: the folder where the trained model is saved",
    ]
