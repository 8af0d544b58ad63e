"""Peak memory of a stage, measured in processes of their own: python benchmarks/memory.py

Loading against the weights' size, what --recompute saves and costs, the loss in chunks against the plain one, and
GPipe against 1F1B. Peaks are the kernel's (VmHWM), less what the process held after its imports.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from farspan.comm.lanes.lane import Ticket
from farspan.modules.layers import build_layers, init_unit
from farspan.modules.loss import CHUNK_LOGITS, linear_cross_entropy_sum
from farspan.modules.shards import ShardStore, write_index, write_unit
from farspan.modules.spec import ModelSpec
from farspan.pipeline.executor import Batch, Edges, Executor
from farspan.pipeline.schedule import gpipe, lower, one_f_one_b
from farspan.pipeline.stage import Stage
from farspan.runtime.checkpoints.checkpoint import load_weights
from farspan.runtime.observe.usage import peak_memory_bytes
from farspan.runtime.optim.optimizer import Optimizer
from torch import Tensor

CPU = torch.device("cpu")
MIB = 2**20
OPTIMIZER: Any = SimpleNamespace(
    optimizer="adamw", lr=1e-4, weight_decay=0.01, adam_beta1=0.9, adam_beta2=0.999, adam_eps=1e-6
)


def spec_of(layers: int, width: int, vocab: int) -> ModelSpec:
    """A GPT-NeoX of this shape."""
    shape = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": width // 64}
    more = {"intermediate_size": 4 * width, "vocab_size": vocab, "max_position_embeddings": 4096, "rotary_pct": 0.25}
    return ModelSpec.from_config({"model_type": "gpt_neox", **shape, **more})


class Wire:
    """A neighbour that is not there: takes anything, and sends zeros at once."""

    def __init__(self) -> None:
        self._shape: tuple[int, ...] = ()

    def expect(self, count: int, shape: tuple[int, ...], dtype: torch.dtype, label: str = "") -> None:
        self._shape, self._dtype = shape, dtype

    def recv(self) -> Ticket:
        return self._done(torch.zeros(self._shape, dtype=self._dtype))

    def send(self, x: Tensor, label: str = "") -> Ticket:
        return self._done(None)

    @staticmethod
    def _done(value: object) -> Ticket:
        ticket = Ticket(lambda: None)
        ticket._settle(value, None)
        return ticket


def held() -> int:
    """Bytes that this process holds now; peaks are counted anew from here on."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory_bytes(CPU)


def load(folder: str, dtype: str) -> dict[str, float]:
    """A whole model into one stage and its optimizer, as a run does it."""
    store = ShardStore(Path(folder))
    before = held()
    stage = Stage(store.spec, range(store.spec.unit_count), dtype=getattr(torch, dtype), device=CPU)
    optimizer = Optimizer(stage, OPTIMIZER)
    load_weights(store, optimizer)
    elements = sum(t.parameter.numel() for t in optimizer.tensors)
    copies = 4 if dtype == "float32" else 2 + 4  # bf16 trains an fp32 copy
    unit = max(sum(x.nbytes for x in store.read_unit(u).values()) for u in range(store.spec.unit_count))
    return {
        "weights": elements * copies / MIB,
        "gradients": elements * 4 / MIB,
        "largest unit": unit / MIB,
        "peak": (peak_memory_bytes(CPU) - before) / MIB,
    }


SHAPE = {"rows": 1, "length": 256, "layers": 8, "width": 512, "vocab": 8000, "dtype": "float32"}


def make_executor(
    *, recompute: str, mode: str, stage_at: int, stages: int, micro_batches: int, rows: int, length: int,
    layers: int, width: int, vocab: int, dtype: str,
) -> tuple[Executor, Batch]:  # fmt: skip
    """One stage whose neighbours answer at once, and its data."""
    spec, blocks = spec_of(layers, width, vocab), layers // stages
    first = 0 if stage_at == 0 else 1 + blocks * stage_at
    units = range(first, spec.unit_count if stage_at == stages - 1 else 1 + blocks * (stage_at + 1))
    stage = Stage(spec, units, dtype=getattr(torch, dtype), device=CPU, recompute=recompute)
    for unit, layer in zip(units, stage.layers, strict=True):
        init_unit(layer, spec, unit, 1)
    Optimizer(stage, OPTIMIZER)
    plan = gpipe(stages, micro_batches) if mode == "gpipe" else one_f_one_b(stages, micro_batches)
    wire: Any = Wire
    edges = Edges(
        *((wire(), wire()) if stage_at > 0 else (None, None)),
        *((wire(), wire()) if stage_at < stages - 1 else (None, None)),
    )
    tokens = torch.randint(0, vocab, (2, micro_batches * rows, length))
    return Executor(stage, lower(plan)[stage_at], edges, rows, length), Batch(tokens[0], tokens[1], tokens[1].numel())


def choose_loss(plain: bool) -> None:
    linear_cross_entropy_sum.__defaults__ = (sys.maxsize if plain else CHUNK_LOGITS,)


def step(plain_loss: bool = False, **shape: Any) -> float:  # noqa: ANN401 - `make_executor`'s
    """MiB that one step holds at most beside weights and gradients."""
    choose_loss(plain_loss)
    executor, batch = make_executor(**shape)
    before = held()
    executor.step(batch)
    return (peak_memory_bytes(CPU) - before) / MIB


def pace(variants: list[dict[str, Any]], rounds: int) -> list[float]:
    """CPU seconds of a step of each, by turns in this one process; medians."""
    made = [(make_executor(**{k: v for k, v in told.items() if k != "plain_loss"}), told) for told in variants]
    seconds: list[list[float]] = [[] for _ in made]
    for turn in range(rounds + 1):
        for ((executor, batch), told), times in zip(made, seconds, strict=True):
            choose_loss(told.get("plain_loss", False))
            start = time.process_time()
            executor.step(batch)
            if turn > 0:
                times.append(time.process_time() - start)
    return [sorted(times)[rounds // 2] for times in seconds]


def apart(what: str, *told: object, **more: object) -> Any:  # noqa: ANN401 - JSON
    """One measurement in a fresh process. Memory that was freed goes back to the kernel, so that peaks are exact."""
    command = [sys.executable, __file__, "--measure", what, json.dumps([told, more])]
    env = {"OMP_NUM_THREADS": "1", **os.environ, **({} if what == "pace" else {"MALLOC_MMAP_THRESHOLD_": "65536"})}
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env).stdout)


def make_model(folder: Path) -> None:
    spec = spec_of(layers=12, width=768, vocab=16000)
    for unit in range(spec.unit_count):
        (layer,) = build_layers(spec, [unit])
        init_unit(layer, spec, unit, 1)
        write_unit(folder, spec, unit, dict(layer.named_parameters()))
    write_index(folder, spec, torch.float32)


def load_table() -> None:
    print("Loading, MiB: the peak is the sum of the others, so that nothing is held twice\n")
    print("| weights in | weights and masters | gradients | largest unit | peak |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        for dtype in ("float32", "bfloat16"):
            found = apart("load", folder, dtype)
            print(f"| {dtype} | " + " | ".join(f"{value:.0f}" for value in found.values()) + " |", flush=True)


def recompute_table(rounds: int) -> None:
    print(f"\nActivations of the first of 2 stages, 8 micro-batches ({SHAPE}): MiB beside weights and gradients\n")
    print("| --recompute | gpipe | 1f1b | CPU seconds a step, 1f1b |\n|---|---|---|---|")
    first = {"stage_at": 0, "stages": 2, "micro_batches": 8, **SHAPE}
    modes = [{"recompute": recompute, "mode": "1f1b", **first} for recompute in ("none", "selective", "block")]
    for told, seconds in zip(modes, apart("pace", modes, rounds), strict=True):
        eager, lean = apart("step", **{**told, "mode": "gpipe"}), apart("step", **told)
        print(f"| {told['recompute']} | {eager:.0f} | {lean:.0f} | {seconds:.2f} |", flush=True)


def loss_table(rounds: int) -> None:
    print(
        "\nA last stage of one layer, one micro-batch of 1024 positions, width 512: MiB beside weights and gradients\n"
    )
    print("| vocabulary | weights in | plain loss | in chunks | CPU s, plain | in chunks |\n|---|---|---|---|---|---|")
    for vocab in (8000, 50432):
        for dtype in ("float32", "bfloat16"):
            shape = {**SHAPE, "length": 1024, "layers": 2, "vocab": vocab, "dtype": dtype}
            told = {"recompute": "none", "mode": "gpipe", "stage_at": 1, "stages": 2, "micro_batches": 1, **shape}
            both = [{"plain_loss": True, **told}, {"plain_loss": False, **told}]
            figures = [f"{apart('step', **kind):.0f}" for kind in both]
            figures += [f"{seconds:.2f}" for seconds in apart("pace", both, rounds)]
            print(f"| {vocab} | {dtype} | " + " | ".join(figures) + " |", flush=True)


if __name__ == "__main__":
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    reader.add_argument("--rounds", type=int, default=5, help="steps of each kind whose median is its pace")
    given = reader.parse_args()
    if given.measure:
        words, named = json.loads(given.measure[1])
        print(json.dumps({"load": load, "step": step, "pace": pace}[given.measure[0]](*words, **named)))
    else:
        load_table()
        recompute_table(given.rounds)
        loss_table(given.rounds)
