"""Does a grid train as one process of Hugging Face does? `python benchmarks/parity.py` (see --help).

Fine-tunes a pretrained Llama on GSM8K (loss on the answers) on several grids, each as `dist_train.py` would be started,
and in a plain transformers loop with torch's own AdamW, clipping and transformers' schedule, which is given the very
same rows. Held-out perplexity is measured by farspan's evaluation on each grid, and for the plain loop by transformers'
model on rows that its own tokenizer made. Writes a table and a plot; ends with 1 where the bound is broken.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch
import torch.nn.functional as F
import transformers
from farspan.runtime.data.open_tasks import open_tasks
from farspan.runtime.data.tokenizer import Vocabulary
from farspan.runtime.flags.config import Config
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, get_linear_schedule_with_warmup
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[1]
DATA = os.environ.get("FARSPAN_DATA")
BOUND = 1e-4  # nats a token: the most by which two losses of the same step, or of the same held-out text, may differ
ROWS, MICRO_ROWS, LENGTH, SEED = 8, 2, 256, 1  # ROWS of all replicas together
EOS = "no"  # the plain loop adds none
LR, BETAS, EPS, DECAY, CLIP = 1e-3, (0.9, 0.999), 1e-6, 0.01, 1.0
IGNORED = -100
DEADLINE_S = 1800.0


@dataclass(frozen=True)
class Grid:
    name: str
    stages: int
    replicas: int
    split: str = ""


GRIDS = [Grid("1×1", 1, 1), Grid("2×1", 2, 1), Grid("2×2", 2, 2), Grid("3×1", 3, 1, "2,2,1")]


@dataclass(frozen=True)
class Outcome:
    """The loss of each step, and the held-out loss of the model as it came and as it was trained; nats a token."""

    losses: list[float]
    before: float
    after: float

    def distance(self, other: Outcome) -> float:
        """The largest |Δ| of any step's loss."""
        return farthest(self.losses, other.losses)

    def held_out_distance(self, other: Outcome) -> float:
        return farthest([self.before, self.after], [other.before, other.after])


def farthest(a: list[float], b: list[float]) -> float:
    """max |a − b|; a NaN is not overlooked, as Python's own max would."""
    return float((torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)).abs().max())


# ---- farspan


def split_task(task: Path, held_out: int, folder: Path) -> tuple[Path, Path]:
    """Task configs of the training part and of the held-out part, the last lines, of a GSM8K file."""
    lines = task.read_text(encoding="utf-8").splitlines()
    configs = []
    for name, part in (("train", lines[:-held_out]), ("held", lines[-held_out:])):
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
        row = {
            "path": str(folder / f"{name}.jsonl"),
            "template": "{question}\n{answer}",
            "loss_on": "completion",
        }
        configs.append(folder / f"{name}.json")
        configs[-1].write_text(json.dumps([row]))
    return configs[0], configs[1]


def train(grid: Grid, model: Path, train_config: Path, held_config: Path, steps: int, folder: Path) -> Outcome:
    # The first update of a warm-up has a learning rate of 0: what is evaluated after it is the model as it came.
    before = launch(grid, model, train_config, held_config, folder / f"{grid.name} before", 1, 1)
    rows = launch(grid, model, train_config, held_config, folder / grid.name, steps, warmup_of(steps))
    return Outcome([row["loss"] for row in rows], before[-1]["eval_loss"], rows[-1]["eval_loss"])


def warmup_of(steps: int) -> int:
    return steps // 10


def launch(
    grid: Grid, model: Path, train_config: Path, held_config: Path, checkpoints: Path, steps: int, warmup: int
) -> list[dict]:
    """All ranks of one run, from start to end; the rows of its metrics."""
    checkpoints.mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = {
        "model-name": model,
        "task-config": train_config,
        "evaluation-data": held_config,
        "checkpoint-path": checkpoints,
        "dist-url": f"tcp://127.0.0.1:{port}",
        "pipeline-group-size": grid.stages,
        "data-group-size": grid.replicas,
        "use-cuda": "false",
        "seq-length": LENGTH,
        "eos": EOS,
        "batch-size": ROWS // grid.replicas,
        "micro-batch-size": MICRO_ROWS,
        "total-steps": steps,
        "warmup-steps": warmup,
        "lr": LR,
        "adam-beta1": BETAS[0],
        "adam-beta2": BETAS[1],
        "adam-eps": EPS,
        "weight-decay": DECAY,
        "max-grad-norm": CLIP,
        "seed": SEED,
        **({"layer-split": grid.split} if grid.split else {}),
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    with (checkpoints / "log").open("w") as log:
        ranks = [
            subprocess.Popen(
                [sys.executable, ROOT / "dist_train.py", *words, "--rank", str(rank)], stdout=log, stderr=log
            )
            for rank in range(grid.stages * grid.replicas)
        ]
        end = time.monotonic() + DEADLINE_S
        try:
            codes = [rank.wait(max(0.0, end - time.monotonic())) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    if any(codes):
        raise SystemExit(f"{grid.name}: ranks ended with {codes}\n{(checkpoints / 'log').read_text()[-3000:]}")
    return [json.loads(line) for line in (checkpoints / "metrics.jsonl").read_text().splitlines()]


# ---- the plain loop


def batches(model: Path, train_config: Path, steps: int, cache: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and labels [ROWS, LENGTH] of each step, as Hugging Face's models take them (not yet shifted)."""
    told = Config(
        model_name=str(model),
        task_config=str(train_config),
        seq_length=LENGTH,
        eos=EOS,
        seed=SEED,
        data_cache=str(cache),
    )
    mixture = open_tasks(told, Vocabulary(told))
    for _ in range(steps):
        drawn = mixture.draw(ROWS)
        tokens = torch.from_numpy(drawn.tokens)
        yield tokens, tokens.masked_fill(~torch.from_numpy(drawn.targets), IGNORED)


def hugging_face(model: Path, train_config: Path, held: Path, steps: int, cache: Path) -> Outcome:
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup_of(steps), steps)
    rows = held_out_rows(model, held)
    before, losses = held_out_loss(network, rows), []
    for tokens, labels in batches(model, train_config, steps, cache):
        network.train()
        loss = network(input_ids=tokens, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return Outcome(losses, before, held_out_loss(network, rows))


def held_out_rows(model: Path, held: Path) -> list[tuple[Tensor, Tensor]]:
    """Ids and labels, [1, up to LENGTH] each: the documents one after another, cut into rows."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids: list[int] = []
    labels: list[int] = []
    for line in held.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = f"\n{row['question']}\n"
        made = tokenizer(prompt + row["answer"], return_offsets_mapping=True)
        ids += made["input_ids"]
        labels += [
            token if end > len(prompt) else IGNORED
            for token, (_, end) in zip(made["input_ids"], made["offset_mapping"], strict=True)
        ]
    return list(zip(torch.tensor([ids]).split(LENGTH, 1), torch.tensor([labels]).split(LENGTH, 1), strict=True))


@torch.no_grad()
def held_out_loss(network: PreTrainedModel, rows: list[tuple[Tensor, Tensor]]) -> float:
    network.eval()
    total, count = 0.0, 0
    for ids, labels in rows:
        targets = labels[0, 1:]
        total += float(F.cross_entropy(network(ids, use_cache=False).logits[0, :-1], targets, reduction="sum"))
        count += int((targets != IGNORED).sum())
    return total / count


# ---- the report


def faults(reference: Outcome, outcomes: dict[str, Outcome]) -> list[str]:
    """What breaks the bound, in words."""
    found = []
    for name, outcome in outcomes.items():
        for what, distance in (
            ("the loss of a step", outcome.distance(reference)),
            ("the held-out loss", outcome.held_out_distance(reference)),
        ):
            if not distance <= BOUND:
                found.append(f"{name}: {what} is {distance:.1e} from the plain loop's, more than {BOUND:.0e}")
        if not outcome.after < outcome.before:
            found.append(f"{name}: the held-out loss did not fall: {outcome.before:.4f} to {outcome.after:.4f}")
    return found


def table(reference: Outcome, outcomes: dict[str, Outcome]) -> Iterator[str]:
    yield "| grid | max \\|Δ\\| loss | first loss | last loss | held-out perplexity before | after | fall |"
    yield "|---|---|---|---|---|---|---|"
    for name, one in {"Hugging Face's loop": reference, **outcomes}.items():
        before, after = math.exp(one.before), math.exp(one.after)
        distance = "" if one is reference else f"{one.distance(reference):.1e}"
        yield (
            f"| {name} | {distance} | {one.losses[0]:.5f} | {one.losses[-1]:.5f} | {before:.4f} | {after:.4f} "
            f"| {before - after:.4f} |"
        )


def page(reference: Outcome, outcomes: dict[str, Outcome], held_out: int) -> str:
    steps = len(reference.losses)
    worst = max(outcome.held_out_distance(reference) for outcome in outcomes.values())
    rows = "\n".join(table(reference, outcomes))
    return f"""# Parity: a grid trains as one process of Hugging Face does

`python benchmarks/parity.py` made this page, and ends with 1 where any loss is more than {BOUND:.0e} nats a token
from the plain loop's.

The pretrained Llama stories260K (5 layers, width 64, tied embeddings; karpathy/tinyllamas) learns GSM8K
(openai/grade-school-math): template `{{question}}\\n{{answer}}`, loss on the answers, no end token, packed rows of
{LENGTH} tokens, {ROWS} of them a step on every grid, micro-batches of {MICRO_ROWS}. {steps} steps in fp32 of AdamW
(peak rate {LR:g}, betas {BETAS[0]} and {BETAS[1]}, eps {EPS:g}, decay {DECAY} on matrices), gradients clipped at
{CLIP:g}; {warmup_of(steps)} steps of warm-up, then linear to 0. Grids are stages × replicas;
3×1 is uneven: 2, 2 and 1 layers. The last {held_out} problems are held out.

The plain loop is transformers' model with torch's own AdamW and clipping and transformers' schedule, in one process, on
the same rows. It measures held-out perplexity by itself, on rows that its own tokenizer made.

{rows}

Held-out losses, before and after, are at most {worst:.1e} nats a token apart.

![Loss curves, and their distance from the plain loop's](parity.png)

torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, one thread a process.
"""


def draw(reference: Outcome, outcomes: dict[str, Outcome], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (curves, distances) = plt.subplots(2, 1, figsize=(9, 7), sharex=True, height_ratios=(3, 2))
    steps = range(1, len(reference.losses) + 1)
    curves.plot(steps, reference.losses, color="0.75", linewidth=5, label="Hugging Face's loop")
    for number, (name, outcome) in enumerate(outcomes.items()):
        dashes = (0, (2, 2 + 2 * number))
        curves.plot(steps, outcome.losses, color=f"C{number}", linewidth=1.2, linestyle=dashes, label=name)
        apart = [abs(a - b) for a, b in zip(outcome.losses, reference.losses, strict=True)]
        distances.semilogy(steps, [max(one, 1e-9) for one in apart], color=f"C{number}", linewidth=0.8, label=name)
    distances.axhline(BOUND, color="black", linewidth=0.8, linestyle="--")
    distances.text(1, BOUND * 1.3, "the bound", fontsize=8)
    distances.set_ylim(top=5 * BOUND)
    curves.set_ylabel("training loss, nats a token")
    distances.set_ylabel("|Δ| to Hugging Face's loop")
    distances.set_xlabel("step")
    curves.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def data(name: str) -> Path | None:
    return Path(DATA, name) if DATA is not None else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=data("stories260K"), help="folder of a pretrained Llama")
    parser.add_argument("--task", type=Path, default=data("gsm8k/train.jsonl"), help="question, answer a line")
    parser.add_argument("--steps", type=int, default=300, help="steps of each run [300]")
    parser.add_argument("--held-out", type=int, default=200, help="lines at the end of --task that are held out [200]")
    parser.add_argument("--grids", default=",".join(grid.name for grid in GRIDS), help="which of [1×1,2×1,2×2,3×1]")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where parity.md and parity.png go [docs]")
    told = parser.parse_args()
    for flag, path in (("--model", told.model), ("--task", told.task)):
        if path is None:
            parser.error(f"{flag} is needed, where FARSPAN_DATA names no folder with stories260K and gsm8k")
        if not path.exists():
            parser.error(f"{flag} {path} is not there: any small Llama, and GSM8K's train.jsonl, will do")
    wanted = told.grids.replace("x", "×").split(",")
    grids = [grid for grid in GRIDS if grid.name in wanted]
    if len(grids) != len(wanted):
        parser.error(f"--grids {told.grids}: known are {', '.join(grid.name for grid in GRIDS)}")
    logging.disable_progress_bar()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_config, held_config = split_task(told.task, told.held_out, folder)
        reference = hugging_face(told.model, train_config, folder / "held.jsonl", told.steps, folder / "cache")
        print(f"Hugging Face's loop: loss {reference.losses[0]:.4f} → {reference.losses[-1]:.4f}", flush=True)
        outcomes = {}
        for grid in grids:
            outcomes[grid.name] = train(grid, told.model, train_config, held_config, told.steps, folder)
            print(f"{grid.name}: max |Δ| {outcomes[grid.name].distance(reference):.1e}", flush=True)
    told.docs.mkdir(parents=True, exist_ok=True)
    (told.docs / "parity.md").write_text(page(reference, outcomes, told.held_out), encoding="utf-8")
    draw(reference, outcomes, told.docs / "parity.png")
    print("\n".join(table(reference, outcomes)))
    print(f"this took {time.perf_counter() - start:.0f} s")
    found = faults(reference, outcomes)
    for fault in found:
        print(f"parity: {fault}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
