"""How fast rank 0 makes sequences: `python benchmarks/data.py` (see --help). CPU seconds, so that neighbours on the
machine do not count; lines of about 1 KB of English, three files mixed by weight.

mixing: index, draw, read, parse and pack, with an encoder that costs nothing.
tokenising: the same with a real tokenizer, against `tokenizers`' own batch call on the same texts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from farspan.runtime.data.open_tasks import open_tasks
from farspan.runtime.data.recipe import BackendEncoder, Encoded, Frame, Recipe
from farspan.runtime.data.task_spec import TaskSpec
from farspan.runtime.flags.config import Config

LENGTH = 1024


def free(texts: list[str], offsets: bool) -> Encoded:
    """256 tokens for each text, whatever it says."""
    return Encoded(np.zeros(256 * len(texts), dtype=np.uint32), np.full(len(texts), 256))


class Named:
    """As much of a vocabulary as tasks need."""

    digest, pad = "benchmark", 0

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, self.frame = recipe, recipe.frame
        self.added: list[str] = []

    def recipe(self, spec: TaskSpec) -> Recipe:
        return replace(self._recipe, spec=spec)


def make_files(folder: Path, text: str, lines: int) -> list[str]:
    rng = random.Random(0)
    texts = [text[(at := rng.randrange(len(text) - 1000)) : at + 960] for _ in range(lines)]
    for name in "abc":
        rng.shuffle(texts)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return texts


def cpu_s() -> float:
    return time.process_time()


def batch_call(serialized: str, texts: list[str]) -> tuple[int, float]:
    """Tokens, and CPU seconds."""
    from tokenizers import Tokenizer

    encode = Tokenizer.from_str(serialized).encode_batch_fast  # without offsets: the faster of its two
    start, count = cpu_s(), 0
    for at in range(0, len(texts), 256):
        count += sum(len(one.ids) for one in encode(texts[at : at + 256], add_special_tokens=False))
    return count, cpu_s() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="a text file to cut lines from")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer.json")
    parser.add_argument("--lines", type=int, default=100_000, help="lines of each file [100000]")
    parser.add_argument("--processes", type=int, default=2, help="for tokenising [2]")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = make_files(folder, told.text.read_text(), told.lines)
        tasks = ",".join(f"{folder / f'{n}.jsonl'}:{w}" for n, w in zip("abc", (0.5, 0.3, 0.2), strict=True))
        config = Config(task_name=tasks, data_cache=str(folder / "cache"), seq_length=LENGTH, wire_timeout=600.0)
        frame = Frame()

        start = cpu_s()
        mixture = open_tasks(config, Named(Recipe(TaskSpec(""), free, frame)))  # type: ignore[arg-type]
        size = sum((folder / f"{n}.jsonl").stat().st_size for n in "abc")
        print(f"index: {size / 1e6 / (cpu_s() - start):.0f} MB/s of file")
        rates = []
        for _ in range(5):
            start = cpu_s()
            mixture.draw(told.lines // 20)  # four lines a sequence
            rates.append(told.lines / 5 / (cpu_s() - start))
        print(f"mixing: {max(rates):,.0f} lines/s on one core (best of {len(rates)}; worst {min(rates):,.0f})")

        serialized, share = told.tokenizer.read_text(), texts[: min(told.lines, 20_000)]
        recipe = Recipe(TaskSpec(""), BackendEncoder(serialized), frame)
        workers = replace(config, data_workers=told.processes)
        # Processes that run side by side, so that both ways meet the same caches and clocks.
        count = told.processes
        with multiprocessing.get_context("spawn").Pool(count) as pool:
            parts = [(serialized, share[i::count]) for i in range(count)]
            pool.starmap(batch_call, [(serialized, share[:256])] * count)
            start = time.perf_counter()
            done = pool.starmap(batch_call, parts)
            wall = time.perf_counter() - start
        own = sum(t for t, _ in done) / sum(s for _, s in done)
        print(f"tokenizers' batch call: {own:,.0f} tokens/s of one core, {count} processes, {wall:.1f} s")
        drawn = len(share) * 960 // 4 // LENGTH
        mixture = open_tasks(workers, Named(recipe))  # type: ignore[arg-type]
        mixture.draw(8)  # the processes are there, and have work for a while
        start, wall = cpu_s(), time.perf_counter()
        before = children_s(mixture._pool.pids)  # type: ignore[attr-defined]
        given = mixture.draw(drawn).tokens.size
        here, there = cpu_s() - start, children_s(mixture._pool.pids) - before  # type: ignore[attr-defined]
        wall = time.perf_counter() - wall
        mixture.close()
        print(
            f"tokenising ahead: {given / there:,.0f} tokens/s of one core, {count} processes, {wall:.1f} s; "
            f"{given / there / own:.2f} × the batch call; rank 0 itself {here / (here + there):.0%} of the work"
        )
        print(f"peak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


def children_s(pids: list[int]) -> float:
    """CPU seconds that processes have taken."""
    import psutil

    return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)


if __name__ == "__main__":
    main()
