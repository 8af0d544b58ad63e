"""OpenChatKit's commands run here, and docs/openchatkit.md says of each of its flags what it is here."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from farspan.runtime.flags.config import Config, ConfigError, parse
from farspan.runtime.flags.old_flags import INERT, REFUSED
from farspan.runtime.flags.validation import validate

REPO = Path(__file__).resolve().parents[1]
PAGE = REPO / "docs" / "openchatkit.md"

# Every flag of its training scripts: a value as scripts pass it (None: a switch), and its default there.
FLAGS: dict[str, tuple[str | None, str]] = {
    "--model-name": ("m", "gpt2"),
    "--tokenizer-name": ("m", "gpt2"),
    "--model-type": ("gptneox", "gpt2"),
    "--num-layers": ("6", "4"),
    "--embedding-dim": ("6144", "768"),
    "--num-heads": ("64", "12"),
    "--load-pretrained-model": ("True", "true"),
    "--load-checkpoint": ("True", "true"),
    "--dist-url": ("tcp://127.0.0.1:7033", "tcp://127.0.0.1:9000"),
    "--rank": ("1", "0"),
    "--world-size": ("8", "4"),
    "--pipeline-group-size": ("8", "4"),
    "--data-group-size": ("1", "1"),
    "--net-interface": ("lo", "lo"),
    "--dist-backend": ("cupy_nccl", "cupy_nccl"),
    "--dp-backend": ("nccl", "nccl"),
    "--use-cuda": ("True", "true"),
    "--cuda-id": ("1", "0"),
    "--cuda-num": ("1", "1"),
    "--debug-mem": ("true", "true"),
    "--task-name": ("a.jsonl:0.2,b.jsonl:0.8", "cot"),
    "--seq-length": ("2048", "1024"),
    "--batch-size": ("64", "32"),
    "--micro-batch-size": ("1", "8"),
    "--gradient-accumulate-step": ("1", "1"),
    "--seed": ("42", "1"),
    "--optimizer": ("adam", "adamw"),
    "--lr": ("1e-5", "0.01"),
    "--warmup-steps": ("10", "0"),
    "--total-steps": ("20000", "none"),
    "--nepochs": ("3", "none"),
    "--checkpoint-path": ("ck", "model_checkpoints/gpt2"),
    "--checkpoint-steps": ("100", "0"),
    "--num-checkpoints": ("2", "0"),
    "--fp16": (None, "false"),
    "--loss-scale": ("0", "0"),
    "--initial-loss-scale": ("32768", "32768"),
    "--min-loss-scale": ("1.0", "1.0"),
    "--loss-scale-window": ("1000.0", "1000"),
    "--hysteresis": ("2", "2"),
    "--use-offload": (None, "false"),
    "--pp-mode": ("gpipe", "gpipe"),
    "--dp-mode": ("allreduce", "allreduce"),
    "--evaluation-data": ("held.jsonl", "none"),
    "--evaluation-steps": ("100", "0"),
    "--evaluation-num-batch": ("5", "none"),
    "--profiling": ("pytorch_profiling", "no-profiling"),
    "--train-log-backend": ("loguru", "print"),
    "--project-name": ("together", "test"),
    "--trace-postfix": ("default", "default"),
    "--job-id": ("0", "0"),
    "--train-warmup-steps": ("0", "0"),
    "--num-iters": ("10", "10"),
    "--train-data": ("a b", "a path"),
    "--valid-data": ("a b", "a path"),
    "--tokenizer-type": ("BertWordPieceLowerCase", "BertWordPieceLowerCase"),
    "--vocab-file": ("vocab.txt", "a path"),
    "--vocab-extra-ids": ("0", "0"),
    "--make-vocab-size-divisible-by": ("128", "128"),
    "--event-host": ("http://127.0.0.1:8895", "none"),
    "--event-auth-token": ("t", "none"),
    "--aws-endpoint-url": ("u", "none"),
    "--aws-access-key-id": ("k", "none"),
    "--aws-secret-access-key": ("k", "none"),
    "--aws-session-token": ("t", "none"),
    "--aws-region": ("auto", "auto"),
    "--checkpoint-upload-prefix": ("s3://bucket/run", "none"),
    "--checkpoint-load-path": ("ck", "none"),
    "--load-checkpoint-path": ("ck", "none"),
    "--init-steps": ("true", "none"),
    "--total-scheduler-steps": ("1000", "none"),
    "--lora-r": ("8", "8"),
    "--lora-alpha": ("8", "8"),
}

# What its example scripts give to each rank but --rank and --cuda-id, with paths filled in.
SCRIPTS = {
    "gptj": "--model-name m --tokenizer-name m --project-name together --model-type gptj --optimizer adam --seed 42 "
    "--load-pretrained-model true --task-name a.jsonl:0.2,b.jsonl:0.2,c.jsonl:0.3,d.jsonl:0.3 "
    "--checkpoint-path ./model_ckpts/gptj-fine-tune --total-steps 20000 --warmup-steps 10 --train-warmup-steps 0 "
    "--checkpoint-steps 100 --lr 1e-5 --seq-length 2048 --batch-size 16 --micro-batch-size 1 "
    "--gradient-accumulate-step 1 --dist-url tcp://127.0.0.1:7033 --num-layers 14 --embedding-dim 4096 "
    "--world-size 8 --pipeline-group-size 2 --data-group-size 4 --job-id 0 --net-interface lo --fp16 "
    "--dp-backend nccl --dp-mode allreduce --pp-mode gpipe --profiling no-profiling",
    "gptneox": "--model-name m --tokenizer-name m --project-name together --model-type gptneox --optimizer adam "
    "--seed 42 --load-pretrained-model true --task-name a.jsonl:0.2,b.jsonl:0.2,c.jsonl:0.3,d.jsonl:0.3 "
    "--checkpoint-path ./model_ckpts/gptneox-fine-tune --total-steps 20000 --warmup-steps 10 --train-warmup-steps 0 "
    "--checkpoint-steps 100 --lr 1e-6 --seq-length 2048 --batch-size 64 --micro-batch-size 1 "
    "--gradient-accumulate-step 1 --dist-url tcp://127.0.0.1:7033 --num-layers 6 --embedding-dim 6144 "
    "--world-size 8 --pipeline-group-size 8 --data-group-size 1 --job-id 0 --net-interface lo --fp16 "
    "--dp-backend nccl --dp-mode allreduce --pp-mode gpipe --profiling no-profiling",
    "pythia": "--model-name m --tokenizer-name m --project-name together --model-type gptneox --optimizer adam "
    "--seed 42 --load-pretrained-model true --task-name a.jsonl:1.0,b.jsonl:1.0 --checkpoint-path ck "
    "--total-steps 20000 --warmup-steps 10 --train-warmup-steps 0 --checkpoint-steps 100 --lr 1e-5 --seq-length 2048 "
    "--batch-size 32 --micro-batch-size 1 --gradient-accumulate-step 1 --dist-url tcp://127.0.0.1:7033 --num-layers 8 "
    "--embedding-dim 4096 --world-size 8 --pipeline-group-size 4 --data-group-size 2 --job-id 0 --net-interface lo "
    "--fp16 --dp-backend nccl --dp-mode allreduce --pp-mode gpipe --profiling no-profiling",
    "llama": "--model-name m --tokenizer-name m --project-name together --model-type llama --optimizer adam --seed 42 "
    "--load-pretrained-model true --task-name a.jsonl.zst:1 --checkpoint-path ck --total-steps 10 --warmup-steps 0 "
    "--train-warmup-steps 0 --checkpoint-steps 10 --lr 2e-5 --seq-length 32768 --batch-size 4 --micro-batch-size 1 "
    "--gradient-accumulate-step 1 --dist-url tcp://127.0.0.1:7033 --num-layers 4 --embedding-dim 4096 --world-size 8 "
    "--pipeline-group-size 8 --data-group-size 1 --job-id 0 --net-interface lo --fp16 --dp-backend nccl "
    "--dp-mode allreduce --pp-mode gpipe --profiling no-profiling",
}


def words_of(flag: str) -> list[str]:
    value = FLAGS[flag][0]
    return [flag, *(value.split() if value else [])]


ROW = re.compile(r"^\| `(--[\w-]+)` \| ([^|]*) \| ([^|]*) \| ([^|]*) \|$", re.MULTILINE)


def rows() -> dict[str, tuple[str, str, str]]:
    """The page's table: flag → its default there, its default here, what it is here."""
    return {flag: (there.strip(" `"), here.strip(), text) for flag, there, here, text in ROW.findall(PAGE.read_text())}


@pytest.mark.parametrize("name", SCRIPTS)
def test_its_scripts_commands_are_understood(name: str) -> None:
    for rank in ("0", "7"):
        config, notices = parse([*shlex.split(SCRIPTS[name]), "--cuda-id", rank, "--rank", rank], {})
        validate(config)
        assert notices == ["--train-warmup-steps has no effect and is ignored", "--job-id has no effect and is ignored"]


@pytest.mark.parametrize("flag", FLAGS)
def test_each_flag_is_what_the_page_says(flag: str) -> None:
    assert flag in rows(), f"docs/openchatkit.md does not mention {flag}"
    there, here, text = rows()[flag]
    assert there == FLAGS[flag][1]
    if flag in REFUSED:
        assert here == ""
        assert text.startswith(f"refused: {REFUSED[flag]}")
        with pytest.raises(ConfigError, match=re.escape(f"{flag}: {REFUSED[flag]}")):
            parse(words_of(flag), {})
        return
    config, notices = parse([*words_of(flag), "--hysteresis", "3"], {})
    assert config.hysteresis == 3  # it took no other flag's place
    if flag in INERT:
        assert here == ""
        assert text.startswith("no effect")
        assert notices == [f"{flag} has no effect and is ignored"]
    else:
        assert not text.startswith(("no effect", "refused"))
        assert notices == []


def with_defaults() -> str:
    """The page, with the defaults of the table of flags."""
    table = (REPO / "docs" / "flags.md").read_text()
    ours = dict(re.findall(r"^\| `(--[\w-]+)`[^|]*\| ([^|]*) \|", table, re.MULTILINE))
    return ROW.sub(lambda row: f"| `{row[1]}` | {row[2]} | {ours.get(row[1], '')} | {row[4]} |", PAGE.read_text())


def test_the_defaults_here_are_those_of_the_flags() -> None:
    assert with_defaults() == PAGE.read_text(), "python tests/test_openchatkit.py puts them in"


def test_the_page_has_no_other_flag() -> None:
    assert rows().keys() == FLAGS.keys()
    assert {*INERT, *REFUSED} <= FLAGS.keys()


def parsed(words: str) -> tuple[Config, list[str]]:
    return parse(words.split(), {})


def test_booleans_and_choices_in_any_case() -> None:
    config, _ = parsed("--use-cuda True --load-checkpoint FALSE --optimizer AdamW")
    assert (config.use_cuda, config.load_checkpoint, config.optimizer) == ("true", False, "adamw")


def test_whole_numbers_written_as_floats() -> None:
    config, _ = parsed("--loss-scale-window 1000.0 --total-steps 2e4 --seed 42")
    assert (config.loss_scale_window, config.total_steps, config.seed) == (1000, 20000, 42)
    for bad in ("2.5", "inf", "nan", "ten"):
        with pytest.raises(ConfigError, match=f"--total-steps: must be a whole number, not '{bad}'"):
            parsed(f"--total-steps {bad}")


def test_a_flag_without_effect_takes_several_values_and_no_more() -> None:
    config, notices = parsed("--train-data a b c --lr 0.5 --cuda-num=1")
    assert config.lr == 0.5
    assert notices == ["--cuda-num has no effect and is ignored", "--train-data has no effect and is ignored"]
    with pytest.raises(ConfigError, match="unknown flag stray"):
        parsed("--train-data a --lr 0.5 stray")


def test_of_two_flags_for_one_thing_its_own_goes_first() -> None:
    config, notices = parsed("--total-steps 400 --nepochs 3 --checkpoint-steps 100 --num-checkpoints 2")
    assert (config.total_steps, config.nepochs, config.checkpoint_steps, config.num_checkpoints) == (400, 0, 100, 0)
    assert notices == [
        "--total-steps 400 is given: --nepochs 3 has no effect",
        "--checkpoint-steps 100 is given: --num-checkpoints 2 has no effect",
    ]


def test_loguru_is_print() -> None:
    assert parsed("--train-log-backend loguru,wandb")[0].log_backends == ["print", "wandb"]


def test_its_script_is_here_under_its_own_name() -> None:
    told = subprocess.run(
        [sys.executable, REPO / "dist_clm_train.py", "--no-such"], capture_output=True, text=True, timeout=60
    )
    assert told.returncode == 2
    assert told.stderr.startswith("farspan: unknown flag --no-such")


if __name__ == "__main__":
    PAGE.write_text(with_defaults())
