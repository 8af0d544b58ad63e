"""What the stages of a plan queue on their devices over NCCL, played on paper: it runs to its end, though a transfer
occupies its stream until the peer's is there, and messages come in while the device computes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from farspan.comm.codecs.codec import RawCodec
from farspan.comm.lanes.stream_lane import StreamLane
from farspan.comm.link import Receiver, Sender
from farspan.pipeline.executor import Batch, Edges, Executor
from farspan.pipeline.schedule import Plan, forward_only, gpipe, lower, one_f_one_b
from torch import Tensor, nn

CPU = torch.device("cpu")  # of the tensors; devices and streams are stand-ins
STAGES, MICRO_BATCHES, COMPUTE, TRANSFER = 3, 5, 1.0, 1.0


class Stream:
    """What was queued on it, in order: "compute", an event to record or to wait for, an end of a message."""

    def __init__(self) -> None:
        self.queued: list[tuple[str, Any]] = []
        self.now = 0.0

    def wait_event(self, event: Event) -> None:
        self.queued.append(("wait", event))

    def query(self) -> bool:
        return True


class Event:
    at: float | None = None

    def record(self, stream: Stream) -> None:
        stream.queued.append(("event", self))


class Machine:
    """The streams of one rank's device after another."""

    def __init__(self) -> None:
        self.here = threading.local()
        self.devices: list[list[Stream]] = []

    def begin(self) -> None:
        self.devices.append([Stream()])

    def stream(self, _device: object, priority: int = 0) -> Stream:
        self.devices[-1].append(made := Stream())
        return made

    def current(self, _device: object = None) -> Stream:
        return getattr(self.here, "stream", self.devices[-1][0])

    @contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        self.here.stream = stream
        yield


class Wire:
    """A group of which nobody listens at the other end: it queues what NCCL's would."""

    ahead = 0

    def __init__(self, machine: Machine, name: str) -> None:
        self._machine, self._name = machine, name

    def send(self, x: Tensor, to: int, **_: Any) -> None:  # noqa: ANN401
        self._machine.current().queued.append(("send", self._name))

    def recv(self, out: Tensor, source: int, **_: Any) -> None:  # noqa: ANN401
        out.zero_()
        self._machine.current().queued.append(("receive", self._name))


class Toy(nn.Module):
    """A stage of one multiplication, which tells its device when it computes."""

    def __init__(self, machine: Machine, at: int) -> None:
        super().__init__()
        self.is_first, self.is_last = at == 0, at == STAGES - 1
        self.device, self.dtype, self.spec = CPU, torch.float32, SimpleNamespace(width=1)
        self.weight = nn.Parameter(torch.ones(1))

        class Times(torch.autograd.Function):
            @staticmethod
            def forward(_: Any, x: Tensor, weight: Tensor) -> Tensor:  # noqa: ANN401
                machine.current().queued.append(("compute", "forward"))
                return x * weight

            @staticmethod
            def backward(_: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
                machine.current().queued.append(("compute", "backward"))
                return grad, grad.sum().view(1)

        self.times = Times.apply

    def forward(self, x: Tensor, *_: object) -> Tensor:
        y = self.times(x.float().unsqueeze(-1) if self.is_first else x, self.weight)
        return y.sum() if self.is_last else y


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    for name, fake in {
        "Stream": made.stream, "Event": Event, "current_stream": made.current, "stream": made.use,
        "set_device": lambda device: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: None)
    return made


def edges(machine: Machine, at: int, lanes: list[StreamLane]) -> Edges:
    def lane() -> StreamLane:
        lanes.append(StreamLane("lane", CPU))
        return lanes[-1]

    def sender(to: int) -> Sender | None:
        return Sender(Wire(machine, f"{at}→{to}"), to, RawCodec(), lane(), 1.0) if 0 <= to < STAGES else None

    def receiver(source: int) -> Receiver | None:
        if not 0 <= source < STAGES:
            return None
        return Receiver(Wire(machine, f"{source}→{at}"), source, RawCodec(), lane(), 1.0, device=CPU, depth=0)

    return Edges(receiver(at - 1), sender(at - 1), receiver(at + 1), sender(at + 1))


def walk(machine: Machine, plan: Plan, steps: int) -> None:
    """Each stage by itself: queueing never waits for a peer."""
    tokens = torch.zeros(MICRO_BATCHES, 1, dtype=torch.int64)
    for at, row in enumerate(lower(plan)):
        machine.begin()
        lanes: list[StreamLane] = []
        executor = Executor(Toy(machine, at), row, edges(machine, at, lanes), 1, 1)
        for _ in range(steps):
            executor.step(Batch(tokens, tokens, 1))
        for lane in lanes:
            lane.close()


def play(devices: list[list[Stream]]) -> float:
    """When the last stream is done; computing and transfers take as long as is said above. Fails where all that is left
    waits for one another."""
    streams = [stream for device in devices for stream in device]
    moving = True
    while moving:
        moving = False
        ends: dict[str, Stream] = {}  # messages of which one end is there
        for stream in streams:
            while stream.queued:
                kind, what = stream.queued[0]
                if kind == "compute":
                    stream.now += COMPUTE
                elif kind == "event":
                    what.at = stream.now
                elif kind == "wait":
                    if what.at is None:
                        break
                    stream.now = max(stream.now, what.at)
                elif what not in ends:
                    ends[what] = stream
                    break
                else:
                    other = ends.pop(what)
                    stream.now = other.now = max(stream.now, other.now) + TRANSFER
                    other.queued.pop(0)
                stream.queued.pop(0)
                moving = True
    assert not any(stream.queued for stream in streams), [s.queued[0] for s in streams if s.queued]
    return max(stream.now for stream in streams)


PLANS = {
    "gpipe": gpipe(STAGES, MICRO_BATCHES),
    "1f1b": one_f_one_b(STAGES, MICRO_BATCHES),
    "1f1b, 3 ahead": one_f_one_b(STAGES, MICRO_BATCHES, 3),
    "forward only": forward_only(STAGES, MICRO_BATCHES),
}


@pytest.mark.parametrize("name", PLANS)
def test_what_is_queued_runs_to_its_end(machine: Machine, name: str) -> None:
    walk(machine, PLANS[name], steps=2)
    assert play(machine.devices) > 0


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        # Three stages and two messages until the first micro-batch is through, then one every second.
        ("forward only", 5 + MICRO_BATCHES - 1),
        # The same there and, from the last forward on, back.
        ("gpipe", 2 * (5 + MICRO_BATCHES - 1)),
    ],
)
def test_messages_come_in_while_the_device_computes(machine: Machine, name: str, seconds: float) -> None:
    walk(machine, PLANS[name], steps=1)
    assert play(machine.devices) == seconds
