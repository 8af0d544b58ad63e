"""`--check`: what it prints of a good run, and how it ends where a run would not go well."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from farspan.comm import probe
from farspan.comm.probe import EdgeFigures
from farspan.comm.topology import Topology
from farspan.converters.hf import import_hf
from farspan.pipeline.schedule import gpipe, one_f_one_b
from farspan.pipeline.step_time import StepTime
from farspan.runtime.flags.config import Config
from farspan.runtime.preflight import check as room
from farspan.runtime.preflight import measure
from farspan.runtime.preflight.check import file_problems, memory_problems
from farspan.runtime.preflight.measure import Edge, edges_of, in_rounds
from farspan.runtime.preflight.report import report
from launch import Run
from tiny import make_model

Flags = Callable[..., dict[str, Any]]


def be_quick() -> None:
    """The least that can be measured."""
    probe._ENOUGH_S, probe._MOST, probe._REST_S = 0.01, 1 << 17, 0.0
    measure._LONG_ENOUGH_S, measure._ROUNDS = 0.0, 1


def have_little_memory() -> None:
    be_quick()
    room.free_host_memory = lambda: 100_000  # type: ignore[assignment]


@pytest.fixture
def shards(model: Path, tmp_path: Path) -> Path:
    return import_hf("gptneox", str(model), tmp_path / "shards")


def test_a_good_grid_is_told_so(flags: Flags, shards: Path, tmp_path: Path) -> None:
    told = flags(model_name=shards, task_name="no-such-file.jsonl", check=True, gradient_accumulate_step=2)
    with Run(2, 2, told, faults=dict.fromkeys(range(4), be_quick)) as run:
        run.succeed()
        said = run.err(0)
        for rank in (1, 2, 3):
            assert run.err(rank).strip() == ""
    for edge in ("0→1", "1→0", "2→3", "3→2"):
        assert re.search(rf"^  {edge} +pipeline +[\d.]+ ms +[\d.]+ Mbit/s +[\d.]+ Mbit/s +0.00 MiB, ", said, re.M), said
    for edge in ("0→2", "2→0", "1→3", "3→1"):
        assert re.search(rf"^  {edge} +replicas +[\d.]+ ms +[\d.]+ Mbit/s", said, re.M), said
    for edge in ("0→1", "0→2", "0→3"):
        assert re.search(rf"^  {edge} +data ", said, re.M), said
    assert re.search(
        r"^  rank +weights +masters +grads +moments +activ\. +work +messages +heap +all +free$", said, re.M
    )
    assert re.search(r"^  3 +1: layers 3–4 \+ head +\S+$", said, re.M)
    assert said.count("as SHA256SUMS says") == 4
    assert re.search(r"^an update: [\d.]+ s simulated, \d+ tokens/s, bubble \d+%$", said, re.M)
    assert "the run: 3 updates, " in said
    assert re.search(r"^verdict: good$", said, re.M)
    assert sorted(path.name for path in (tmp_path / "ck").iterdir()) == [f"rank{rank}.err" for rank in range(4)]


def test_every_kind_of_sum_is_measured(flags: Flags, tmp_path: Path) -> None:
    tied = make_model(tmp_path / "tied", "llama", tie_word_embeddings=True)
    told = flags(
        model_name=tied, check=True, dp_mode="zero1", bf16=True, pp_mode="1f1b", recompute="block", bucket_mb=0.02,
        optimizer="adam", nepochs=1, total_steps=None, keep_checkpoints=None,
    )  # fmt: skip
    with Run(2, 2, told, faults=dict.fromkeys(range(4), be_quick)) as run:
        run.succeed()
        said = run.err(0)
    assert re.search(r"^an update: [\d.]+ s simulated", said, re.M)
    assert re.search(r"^disk: a checkpoint takes [\d.]+ GiB, the 2 that are kept [\d.]+ GiB$", said, re.M)
    assert "the run:" not in said  # its length is counted when it starts
    assert re.search(r"^  0 +[\d.]+ ms +[\d.]+ ms +[\d.]+ ms +[\d.]+ ms$", said, re.M)


def test_one_process_has_no_network(flags: Flags) -> None:
    with Run(1, 1, flags(check=True, load_pretrained_model="false"), faults={0: be_quick}) as run:
        run.succeed()
        said = run.err(0)
    assert "one process: none is needed" in said
    assert re.search(r"^disk: a checkpoint takes [\d.]+ GiB, and all are kept$", said, re.M)
    assert "random, from --seed" in said
    assert "verdict: good" in said


def test_a_missing_shard_and_a_broken_one_are_named_at_once(flags: Flags, shards: Path) -> None:
    (shards / "model-00006-of-00007.safetensors").unlink()
    broken = shards / "model-00002-of-00007.safetensors"
    data = bytearray(broken.read_bytes())
    data[-1] ^= 1
    broken.write_bytes(data)
    with Run(2, 1, flags(model_name=shards, check=True), faults=dict.fromkeys((0, 1), be_quick)) as run:
        ended = run.wait(60)
    for end in ended.values():
        assert end.code == 1
        line = end.err.splitlines()[-1]
        assert "--check: do not start this run: " in line
        assert f"rank 0: {broken} is not what SHA256SUMS says" in line
        assert f"rank 1: {shards / 'model-00006-of-00007.safetensors'} is missing" in line
    assert "verdict: do not start this run" in ended[0].err
    assert re.search(r"^  0→1 +pipeline ", ended[0].err, re.M)  # the rest is told all the same


def test_two_sites_with_different_weights(flags: Flags, shards: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    (other / "SHA256SUMS").unlink()
    head = other / "model-00007-of-00007.safetensors"
    data = bytearray(head.read_bytes())
    data[-1] ^= 1
    head.write_bytes(data)
    told = flags(model_name=shards, check=True)
    with Run(1, 2, told, by_rank={1: {"model_name": other}}, faults=dict.fromkeys((0, 1), be_quick)) as run:
        ended = run.wait(60)
    for end in ended.values():
        assert end.code == 1
        assert "model-00007-of-00007.safetensors is not the same on rank 0 and rank 1" in end.err.splitlines()[-1]


def test_too_little_memory_is_told_before_any_is_taken(flags: Flags) -> None:
    with Run(2, 1, flags(check=True), faults=dict.fromkeys((0, 1), have_little_memory)) as run:
        ended = run.wait(60)
    for end in ended.values():
        assert end.code == 1
        assert re.search(r"rank 0, 1: [\d.]+ GiB will be needed of \S+ and 0.0 GiB are free", end.err.splitlines()[-1])
    assert "not measured" in ended[0].err


def test_a_giant_is_planned_without_a_byte_of_it(flags: Flags, model: Path, tmp_path: Path) -> None:
    giant = tmp_path / "giant"
    shutil.copytree(model, giant)
    config = json.loads((giant / "config.json").read_text())
    big = {"hidden_size": 8192, "num_attention_heads": 64, "intermediate_size": 32768}
    (giant / "config.json").write_text(json.dumps({**config, **big}))
    with Run(1, 1, flags(model_name=giant, check=True, load_pretrained_model="false"), faults={0: be_quick}) as run:
        ended = run.wait(60)
    assert ended[0].code == 1
    found = re.search(r"rank 0: ([\d.]+) GiB will be needed", ended[0].err)
    assert found is not None
    assert 60 < float(found[1]) < 80  # 5 layers of 0.8 · 10⁹ parameters, 16 bytes each, and the heap's share


def told_of(need: float, free: float, pool: str = "host a") -> dict[str, Any]:
    return {"pools": {pool: [free, need]}, "files": {"problems": [], "sums": {}}}


def test_ranks_of_one_host_share_its_memory() -> None:
    gib = 2**30
    assert memory_problems([told_of(4 * gib, 10 * gib), told_of(5 * gib, 9.5 * gib)]) == []
    assert memory_problems([told_of(6 * gib, 10 * gib), told_of(6 * gib, 10 * gib, "far b")]) == []
    (problem,) = memory_problems([told_of(6 * gib, 10 * gib), told_of(6 * gib, 9 * gib)])
    assert problem.startswith("rank 0, 1: 12.0 GiB will be needed of host and 9.0 GiB are free")


def test_files_that_differ_are_named_once() -> None:
    ranks = [told_of(0, 1) | {"files": {"problems": [], "sums": {"head": digest}}} for digest in ("x", "x", "y")]
    assert file_problems(ranks) == ["head is not the same on rank 0 and rank 2: copy one over the other"]


def test_edges_are_measured_together_only_where_no_host_has_two() -> None:
    config = Config(pipeline_group_size=2, data_group_size=2, batch_size=8, micro_batch_size=2)
    edges = list(edges_of(config, Topology(2, 2), gpipe(2, 4), 100))
    ends = [(edge.kind, edge.source, edge.target) for edge in edges]
    pipeline = [("pipeline", *pair) for pair in ((0, 1), (1, 0), (2, 3), (3, 2))]
    replicas = [("replicas", *pair) for pair in ((0, 2), (2, 0), (1, 3), (3, 1))]
    assert ends == [*pipeline, *replicas, *[("data", 0, rank) for rank in (2, 1, 3)]]
    assert (edges[0].message_bytes, edges[0].messages) == (100, 4)
    # There and back, as many as the first of the two stages keeps alive.
    far = edges_of(config, Topology(1, 3), one_f_one_b(3, 8, ahead=2), 100)
    assert [edge.messages for edge in far if edge.kind == "pipeline"] == [5, 5, 3, 3]
    rounds = in_rounds(edges, ["a", "b", "c", "d"])
    assert sorted((e.kind, e.source, e.target) for members in rounds for e in members) == sorted(ends)
    assert [(e.source, e.target) for e in rounds[0]] == [(0, 1), (2, 3)]
    for members in rounds:
        hosts = [host for edge in members for host in (edge.source, edge.target)]
        assert len(hosts) == len(set(hosts))
    assert all(len(members) == 1 for members in in_rounds(edges, ["a", "a", "a", "a"]))


def test_the_report_fits_100_columns() -> None:
    """Of a large run, on machines with long names."""
    size = int(123.4 * 2**30)
    need = dict.fromkeys(
        ("weights", "masters", "gradients", "moments", "activations", "work", "messages", "heap"), size
    )
    files = {"count": 123, "size": size, "known": False, "problems": []}
    pools = {
        "ip-172-31-120-110.ec2.internal boot": (8 * size, size),
        "ip-172-31-120-110.ec2.internal:cuda:0 uuid": (size, size),
    }
    ranks = [{"need": need, "what": "embedding + layers 100–119 + head", "pools": pools, "files": files}] * 128
    figures = EdgeFigures(1.2345, 1.25e9, 1.25e9, 4, 512 << 20, (123.4, 123.4), 1.0)
    found = [{"layers": dict.fromkeys(("forward", "backward", "update"), 12.3), "sums": {"buckets": [123.4]}}] * 128
    config = Config(total_steps=2_000_000, seq_length=4096)
    step = StepTime(1234.5, 123.4, 12.3, 12.3, 123.4, 0.5)
    said = report(
        config, Topology(16, 8), ranks, [(Edge("pipeline", 100, 101, "100→101", "101→100"), figures)], found, step, []
    )
    assert max(map(len, said.splitlines())) <= 100
    assert "100→101" in said
