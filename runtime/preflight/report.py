"""What `--check` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...comm.probe import EdgeFigures
from ...comm.topology import Topology
from ...pipeline.step_time import StepTime
from ..checkpoints.retention import ALL
from ..flags.config import Config
from .measure import CONNECTIONS, Edge

# What is counted, and its name in a table of at most 100 columns.
_PARTS = {
    "weights": "weights", "masters": "masters", "gradients": "grads", "moments": "moments", "activations": "activ.",
    "work": "work", "messages": "messages", "heap": "heap",
}  # fmt: skip


def report(
    config: Config,
    topology: Topology,
    ranks: Sequence[dict[str, Any]],
    figures: Sequence[tuple[Edge, EdgeFigures]],
    found: Sequence[dict[str, Any]],
    step: StepTime | None,
    problems: Sequence[str],
    better: str = "",
) -> str:
    """Tables of the ranks, the network, the memory and the weights, the simulated step with a line on what were
    `better`, and the verdict."""
    sections = [
        ["ranks", *_ranks(topology, ranks)],
        ["network", *_network(figures)],
        ["memory, GiB", *_memory(ranks)],
        [_disk(config, topology, ranks)],
        ["weights", *(_weights(ranks) if config.load_pretrained_model else ["  random, from --seed"])],
        ["computing, for a micro-batch", *(_seconds(found) if step is not None else ["  not measured: see below"])],
    ]
    if step is not None:
        sections.append(_update(config, topology, step, better))
    sections.append([f"verdict: {'do not start this run' if problems else 'good'}", *(f"  {p}" for p in problems), ""])
    return "\n".join(line for section in sections for line in ("", *section))


def _ranks(topology: Topology, ranks: Sequence[dict[str, Any]]) -> list[str]:
    rows = [["rank", "stage", "on"]]
    for rank, told in enumerate(ranks):
        where = [*told["pools"]][-1].split(" ")[0]  # a host, or a GPU of it
        rows.append([str(rank), f"{topology.coord(rank).stage}: {told['what']}", where])
    return _table(rows)


def _network(figures: Sequence[tuple[Edge, EdgeFigures]]) -> list[str]:
    rows = [["edge", "for", "round trip", "1 connection", f"{CONNECTIONS} connections", "a step's message"]]
    for edge, seen in figures:
        message = f"{1e3 * (seen.burst_s[-1] + seen.turn_s):.1f} ms" if seen.burst_s else ""
        if seen.burst_s:
            message = f"{seen.message_bytes / 2**20:.2f} MiB, {message}"
        rates = (f"{8e-6 * rate:.1f} Mbit/s" for rate in (seen.one_rate, seen.many_rate))
        rows.append([f"{edge.source}→{edge.target}", edge.kind, f"{1e3 * seen.round_trip_s:.1f} ms", *rates, message])
    return _table(rows) if len(rows) > 1 else ["  one process: none is needed"]


def _memory(ranks: Sequence[dict[str, Any]]) -> list[str]:
    rows = [["rank", *_PARTS.values(), "all", "free"]]
    for rank, told in enumerate(ranks):
        need = [told["need"][part] for part in _PARTS]
        free = " + ".join(_gib(free) for free, _ in told["pools"].values())
        rows.append([str(rank), *map(_gib, need), _gib(sum(need)), free])
    return [
        *_table(rows),
        "  beside what a process holds before it loads a model. activ.: activations of the micro-batches",
        "  alive at once; work: what comes and goes; heap: malloc's holes, on a CPU. Ranks of one host or",
        "  GPU share what is free",
    ]


def _weights(ranks: Sequence[dict[str, Any]]) -> list[str]:
    rows = [["rank", "files", "GiB", "digests"]]
    for rank, told in enumerate(ranks):
        files = told["files"]
        how = "as SHA256SUMS says" if files["known"] else "no SHA256SUMS: compared between ranks alone"
        rows.append(
            [
                str(rank),
                str(files["count"]),
                _gib(files["size"]),
                f"{len(files['problems'])} wrong" if files["problems"] else how,
            ]
        )
    return _table(rows)


def _seconds(found: Sequence[dict[str, Any]]) -> list[str]:
    rows = [["rank", "forward", "backward", "sum over replicas", "optimizer, an update"]]
    for rank, each in enumerate(found):
        layers = each["layers"]
        summed = sum(each["sums"]["buckets"])
        rows.append(
            [
                str(rank),
                *(f"{1e3 * layers[k]:.1f} ms" for k in ("forward", "backward")),
                f"{1e3 * summed:.1f} ms",
                f"{1e3 * layers['update']:.1f} ms",
            ]
        )
    return _table(rows)


def _update(config: Config, topology: Topology, step: StepTime, better: str) -> list[str]:
    """One update as simulated, and the run that is made of it."""
    tokens = config.gradient_accumulate_step * topology.replicas * config.batch_size * config.seq_length
    pace = f"{tokens / step.seconds:.0f} tokens/s, bubble {step.bubble:.0%}"
    lines = [
        f"an update: {step.seconds:.2f} s simulated, {pace}",
        f"  pipeline {step.pipeline:.2f} s, sums not hidden behind it {step.sums:.2f} s, vote {step.vote:.2f} s,",
        f"  optimizer {step.optimizer:.2f} s; the data, beside these, {step.feed:.2f} s",
    ]
    if better:
        lines.append(better)
    if config.total_steps:
        hours = _hours(config.updates * step.seconds)
        lines.append(f"the run: {config.updates} updates, {hours} without evaluations and checkpoints")
    return lines


def _disk(config: Config, topology: Topology, ranks: Sequence[dict[str, Any]]) -> str:
    """What a checkpoint takes of all sites' disks together: every layer once, however many replicas have it."""
    parts = {part: sum(told["need"][part] for told in ranks) for part in ("weights", "masters", "moments")}
    shares = 1 if config.dp_mode == "zero1" else topology.replicas
    one = parts["weights"] / topology.replicas + (parts["masters"] + parts["moments"]) / shares
    if config.keep_checkpoints == ALL:
        return f"disk: a checkpoint takes {_gib(one)} GiB, and all are kept"
    most = config.keep_checkpoints + bool(config.evaluation_data)
    return (
        f"disk: a checkpoint takes {_gib(one)} GiB, the {most} that are kept {_gib(most * one)} GiB\n"
        f"  (--keep-checkpoints), and while another is written {_gib((most + 1) * one)} GiB"
    )


def _gib(size: float) -> str:
    gib = size / 2**30
    return f"{gib:.1f}" if gib >= 10 else f"{gib:.2f}" if gib >= 0.1 else f"{gib:.4f}"


def _hours(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
