"""On one GPU that two ranks share: `python benchmarks/gpu.py [--out FILE.json]`.

    link    a message through our Link over NCCL, against cupy's bare send and recv, in turns
    step    a 2-stage training step, NCCL against Gloo; and how much of NCCL's time on the device (in which a receive
            also waits for its message) lies under computing

NCCL refuses two ranks on one GPU of one host, so each claims a host of its own, and messages go through sockets; the
two processes take turns on the GPU. The times say little about real networks; their ratios are what is measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

import torch
from farspan.comm.codecs.codec import RawCodec
from farspan.comm.groups.nccl import NcclGroup, bind
from farspan.comm.groups.watchdog import Watchdog
from farspan.comm.lanes.stream_lane import StreamLane
from farspan.comm.link import Receiver, Sender
from farspan.pipeline.executor import Executor
from farspan.runtime.cli import main as farspan_main
from gpu import own_host
from launch import free_port, read_metrics
from tiny import make_task, make_tokenizer
from torch import Tensor
from torch.distributed import FileStore
from transformers import AutoModelForCausalLM, GPTNeoXConfig

DEVICE = torch.device("cuda", 0)
SIZES = {"4 KiB": (1 << 12, 40), "4 MiB": (1 << 22, 20), "64 MiB": (1 << 26, 6)}
"""Bytes, and messages of one turn."""
TURNS = 5
UINT8 = 1
PROFILED = range(4, 6)  # steps
STEPS, MICRO_BATCHES, LENGTH = 8, 8, 512


# ---- one message at a time


def link_rank(rank: int, meeting: str, answer: Connection) -> None:
    own_host(rank)
    bind("lo")
    torch.cuda.set_device(DEVICE)
    watchdog = Watchdog(lambda: None, lambda error: print(error, file=sys.stderr))
    store = FileStore(meeting, 2)
    bare, ours = (NcclGroup(store, name, (0, 1), rank, "lo", 60.0, DEVICE, watchdog) for name in ("bare", "ours"))
    lane = StreamLane("lane", DEVICE)
    stream = torch.cuda.Stream(DEVICE)
    found: dict[str, dict[str, list[float]]] = {}
    for name, (size, count) in SIZES.items():
        x = torch.full((size,), 3, dtype=torch.uint8, device=DEVICE)
        out = Sender(ours, 1, RawCodec(), lane, 60.0)
        into = Receiver(ours, 0, RawCodec(), lane, 60.0, device=DEVICE, depth=ours.ahead)
        into.expect(count * (TURNS + 1) if rank else 0, (size,), torch.uint8)
        ways = {
            "cupy": partial(bare_message, bare._comm, x, rank, stream),
            "link": partial(link_message, out, into, x, rank),
        }
        found[name] = {way: [] for way in ways}
        for turn in range(TURNS + 1):
            for way, message in ways.items():
                ours.barrier(timeout_s=60)
                start = time.perf_counter()
                for _ in range(count):
                    message()
                if turn:  # the first is to warm up
                    found[name][way].append((time.perf_counter() - start) / count)
    if rank == 1:
        answer.send(found)
    ours.barrier(timeout_s=60)
    os._exit(0)


def bare_message(comm: Any, x: Tensor, rank: int, stream: torch.cuda.Stream) -> None:  # noqa: ANN401 - cupy's
    call = comm.recv if rank else comm.send
    call(x.data_ptr(), x.nbytes, UINT8, 1 - rank, stream.cuda_stream)
    stream.synchronize()


def link_message(out: Sender, into: Receiver, x: Tensor, rank: int) -> None:
    (into.recv() if rank else out.send(x)).get()
    torch.cuda.current_stream(DEVICE).synchronize()


def measure_links() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        found = answer_of(2, lambda rank: (link_rank, (rank, f"{folder}/meeting")), 90.0)
    result = {}
    for name, times in found.items():
        bare, ours = median(times["cupy"]), median(times["link"])
        print(
            f"{name:>7}: cupy {bare * 1e6:10.0f} µs, link {ours * 1e6:10.0f} µs a message, "
            f"{(ours - bare) * 1e6:+8.0f} µs, {ours / bare:.3f} ×"
        )
        result[name] = {"cupy_s": bare, "link_s": ours}
    return result


# ---- steps


def step_rank(rank: int, argv: list[str], answer: Connection) -> None:
    """One rank of farspan; the device's kernels of a few steps are recorded."""
    own_host(rank)
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    walk, seen = Executor.step, []

    def step(self: Executor, *args: Any, **more: Any) -> Tensor:  # noqa: ANN401
        if len(seen) == PROFILED.start:
            profiler.start()
        loss = walk(self, *args, **more)
        seen.append(None)
        if len(seen) == PROFILED.stop:
            torch.cuda.synchronize()
            profiler.stop()
            if rank == 0:
                answer.send(overlap(profiler))
        return loss

    Executor.step = step  # type: ignore[method-assign]
    sys.exit(farspan_main(argv))


def overlap(profiler: torch.profiler.profile) -> dict[str, float]:
    """Seconds in which NCCL's kernels, and others, were on the device, and in which both were."""
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in profiler.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spans["nccl" in event.name.lower()].append((event.time_range.start * 1e-6, event.time_range.end * 1e-6))
    wire, work = union(spans[True]), union(spans[False])
    both = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in wire for b in work)
    return {"nccl_s": length(wire), "other_s": length(work), "both_s": both}


def union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def length(spans: list[tuple[float, float]]) -> float:
    return sum(end - start for start, end in spans)


def measure_steps() -> dict[str, Any]:
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = GPTNeoXConfig(
            vocab_size=2048, hidden_size=1024, num_hidden_layers=8, num_attention_heads=16, intermediate_size=4096,
            max_position_embeddings=LENGTH, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
        make_tokenizer(folder / "model")
        task = make_task(folder / "a.jsonl", lines=3000)
        for backend in ("nccl", "gloo"):
            port = free_port()
            flags = (
                f"--model-name {folder}/model --task-name {task} --checkpoint-path {folder}/{backend} "
                f"--dist-url tcp://127.0.0.1:{port} --net-interface lo --pipeline-group-size 2 --bf16 --use-cuda true "
                f"--dist-backend {backend} --pp-mode 1f1b --pp-ahead 2 --seq-length {LENGTH} "
                f"--batch-size {MICRO_BATCHES} --micro-batch-size 1 "
                f"--total-steps {STEPS} --lr 1e-4 --wire-timeout 60 --join-timeout 60"
            ).split()
            seen = answer_of(2, lambda rank, f=flags: (step_rank, (rank, [*f, "--rank", str(rank)])), 100.0)
            steps = [row["step_s"] for row in read_metrics(folder / backend)]
            usual = median(s for at, s in enumerate(steps) if at >= 2 and at not in PROFILED)
            print(f"a step of 2 stages over {backend}: {usual * 1e3:.1f} ms")
            if backend == "nccl" and seen["nccl_s"]:
                print(
                    f"  on the first stage's device, {len(PROFILED)} steps: NCCL {seen['nccl_s'] * 1e3:.1f} ms, others "
                    f"{seen['other_s'] * 1e3:.1f} ms, both at once {seen['both_s'] * 1e3:.1f} ms"
                )
            elif backend == "nccl":
                print("  (this machine shows no kernels to the profiler)")
            result[backend] = {"step_s": usual, **seen}
    return result


# ---- processes


def answer_of(count: int, what: Callable[[int], tuple[Callable[..., None], tuple]], deadline_s: float) -> Any:  # noqa: ANN401
    """Start `count` processes and wait for the answer of one of them; none outlives the call."""
    context = multiprocessing.get_context("spawn")
    hear, say = context.Pipe(duplex=False)
    processes = []
    for rank in range(count):
        target, args = what(rank)
        processes.append(context.Process(target=target, args=(*args, say)))
        processes[-1].start()
    say.close()
    try:
        if not hear.poll(deadline_s):
            raise TimeoutError(f"no answer in {deadline_s} s")
        answer = hear.recv()
        for process in processes:
            process.join(deadline_s)
            if process.exitcode != 0:
                raise RuntimeError(f"a rank ended with {process.exitcode}")
        return answer
    finally:
        for process in processes:
            process.kill()
            process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    parser.add_argument("--only", choices=("link", "step"))
    told = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs a CUDA device, and torch sees none here")
    result = {}
    if told.only != "step":
        result["link"] = measure_links()
    if told.only != "link":
        result["step"] = measure_steps()
    if told.out:
        told.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
