"""What a stage will hold of memory, before any of it is taken.

The stage is built of fake tensors, which have shapes and no contents, and the executor itself walks a step with them:
so the bytes are those of a run, whatever the family, schedule, precision and recomputation.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..comm.lanes.lane import Ticket
from ..comm.link import WINDOW
from ..modules.layers import unit_elements
from ..modules.spec import ModelSpec
from .executor import Batch, Edges, Executor
from .gradients import Gradients
from .schedule import Action, Op, Row, live_activations
from .stage import Stage

HEAP_SHARE = 0.17
"""On a CPU: what malloc holds beyond what is in use, holes that fit nothing; 4 to 35 % were seen (glibc 2.36)."""
_MOMENTS = {"adamw": 8.0, "adam-l2": 8.0, "8bit-adam": 2 + 8 / 256}  # bytes a parameter


class Tracker(TorchDispatchMode):
    """Counts the bytes of all tensors that are made in it, until they are gone: `now`, and the `peak`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # untyped in torch
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the operation gives
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._see(x.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def gone(_: object) -> None:
            self.now -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


class Still:
    """A neighbour that is not there: it takes anything, and sends zeros on `device` at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def expect(self, count: int, shape: tuple[int, ...], dtype: torch.dtype, label: str = "") -> None:
        self._shape, self._dtype = shape, dtype

    def recv(self) -> Ticket:
        return _done(torch.zeros(self._shape, dtype=self._dtype, device=self._device))

    def send(self, x: Tensor, label: str = "") -> Ticket:
        return _done(None)


def still_edges(stage: Stage) -> Edges:
    """Neighbours for a stage that is alone."""
    still: Any = Still(stage.device)
    before = (None, None) if stage.is_first else (still, still)
    return Edges(*before, *((None, None) if stage.is_last else (still, still)))


def alone_row(stage: Stage, micro_batches: int) -> Row:
    """All forwards, then all backwards, with the messages of `stage`'s place."""
    row: list[Action] = []
    for op, recv, send in ((Op.FORWARD, Op.RECV_F, Op.SEND_F), (Op.BACKWARD, Op.RECV_B, Op.SEND_B)):
        forward = op is Op.FORWARD
        receives = not (stage.is_first if forward else stage.is_last)
        sends = not (stage.is_last if forward else stage.is_first)
        for mb in range(micro_batches):
            row += [Action(recv, 0, mb)] * receives + [Action(op, 0, mb)] + [Action(send, 0, mb)] * sends
    return tuple(row)


@dataclass(frozen=True)
class Estimate:
    """Bytes of one rank, in parts. `host`: those of masters and moments are in host memory (--use-offload)."""

    weights: int
    masters: int
    gradients: int
    moments: int
    activations: int
    work: int
    messages: int
    heap: int
    offload: bool = False

    @property
    def on_host(self) -> int:
        return self.masters + self.moments if self.offload else 0

    @property
    def on_device(self) -> int:
        parts = (self.weights, self.masters, self.gradients, self.moments, self.activations, self.work, self.messages)
        return sum(parts) + self.heap - self.on_host


def estimate(
    spec: ModelSpec,
    units: range,
    row: Row,
    *,
    rows: int,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
    recompute: str = "none",
    optimizer: str = "adamw",
    shards: int = 1,
    offload: bool = False,
    documents: bool = False,
) -> Estimate:
    """Of a stage with `units` that walks `row` of its plan, in micro-batches of `rows` × `length` tokens.

    activations: what the micro-batches that are alive at once keep for their backward; work: what comes and goes beside
    it at the worst moment; messages: what arrives ahead, and waits to leave. `shards`: replicas that share masters and
    moments (ZeRO-1). `documents`: those of a row do not see one another (--document-mask).
    """
    live = live_activations(row)
    one, two = (_rehearse(spec, units, mbs, rows, length, dtype, device, recompute, documents) for mbs in (1, 2))
    stage_bytes, kept = one[0], two[1] - one[1]
    stage = Stage(spec, units, dtype=dtype, device=torch.device("meta"))
    sizes = [t.parameter.numel() for t in stage.tensors()]
    elements, work = sum(sizes), one[1] - kept
    if dtype != torch.float32:  # a gradient, and its fp32 copy on the way to its sum, which no tracker sees
        work = max(work, (dtype.itemsize + 4) * max(sizes))
    if device.type == "cpu":  # loading holds one unit twice, before there are activations
        largest = max(unit_elements(spec, unit) for unit in units)
        work = max(work, 4 * largest - live * kept)
    apart = dtype != torch.float32 or offload
    message = rows * length * spec.width * dtype.itemsize
    ends = (units.start > 0) + (units.stop < spec.unit_count)
    count = sum(action.op is Op.FORWARD for action in row)
    arriving = min(count * message, max(2 * message, WINDOW))
    masters, moments = (int(x * elements / shards) for x in (4 * apart, _MOMENTS[optimizer]))
    held = (stage_bytes, masters, 4 * elements, moments, live * kept, work, ends * (arriving + 2 * message))
    return Estimate(*held, int(HEAP_SHARE * sum(held)) if device.type == "cpu" else 0, offload)


def _rehearse(
    spec: ModelSpec,
    units: range,
    micro_batches: int,
    rows: int,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
    recompute: str,
    documents: bool,
) -> tuple[int, int]:
    """Bytes of the weights, and the most that so many live micro-batches hold beside weights and gradients."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # late: it costs a second

    stage = Stage(spec, units, dtype=dtype, device=torch.device("meta"), recompute=recompute)
    list(stage.tensors())  # fills a cache of shapes, for which modules are made that cannot be fake
    with FakeTensorMode(), Tracker() as tracker:
        stage.device = device
        real: dict[int, nn.Parameter] = {}
        for module in stage.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    if id(p) not in real:  # a tied matrix is there twice
                        real[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=device))
                    module._parameters[name] = real[id(p)]
        weights = sum(prod(p.shape) * p.dtype.itemsize for p in real.values())
        gradients = Gradients([t.parameter for t in stage.tensors()])
        executor = Executor(stage, alone_row(stage, micro_batches), still_edges(stage), rows, length)
        tokens = torch.zeros(micro_batches * rows, length, dtype=torch.int64, device=device)
        before = tracker.peak = tracker.now
        executor.step(Batch(tokens, tokens, 1, tokens if documents else None))
        del gradients
        return weights, tracker.peak - before


def _done(value: object) -> Ticket:
    ticket = Ticket(lambda: None)
    ticket._settle(value, None)
    return ticket
