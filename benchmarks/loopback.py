"""farspan against its peers on one machine, in one run: `python benchmarks/loopback.py [--quick]`.

Two stages over Gloo on loopback: farspan's gpipe and 1f1b against torch.distributed.pipelining's ScheduleGPipe and
Schedule1F1B on Hugging Face's layers. One process: farspan against Hugging Face's model in a plain loop. All train the
same GPT-NeoX in fp32, from the same weights, on the same rows, to the same losses (which is checked), with one thread a
process. Then the start-up: from the launch of four processes to the end of their first step.

All contestants are alive throughout, and take turns of one step (`contest.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
from contest import Contestant, compete, disturbance, server, table
from farspan.runtime.cli import main as farspan_main
from farspan.runtime.data.open_tasks import open_tasks
from farspan.runtime.data.tokenizer import Vocabulary
from farspan.runtime.flags.config import Config
from farspan.runtime.observe.metrics import Metrics
from farspan.runtime.training.feed import shift_labels
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[1]
VOCAB, LENGTH, MICRO_ROWS, MICRO_BATCHES = 2048, 256, 2, 8
ROWS = MICRO_ROWS * MICRO_BATCHES
VALID = ROWS * (LENGTH - 1)  # targets of a step
LR, EPS, DECAY, CLIP, SEED = 1e-4, 1e-6, 0.01, 1.0, 1
MANY = 1_000_000  # updates of a run that nobody lets finish: the learning rate stays where it is


# ---- what everybody trains


def make_model(folder: Path, layers: int, width: int) -> Path:
    """A random HF checkpoint and a tokenizer with one token a word."""
    torch.manual_seed(SEED)
    config = GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        intermediate_size=4 * width,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = {"<unk>": 0, **{f"w{number}": number for number in range(1, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


def make_task(path: Path) -> Path:
    rng = random.Random(SEED)
    with path.open("w") as file:
        for _ in range(200):
            text = " ".join(f"w{rng.randrange(1, VOCAB)}" for _ in range(300))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def batches(model: Path, task: Path) -> Iterator[Tensor]:
    """The rows [ROWS, LENGTH] of one step after another: those that farspan's rank 0 draws."""
    config = Config(
        model_name=str(model), task_name=str(task), seq_length=LENGTH, seed=SEED, data_cache=str(task.parent / "cache")
    )
    mixture = open_tasks(config, Vocabulary(config))
    while True:
        yield torch.from_numpy(mixture.draw(ROWS).tokens)


# ---- farspan: its own processes, as dist_train.py starts them


def flags(model: Path, task: Path, checkpoints: Path, port: int, rank: int, **more: object) -> list[str]:
    values: dict[str, object] = {
        "rank": rank,
        "model-name": model,
        "task-name": task,
        "checkpoint-path": checkpoints,
        "dist-url": f"tcp://127.0.0.1:{port}",
        "net-interface": "lo",
        "use-cuda": "false",
        "seq-length": LENGTH,
        "batch-size": ROWS,
        "micro-batch-size": MICRO_ROWS,
        "lr": LR,
        "adam-eps": EPS,
        "weight-decay": DECAY,
        "max-grad-norm": CLIP,
        "seed": SEED,
        "total-steps": MANY,
        **{name.replace("_", "-"): value for name, value in more.items()},
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def farspan(rank: int, gate: Connection, argv: list[str]) -> None:
    """One rank of farspan; rank 0 tells of each step when its row is written, and waits for its turn."""

    def write(self: Metrics, row: dict) -> None:
        write_row(self, row)
        gate.send((row["step_s"], row["loss"]))
        gate.recv()

    write_row, Metrics.write = Metrics.write, write
    tqdm.set_lock(threading.RLock())  # its own would outlive a process that is killed
    sys.exit(farspan_main(argv))


# ---- the peers


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LR, eps=EPS, fused=True)


class HalfOfNeoX(nn.Module):
    """The first or the second half of HF's GPT-NeoX, made of its own modules."""

    def __init__(self, model: PreTrainedModel, rank: int) -> None:
        super().__init__()
        body = model.gpt_neox
        half = len(body.layers) // 2
        self.embed = body.embed_in if rank == 0 else None
        self.layers = body.layers[:half] if rank == 0 else body.layers[half:]
        self.rotary = body.rotary_emb
        self.norm, self.head = (None, None) if rank == 0 else (body.final_layer_norm, model.lm_head)

    def forward(self, x: Tensor) -> Tensor:
        if self.embed is not None:
            x = self.embed(x)
        positions = self.rotary(x, torch.arange(x.shape[1])[None])
        for layer in self.layers:
            x = layer(x, attention_mask=None, position_embeddings=positions)
        return x if self.head is None else self.head(self.norm(x))


def pipelining(rank: int, gate: Connection, model: Path, task: Path, port: int, schedule_class: type) -> None:
    """One rank of torch.distributed.pipelining. Rank 0 tells the seconds of each step, rank 1 its loss."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    half = HalfOfNeoX(AutoModelForCausalLM.from_pretrained(model, attn_implementation="sdpa"), rank).train()
    parameters = list(half.parameters())
    optimizer = adamw(parameters)

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / VALID

    schedule = schedule_class(
        PipelineStage(half, rank, 2, torch.device("cpu")), MICRO_BATCHES, loss_fn=loss_of, scale_grads=False
    )
    for rows in batches(model, task):
        labels = shift_labels(rows)
        start = time.perf_counter()
        losses: list[Tensor] = []
        if rank == 0:
            schedule.step(rows)
        else:
            schedule.step(target=labels, losses=losses)
        # One norm over both stages, as everybody here has it.
        squares = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).square()
        dist.all_reduce(squares)
        nn.utils.clip_grads_with_norm_(parameters, CLIP, squares.sqrt())
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - start
        if rank == 0:
            gate.send((seconds, None))
            gate.recv()
        else:
            gate.send((None, float(sum(losses))))


def plain_loop(rank: int, gate: Connection, model: Path, task: Path) -> None:
    """Hugging Face's model in one process, with gradient accumulation."""
    network = AutoModelForCausalLM.from_pretrained(model, attn_implementation="sdpa").train()
    optimizer = adamw(network.parameters())
    for rows in batches(model, task):
        start = time.perf_counter()
        total = 0.0
        for micro_batch in rows.split(MICRO_ROWS):
            loss = network(input_ids=micro_batch, labels=micro_batch, use_cache=False).loss / MICRO_BATCHES
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        gate.send((time.perf_counter() - start, total))
        gate.recv()


# ---- the contest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make_contestants(folder: Path, parts: list[str]) -> dict[str, list[Contestant]]:
    """By part; farspan's come first in each."""
    model, task = make_model(folder / "model", layers=8, width=512), make_task(folder / "task.jsonl")

    def ours(name: str, stages: int, mode: str) -> Contestant:
        place, port = folder / name, free_port()
        ranks = [
            (flags(model, task, place, port, rank, pipeline_group_size=stages, pp_mode=mode),) for rank in range(stages)
        ]
        return Contestant(name, place, farspan, ranks, peer=False)

    def peer(schedule_class: type) -> Contestant:
        name, port = f"torch {schedule_class.__name__}", free_port()
        return Contestant(name, folder / name, pipelining, [(model, task, port, schedule_class)] * 2)

    made = {}
    if "pipeline" in parts:
        made["2 stages over loopback"] = [
            ours("farspan gpipe", 2, "gpipe"),
            ours("farspan 1f1b", 2, "1f1b"),
            peer(ScheduleGPipe),
            peer(Schedule1F1B),
        ]
    if "single" in parts:
        alone = Contestant("Hugging Face's loop", folder / "hf", plain_loop, [(model, task)])
        made["1 process"] = [ours("farspan", 1, "gpipe"), alone]
    return made


def start_up(folder: Path) -> float:
    """Seconds from the launch of 2 stages × 2 replicas of dist_train.py to the end of their first step."""
    folder.mkdir()
    model, task, port = make_model(folder / "model", layers=4, width=128), make_task(folder / "task.jsonl"), free_port()
    grid = {"pipeline_group_size": 2, "data_group_size": 2, "total_steps": 1}
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    start = time.perf_counter()
    with (folder / "log").open("w") as log:
        processes = [
            subprocess.Popen(
                [sys.executable, ROOT / "dist_train.py", *flags(model, task, folder / "run", port, rank, **grid)],
                env=environment,
                stdout=log,
                stderr=log,
            )
            for rank in range(4)
        ]
    rows = folder / "run" / "metrics.jsonl"
    while not (rows.exists() and rows.read_text().endswith("\n")):
        if any(process.poll() for process in processes):
            raise SystemExit((folder / "log").read_text())
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    if any([process.wait() for process in processes]):
        raise SystemExit((folder / "log").read_text())
    return seconds


def imports() -> float:
    """Seconds that four interpreters at once take to import torch: the floor under the start-up."""
    start = time.perf_counter()
    processes = [subprocess.Popen([sys.executable, "-c", "import torch"]) for _ in range(4)]
    for process in processes:
        process.wait()
    return time.perf_counter() - start


# ---- the report


def cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description="farspan against its peers on one machine, in one run.")
    parser.add_argument("--quick", action="store_true", help="two rounds: a minute and a half; for a first look")
    parser.add_argument("--rounds", type=int, default=0, help="steps of each contestant [7; 2 with --quick]")
    parser.add_argument("--parts", default="pipeline,single,startup", help="what to run [pipeline,single,startup]")
    asked = parser.parse_args()
    parts, rounds = asked.parts.split(","), asked.rounds or (2 if asked.quick else 7)
    logging.disable_progress_bar()
    server.set_forkserver_preload(["farspan.runtime.train", "torch.distributed.pipelining", "torch._dynamo"])
    start = time.perf_counter()
    print(
        f"GPT-NeoX, 8 layers, width 512, 8 heads, vocabulary {VOCAB}, {LENGTH} tokens, {MICRO_BATCHES} micro-batches "
        f"of {MICRO_ROWS} rows, AdamW, fp32, one thread a process\n"
        f"{cpu()}, {psutil.cpu_count()} cores; torch {torch.__version__}; {rounds} steps each, in turns\n",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        contestants = make_contestants(folder, parts)
        if contestants:
            compete(contestants, rounds)
        for title, part in contestants.items():
            print("\n".join(table(title, part)), flush=True)
        if contestants:
            print(disturbance([contestant for part in contestants.values() for contestant in part]), flush=True)
        if "startup" in parts:
            times = [start_up(folder / f"start{number}") for number in range(1 if asked.quick else 3)]
            print(
                f"4 processes from launch to the end of the first step: {median(times):.2f} s "
                f"(import torch in 4 processes: {imports():.2f} s)"
            )
    print(f"this took {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
