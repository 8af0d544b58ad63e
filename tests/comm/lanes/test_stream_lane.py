"""A lane with a stream waits for the submitter's stream, and makes the stream of whoever takes the result wait for it;
the host waits for neither. (On a stand-in for CUDA that writes down who waits for what.)"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from farspan.comm.errors import RemoteFailure
from farspan.comm.lanes.stopwatch import StreamStopwatch
from farspan.comm.lanes.stream_lane import StreamLane

DEVICE = torch.device("cpu")  # of the tensors; the streams are stand-ins


class Streams:
    """What happened on each stream, in the order in which it was queued."""

    def __init__(self) -> None:
        self.here = threading.local()
        self.said: dict[str, list[str]] = {"main": []}
        self.events = 0

    def current(self, _device: object = None) -> Stream:
        return getattr(self.here, "stream", None) or Stream("main")

    @contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        before, self.here.stream = self.current(), stream
        yield
        self.here.stream = before


class Stream:
    all: Streams

    def __init__(self, name: object, priority: int = 0) -> None:
        self.name = name if isinstance(name, str) else "lane"
        self.all.said.setdefault(self.name, [])

    def say(self, word: str) -> None:
        self.all.said[self.name].append(word)

    def wait_event(self, event: Event) -> None:
        self.say(f"wait for {event.name}")

    def query(self) -> bool:
        return True


class Event:
    name = "nothing"

    def record(self, stream: Stream) -> None:
        stream.all.events += 1
        self.name = f"event {stream.all.events}"
        stream.say(self.name)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    Stream.all = made = Streams()
    fakes = {"Stream": Stream, "Event": Event, "current_stream": made.current, "stream": made.use}
    for name, fake in {**fakes, "set_device": lambda device: None}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: stream.say(f"uses {int(x)}"))
    return made


def test_streams_wait_for_each_other(streams: Streams) -> None:
    lane = StreamLane("lane", DEVICE)

    def work() -> torch.Tensor:
        streams.current().say("work")
        return torch.tensor(7)

    streams.current().say("before")
    ticket = lane.submit(work, uses=torch.tensor(5))
    assert ticket._done.wait(20)
    streams.current().say("meanwhile")  # on the device, at the same time as the work
    assert int(ticket.get()) == 7
    streams.current().say("after")
    assert streams.said["main"] == ["before", "event 1", "meanwhile", "wait for event 2", "uses 7", "after"]
    assert streams.said["lane"] == ["uses 5", "wait for event 1", "work", "event 2"]
    lane.close()


def test_work_that_needs_nothing_of_the_submitters_begins_at_once(streams: Streams) -> None:
    lane = StreamLane("lane", DEVICE)
    streams.current().say("before")
    ticket = lane.submit(lambda: torch.tensor(7), after_caller=False)
    assert int(ticket.get()) == 7
    assert streams.said["lane"] == ["event 1"]
    assert streams.said["main"] == ["before", "wait for event 1", "uses 7"]
    lane.close()


def test_the_submitter_itself_keeps_the_memory_of_what_is_used(streams: Streams) -> None:
    """The lane's thread must not need the allocator: its lock may be held until this very message has gone."""
    lane, gate = StreamLane("lane", DEVICE), threading.Event()
    lane.submit(lambda: gate.wait(20))
    lane.submit(lambda: None, uses=torch.tensor(5))
    assert "uses 5" in streams.said["lane"]
    gate.set()
    lane.close()


def test_after_a_failure_no_result_is_given_out(streams: Streams) -> None:
    failed: list[str] = []

    def check() -> None:
        if failed:
            raise RemoteFailure("rank 3 has failed")

    lane = StreamLane("lane", DEVICE, check=check)
    ticket = lane.submit(lambda: torch.tensor(7))
    assert ticket._done.wait(20)
    failed.append("rank 3")
    with pytest.raises(RemoteFailure, match="rank 3 has failed"):
        ticket.get()
    failed.clear()
    lane.close()


def test_what_the_work_raises_reaches_the_ticket(streams: Streams) -> None:
    heard: list[str] = []
    lane = StreamLane("lane", DEVICE, on_error=lambda error: heard.append(str(error)))

    def boom() -> None:
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        lane.submit(boom).get()
    assert heard == ["boom"]
    lane.close()


def test_a_device_that_cannot_be_used_is_told_to_everyone_who_waits(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_device: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    heard: list[str] = []
    lane = StreamLane("lane", DEVICE, on_error=lambda error: heard.append(str(error)))
    for end in (lane.submit(lambda: None).get, lane.close):
        with pytest.raises(RuntimeError, match="out of memory"):
            end()
    assert heard == ["CUDA error: out of memory"]
    lane._thread.join(20)


class Clocked:
    """An event that knows when it was, in the seconds of its test; later ones are still to come."""

    now = 0.0

    def __init__(self, **_: bool) -> None:
        self.at: float | None = None

    def record(self, _stream: Stream) -> None:
        self.at = Clocked.now

    def synchronize(self) -> None:
        assert self.query()

    def query(self) -> bool:
        return self.at is not None and self.at <= Clocked.now

    def elapsed_time(self, end: Clocked) -> float:
        assert self.at is not None
        assert end.at is not None
        return (end.at - self.at) * 1e3


def test_spans_are_those_of_the_stream(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Clocked)
    monkeypatch.setattr(Clocked, "now", 100.0)
    spans: list[tuple[str, str, float, float]] = []
    watch = StreamStopwatch(lambda *span: spans.append(span), DEVICE)
    zero = watch._last_s

    def queue(name: str, start: float, end: float) -> None:
        Clocked.now = start
        begun = watch.start()
        Clocked.now = end
        watch.stop("forward", name, begun)

    queue("0F0", 101.0, 102.0)
    queue("0F1", 102.5, 104.0)
    Clocked.now = 103.0  # the device is in the middle of the second
    watch.settle()
    assert [span[1] for span in spans] == ["0F0"]
    Clocked.now = 110.0
    watch.settle()
    watch.settle()
    assert [(lane, name) for lane, name, _, _ in spans] == [("forward", "0F0"), ("forward", "0F1")]
    assert [round(t - zero, 6) for span in spans for t in span[2:]] == [1.0, 2.0, 2.5, 4.0]


def test_a_lane_tells_its_labelled_work_when_it_is_done(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Clocked)
    monkeypatch.setattr(Stream, "wait_event", lambda stream, event: None)
    spans: list[tuple[str, str, float, float]] = []
    lane = StreamLane("forward send", DEVICE, record=lambda *span: spans.append(span))
    lane.submit(lambda: None, label="activations").get()
    lane.submit(lambda: None).get()
    with pytest.raises(ValueError, match="boom"):
        lane.submit(lambda: int("boom"), label="failed").get()
    lane.close()
    assert [span[:2] for span in spans] == [("forward send", "activations")]
