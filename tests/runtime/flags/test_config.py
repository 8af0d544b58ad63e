"""Flags: old scripts run, unknown flags do not, launchers fill in what is absent, and each refusal names its flag."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
from farspan.runtime.flags.config import Config, ConfigError, parse, parser
from farspan.runtime.flags.other_flags import OURS
from farspan.runtime.flags.validation import validate

GOOD = [
    *("--model-name", "m", "--tokenizer-name", "m", "--task-name", "a.jsonl:0.5,b.jsonl", "--checkpoint-path", "c"),
    *("--total-steps", "8", "--batch-size", "8", "--micro-batch-size", "2", "--seq-length", "32", "--rank", "1"),
    *("--dist-url", "tcp://127.0.0.1:9000", "--world-size", "4"),
    *("--pipeline-group-size", "2", "--data-group-size", "2"),
]


def config(extra: str = "", env: dict[str, str] | None = None) -> Config:
    made, _ = parse([*GOOD, *extra.split()], env or {})
    validate(made)
    return made


def test_the_tutorials_flags_are_all_known() -> None:
    old = (
        "--model-type gptneox --optimizer adam --num-layers 6 --embedding-dim 64 --load-pretrained-model true "
        "--checkpoint-steps 100 --warmup-steps 1 --lr 1e-5 --gradient-accumulate-step 2 --dp-backend gloo "
        "--dp-mode allreduce --pp-mode gpipe --profiling no-profiling --net-interface lo --cuda-id 0 --num-heads 4 "
        "--load-checkpoint true --project-name p --train-log-backend print --use-cuda false --seed 3"
    )
    made = config(old)
    assert (made.num_layers, made.lr, made.optimizer, made.load_checkpoint) == (6, 1e-5, "adam", True)
    assert made.updates == 4


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--no-such 1", "unknown flag --no-such"),
        ("--learning-rate 1", "unknown flag --learning-rate: is it --lr?"),
        ("--per_device_train_batch_size 1", "unknown flag --per_device_train_batch_size: is it --batch-size?"),
        ("--checkp c", "unknown flag --checkp"),  # no abbreviations either
        ("--fp16 --bf16", "--fp16 and --bf16 exclude each other"),
        ("--bucket-mb 0", "--bucket-mb 0.0 must be at least 0.001"),
        ("--optimizer 8bit-adam --dp-mode zero1", "--optimizer 8bit-adam has one scale for 256 elements"),
        ("--lr fast", "--lr"),
        ("--pp-mode zigzag", "--pp-mode"),
        ("--load-checkpoint maybe", "true or false"),
        ("--batch-size 7", "--batch-size 7 is not a multiple of --micro-batch-size 2"),
        ("--world-size 3", "--world-size 3 is not --pipeline-group-size 2 × --data-group-size 2 = 4"),
        ("--rank 4", "--rank 4 is not below --world-size 4"),
        ("--total-steps 0", "--total-steps is needed"),
        ("--gradient-accumulate-step 3", "--total-steps 8 is not a multiple of --gradient-accumulate-step 3"),
        ("--warmup-steps 9", "--warmup-steps 9 is more than the run's 8 updates"),
        (
            "--dp-backend nccl --use-cuda false",
            "--dp-backend nccl works on CUDA devices alone, and --use-cuda is false",
        ),
        ("--dist-backend cupy_nccl --use-cuda false", "--dist-backend cupy_nccl works on CUDA devices alone"),
        ("--heartbeat-period 0", "--heartbeat-period 0.0 must be more than 0 seconds"),
        ("--heartbeat-patience 1", "--heartbeat-patience 1.0 must be at least 3.0: 2 seconds, and 3 × --heartbeat-per"),
        ("--heartbeat-period 0.1 --heartbeat-patience 1", "--heartbeat-patience 1.0 must be at least 2.0: 2 seconds"),
        ("--heartbeat-period 5", "--heartbeat-patience 10.0 must be at least 15.0: 2 seconds, and 3 × --heartbeat-per"),
        ("--join-timeout 0", "--join-timeout 0.0 must be more than 0 seconds"),
        ("--wire-timeout nan", "--wire-timeout nan must be a finite number"),
        ("--max-grad-norm nan", "--max-grad-norm nan must be a finite number"),
        ("--lr inf", "--lr inf must be a finite number"),
        ("--heartbeat-patience inf", "--heartbeat-patience inf must be a finite number"),
        ("--adam-eps 0", "--adam-eps 0.0 must be more than 0"),
        ("--show-data -1", "--show-data -1 must not be negative"),
        ("--seed -1", "--seed -1 must be from 0 to 2³² − 1"),
        ("--cuda-id -3", "--cuda-id -3 must not be negative"),
        ("--bucket-mb 1e-9", "--bucket-mb 1e-09 must be at least 0.001"),
        ("--lr -1", "--lr -1.0 must not be negative"),
        ("--seq-length 1", "--seq-length 1 must be at least 2"),
        ("--train-log-backend print,csv", "--train-log-backend 'csv' is none of print, wandb, tensorboard"),
        ("--recompute some", "--recompute"),
        ("--pp-ahead 0", "--pp-ahead 0 must be at least 1"),
        ("--rope-scaling yarn", "--rope-scaling yarn must be linear, dynamic or yarn, with a factor of more than 1"),
        ("--rope-scaling ntk:2", "--rope-scaling ntk:2 must be linear, dynamic or yarn"),
        ("--rope-scaling linear:0.5", "--rope-scaling linear:0.5 must be linear, dynamic or yarn"),
        ("--rope-scaling linear:nan", "--rope-scaling linear:nan must be linear, dynamic or yarn"),
        ("--num-layers 2 --layer-split 2,2", "--num-layers and --layer-split"),
        ("--layer-split 2;2", "--layer-split 2;2 must be numbers, e.g. 3,2, or even"),
        ("--layer-split ²", "--layer-split ² must be numbers"),
        ("--checkpiont-steps 4", "unknown flag --checkpiont-steps: is it --checkpoint-steps?"),
        ("--adam-beta2 1", "--adam-beta2 1.0 must be in [0, 1)"),
        ("--evaluation-steps 5", "--evaluation-steps needs --evaluation-data on rank 0"),
        ("--evaluation-num-batch 5", "--evaluation-num-batch needs --evaluation-data on rank 0"),
        ("--patience 2", "--patience needs --evaluation-data on rank 0"),
        ("--stop-perplexity 2", "--stop-perplexity needs --evaluation-data on rank 0"),
        ("--evaluation-data e.jsonl --patience 2", "--patience needs --evaluation-steps"),
        ("--evaluation-data e.jsonl --stop-perplexity 2", "--stop-perplexity needs --evaluation-steps"),
        ("--evaluation-data e.jsonl --evaluation-steps -1", "--evaluation-steps -1 must not be negative"),
        ("--evaluation-data e.jsonl --evaluation-num-batch -1", "--evaluation-num-batch -1 must not be negative"),
        ("--evaluation-data e.jsonl --patience -1", "--patience -1 must not be negative"),
        ("--evaluation-data e.jsonl --stop-perplexity nan", "--stop-perplexity nan must be a finite number"),
        ("--evaluation-steps often", "--evaluation-steps"),
        ("--keep-checkpoints 0", "--keep-checkpoints 0 must be at least 1, or -1 to keep all"),
        ("--keep-checkpoints -2", "--keep-checkpoints -2 must be at least 1, or -1 to keep all"),
        ("--num-checkpoints -1", "--num-checkpoints -1 must not be negative"),
        ("--num-checkpoints 9", "--num-checkpoints 9 is more than the run's 8 updates"),
        ("--load-step -1", "--load-step -1 must not be negative"),
        ("--load-step 2 --load-checkpoint false", "--load-step and --load-checkpoint false: give one"),
        ("--nepochs -1", "--nepochs -1 must not be negative"),
        ("--scheduler step", "--scheduler"),
        ("--loss-scale -1", "--loss-scale -1.0 must not be negative"),
        ("--min-loss-scale 0", "--min-loss-scale 0.0 must be a positive number"),
        ("--initial-loss-scale 1 --min-loss-scale 2", "--initial-loss-scale 1.0 is below --min-loss-scale 2.0"),
        ("--loss-scale-window 0", "--loss-scale-window 0 must be at least 1"),
        ("--hysteresis 0", "--hysteresis 0 must be at least 1"),
        ("--lr 0.1 --min-lr 0.2", "--min-lr 0.2 is more than --lr 0.1"),
        ("--min-lr -1", "--min-lr -1.0 must not be negative"),
        ("--min-lr 1e-3 --scheduler constant", "--min-lr means nothing to --scheduler constant"),
        ("--task-config t.json", "--task-name and --task-config say the same thing"),
        ("--data-workers -1", "--data-workers -1 must not be negative"),
        ("--rows ragged", "--rows"),
        ("--document-mask --rows padded", "--document-mask means nothing to --rows padded"),
        ("--bos maybe", "--bos"),
        ("--eos maybe", "--eos"),
        ("--bad-lines ignore", "--bad-lines"),
    ],
)
def test_refusals_name_the_flag(extra: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        config(extra + " --rank 0" if "--rank" not in extra else extra)


def test_what_is_wrong_is_told_together() -> None:
    with pytest.raises(ConfigError) as caught:
        config("--rank 0 --batch-size 0 --micro-batch-size 0 --gradient-accumulate-step 0 --lr -1 --seq-length 0")
    assert [problem.split(" must ")[0] for problem in caught.value.problems] == [
        "--batch-size 0", "--micro-batch-size 0", "--gradient-accumulate-step 0", "--lr -1.0", "--seq-length 0",
    ]  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        config("-x --lr --pp-mode=zigzag --no-such 1 --load-checkpoint maybe")
    for number, flag in enumerate(("--lr", "--pp-mode", "--load-checkpoint", "-x", "--no-such")):
        assert flag in caught.value.problems[number]
    assert len(caught.value.problems) == 5
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flag", ["--model-name", "--task-name", "--checkpoint-path", "--total-steps", "--dist-url"])
def test_what_is_needed_is_asked_for(flag: str) -> None:
    at = GOOD.index(flag)
    made, _ = parse([*GOOD[:at], *GOOD[at + 2 :], "--rank", "0"], {})
    with pytest.raises(ConfigError, match=flag):
        validate(made)


def test_only_rank_0_needs_tasks() -> None:
    at = GOOD.index("--task-name")
    made, _ = parse([*GOOD[:at], *GOOD[at + 2 :]], {})
    validate(made)


def test_help_teaches_every_flag() -> None:
    text = " ".join(parser().format_help().split())
    for f in fields(Config):
        assert f"--{f.name.replace('_', '-')}" in text
        assert f.metadata["help"].split("[")[0].strip()[:30] in text
    for group in ("model", "data", "optimizer", "schedule", "checkpoints", "watching"):
        assert f"{group}:" in text


def test_every_flag_that_shapes_the_result_must_agree() -> None:
    agreed = config().agreement()
    for flag in ("--lr", "--seed", "--batch-size", "--pp-mode", "--seq-length", "--bf16", "--layer-split", "--dp-mode"):
        assert flag in agreed
    for flag in ("--evaluation-steps", "--patience", "--nepochs", "--load-step", "--keep-checkpoints", "--as-test"):
        assert flag in agreed
    for flag in (
        "--evaluation-data",
        "--rank",
        "--dist-url",
        "--cuda-id",
        "--net-interface",
        "--model-name",
        "--checkpoint-path",
    ):
        assert flag not in agreed


def test_names_of_other_tools_lead_to_flags_that_are_there() -> None:
    flags = {f"--{f.name.replace('_', '-')}" for f in fields(Config)}
    assert set(OURS.values()) <= flags
    assert not OURS.keys() & flags
    for theirs in (
        "--learning_rate", "--epochs", "--num-train-epochs", "--gradient-accumulation-steps", "--max-steps",
        "--output-dir", "--model-name-or-path",
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"unknown flag {theirs}: is it --"):
            parse([*GOOD, theirs, "1"], {})
