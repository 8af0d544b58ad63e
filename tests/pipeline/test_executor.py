"""Stages in threads of one process, joined by real links, lanes and codecs over memory, against one plain backward."""

from __future__ import annotations

import gc
import queue
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from farspan.comm.codecs.codec import RawCodec
from farspan.comm.lanes.lane import ThreadLane
from farspan.comm.link import Receiver, Sender
from farspan.modules.layers import build_layers, hf_names
from farspan.modules.loss import count_valid, cross_entropy_sum
from farspan.modules.shards import ShardStore
from farspan.pipeline.executor import Batch, Edges, Executor
from farspan.pipeline.partition import stage_units
from farspan.pipeline.schedule import Op, Plan, forward_only, gpipe, lower, one_f_one_b
from farspan.pipeline.stage import Stage
from memory import MemoryGroup, MemoryWire
from plans import live_bound
from tiny import VOCAB, make_model
from torch import Tensor, nn

ROWS, LENGTH = 8, 12
CPU = torch.device("cpu")
PLANS: dict[str, Callable[[int, int], Plan]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "1f1b, two ahead": lambda stages, micro_batches: one_f_one_b(stages, micro_batches, ahead=2),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ShardStore:
    return ShardStore(make_model(tmp_path_factory.mktemp("model"), "gptneox"))


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    """Of two accumulation steps. Targets are missing here and there, so micro-batches do not weigh the same."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, VOCAB, (2, ROWS, LENGTH), generator=generator)
    labels = torch.randint(0, VOCAB, (2, ROWS, LENGTH), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    labels[0, 0] = -100
    return [Batch(tokens[i], labels[i], count_valid(labels)) for i in range(2)]


def load(layers: list[nn.Module] | nn.ModuleList, units: range, store: ShardStore) -> None:
    for unit, layer in zip(units, layers, strict=True):
        layer.load_state_dict(store.read_unit(unit))


@dataclass
class Truth:
    loss_sums: list[float]
    gradients: dict[str, Tensor]  # by HF name


@pytest.fixture(scope="module")
def truth(store: ShardStore, batches: list[Batch]) -> Truth:
    units = range(store.spec.unit_count)
    layers = build_layers(store.spec, units)
    load(layers, units, store)
    sums = []
    for batch in batches:
        x = batch.tokens
        for layer in layers:
            x = layer(x)
        loss = cross_entropy_sum(x, batch.labels)
        (loss / batch.valid).backward()
        sums.append(loss.item())
    gradients = {
        hf_names(store.spec, unit)[name]: parameter.grad
        for unit, layer in zip(units, layers, strict=True)
        for name, parameter in layer.named_parameters()
    }
    return Truth(sums, gradients)


class Pipeline:
    """All stages of one replica. `run` lets each act in a thread of its own."""

    def __init__(
        self, store: ShardStore, split: tuple[int, ...], plan: Plan, make_stage: Callable[..., Stage] = Stage
    ) -> None:
        wire, count = MemoryWire(), len(split)
        self.lanes: list[ThreadLane] = []
        self.spans: list[list[tuple[str, str]]] = [[] for _ in split]
        ends: list[dict[str, Sender | Receiver]] = [{} for _ in split]

        def lane(name: str) -> ThreadLane:
            self.lanes.append(ThreadLane(name))
            return self.lanes[-1]

        for a, b in [*pairwise(range(count)), *((b, a) for a, b in pairwise(range(count)))]:
            name = f"{a}→{b}"
            out, into = (MemoryGroup(wire, name, (a, b), rank) for rank in (a, b))
            sender = Sender(out, b, RawCodec(), lane(name), 20.0)
            receiver = Receiver(into, a, RawCodec(), lane(name), 20.0, device=CPU)
            ends[a]["to_next" if a < b else "to_previous"] = sender
            ends[b]["from_previous" if a < b else "from_next"] = receiver
        self.stages, self.executors = [], []
        micro_rows = ROWS // sum(action.op is Op.FORWARD for action in plan[0])
        for at, row in enumerate(lower(plan)):
            stage = make_stage(store.spec, stage_units(split, at), dtype=torch.float32, device=CPU)
            load(stage.layers, stage.units, store)
            spans = self.spans[at]
            self.stages.append(stage)
            self.executors.append(
                Executor(
                    stage,
                    row,
                    Edges(**ends[at]),
                    micro_rows,
                    LENGTH,
                    lambda lane, name, *_, s=spans: s.append((lane, name)),
                )
            )

    def run(self, batches: list[Batch]) -> list[float]:
        """The loss sums of the last stage, one a batch; its place is its seed. Fails where a stage raises or hangs."""
        ended: queue.Queue[tuple[int, object]] = queue.Queue()

        def work(at: int) -> None:
            sums: list[float] = []
            try:
                for seed, batch in enumerate(batches):
                    tokens = batch.tokens if at == 0 else None
                    labels = batch.labels if at == len(self.stages) - 1 else None
                    sums.append(self.executors[at].step(Batch(tokens, labels, batch.valid), seed).item())
                ended.put((at, sums))
            except Exception as error:
                ended.put((at, error))

        for at in range(len(self.stages)):
            threading.Thread(target=work, args=(at,), daemon=True).start()
        results = dict(ended.get(timeout=30) for _ in self.stages)
        for lane in self.lanes:
            lane.close()
        for result in results.values():
            if isinstance(result, Exception):
                raise result
        for at in range(len(self.stages) - 1):
            assert results[at] == [0.0] * len(batches)
        return results[len(self.stages) - 1]

    def gradients(self) -> dict[str, Tensor]:
        return {t.hf_name: t.parameter.grad for stage in self.stages for t in stage.tensors()}


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize(
    ("split", "micro_batches"), [((5,), 2), ((3, 2), 4), ((3, 2), 1), ((1, 3, 1), 4), ((2, 1, 1, 1), 8)]
)
def test_gradients_are_those_of_one_plain_backward(
    store: ShardStore, batches: list[Batch], truth: Truth, split: tuple[int, ...], micro_batches: int, kind: str
) -> None:
    pipeline = Pipeline(store, split, PLANS[kind](len(split), micro_batches))
    sums = pipeline.run(batches)
    assert sums == pytest.approx(truth.loss_sums, rel=1e-6)
    found = pipeline.gradients()
    assert found.keys() == truth.gradients.keys()
    for name, want in truth.gradients.items():
        assert (found[name] - want).norm() <= 1e-5 * want.norm(), name


@pytest.mark.parametrize("kind", PLANS)
def test_a_stage_computes_what_its_row_says_in_its_order(store: ShardStore, batches: list[Batch], kind: str) -> None:
    plan = PLANS[kind](3, 4)
    pipeline = Pipeline(store, (2, 2, 1), plan)
    pipeline.run(batches[:1])
    names = {Op.FORWARD: "forward", Op.BACKWARD: "backward"}
    assert pipeline.spans == [[(names[action.op], str(action)) for action in row] for row in plan]


def test_evaluation_is_a_plan_without_backwards(store: ShardStore, batches: list[Batch], truth: Truth) -> None:
    pipeline = Pipeline(store, (2, 2, 1), forward_only(3, 4), Watching)
    assert pipeline.run(batches) == pytest.approx(truth.loss_sums, rel=1e-6)
    assert set(pipeline.gradients().values()) == {None}
    assert [stage.most_kept for stage in pipeline.stages] == [0, 0, 0]  # autograd kept nothing at all


@pytest.mark.parametrize("split", [(5,), (2, 2, 1)])
def test_dropout_acts_in_training_and_not_in_evaluation(
    tmp_path: Path, batches: list[Batch], truth: Truth, split: tuple[int, ...]
) -> None:
    """Dropout has no parameters, so the weights are those of the model without it: so must be the evaluation."""
    dropping = ShardStore(make_model(tmp_path, "gptneox", hidden_dropout=0.3, attention_dropout=0.2))
    evaluating = Pipeline(dropping, split, forward_only(len(split), 4))
    assert evaluating.run(batches) == pytest.approx(truth.loss_sums, rel=1e-6)
    training = Pipeline(dropping, split, gpipe(len(split), 4))
    assert training.run(batches) != pytest.approx(truth.loss_sums, rel=1e-3)
    assert all(stage.training for stage in training.stages)


class Watching(Stage):
    """Writes down the seeds, and how much is alive whenever a forward has ended."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.seeds: list[int] = []
        self.kept: list[weakref.WeakSet] = []
        self.outputs: list[weakref.ref] = []
        self.most_kept = self.most_outputs = 0

    def forward(
        self, x: Tensor, seed: int = 0, labels: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        self.seeds.append(seed)
        self.kept.append(kept := weakref.WeakSet())

        def keep(tensor: Tensor) -> Kept:
            kept.add(holder := Kept(tensor))
            return holder

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda holder: holder.tensor):
            y = super().forward(x, seed, labels, positions)
        self.outputs.append(weakref.ref(y))
        self.most_kept = max(self.most_kept, sum(len(kept) > 0 for kept in self.kept))
        self.most_outputs = max(self.most_outputs, sum(output() is not None for output in self.outputs))
        return y


class Kept:
    """A tensor that autograd holds for a backward."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("ahead", [1, 2])
def test_a_stage_holds_no_more_activations_than_the_plan_says(
    store: ShardStore, batches: list[Batch], ahead: int
) -> None:
    gc.collect()
    lean = Pipeline(store, (2, 2, 1), one_f_one_b(3, 8, ahead), Watching)
    lean.run(batches)
    bounds = [live_bound(3, stage, 8, ahead) for stage in range(3)]
    assert [stage.most_kept for stage in lean.stages] == bounds
    for stage, bound in zip(lean.stages, bounds, strict=True):
        assert stage.most_outputs <= bound + 1  # the one that has just been used
    eager = Pipeline(store, (2, 2, 1), gpipe(3, 8), Watching)
    eager.run(batches[:1])
    assert [stage.most_kept for stage in eager.stages] == [8, 8, 8]
    for stage in (*lean.stages, *eager.stages):
        assert [len(kept) for kept in stage.kept] == [0] * len(stage.kept)


@pytest.mark.parametrize("kind", PLANS)
def test_every_micro_batch_has_its_own_seed_and_the_same_on_all_stages(
    store: ShardStore, batches: list[Batch], kind: str
) -> None:
    pipeline = Pipeline(store, (2, 2, 1), PLANS[kind](3, 4), Watching)
    pipeline.run(batches)
    for stage in pipeline.stages:
        assert stage.seeds == pipeline.stages[0].seeds
    assert len(set(pipeline.stages[0].seeds)) == 2 * 4
