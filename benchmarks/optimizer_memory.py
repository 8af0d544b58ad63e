"""What each optimizer holds for one replica, and how long an update takes: a table, for the model of a folder."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from farspan.modules.shards import ShardStore
from farspan.pipeline.stage import Stage
from farspan.runtime.flags.config import Config
from farspan.runtime.optim.optimizer import Optimizer

CASES = (("adamw", "allreduce", 1), ("8bit-adam", "allreduce", 1), *(("adamw", "zero1", d) for d in (2, 3, 4)))


def main(folder: Path) -> None:
    spec = ShardStore(folder).spec
    print("| optimizer | dp-mode | replicas | moments, bytes/parameter | fp32 weights, bytes/parameter | update, ms |")
    print("|---|---|---|---|---|---|")
    for kind, mode, replicas in CASES:
        stage = Stage(spec, range(spec.unit_count), dtype=torch.bfloat16, device=torch.device("cpu"))
        for parameter in stage.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        optimizer = Optimizer(stage, Config(optimizer=kind, dp_mode=mode, data_group_size=replicas))
        optimizer.adopt()
        optimizer.gradients.flat.normal_()
        optimizer.step(1e-4, 1.0)
        start = time.perf_counter()
        for _ in range(3):
            optimizer.step(1e-4, 1.0)
        seconds = (time.perf_counter() - start) / 3
        parameters = sum(t.parameter.numel() for t in optimizer.tensors)
        moments, masters = optimizer.held_bytes()
        print(
            f"| {kind} | {mode} | {replicas} | {moments / parameters:.3f} | {masters / parameters:.3f} "
            f"| {seconds * 1e3:.0f} |"
        )


if __name__ == "__main__":
    reader = argparse.ArgumentParser(description=__doc__)
    reader.add_argument("model", type=Path, help="a Hugging Face folder, or one of layer shards")
    main(reader.parse_args().model)
