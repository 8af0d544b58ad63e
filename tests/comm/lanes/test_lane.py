"""A lane keeps its order, tells its failures, and never lets a wait outlast the news of one."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest
from farspan.comm.errors import RemoteFailure
from farspan.comm.lanes.lane import ThreadLane


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Opened at the end at the latest, so that no thread is left behind it."""
    made = threading.Event()
    yield made
    made.set()


def boom() -> None:
    raise ValueError("boom")


def test_work_runs_in_the_order_of_submission_in_one_other_thread() -> None:
    lane = ThreadLane("lane")
    order: list[int] = []
    threads: set[str] = set()

    def work(at: int) -> int:
        order.append(at)
        threads.add(threading.current_thread().name)
        return at * at

    tickets = [lane.submit(lambda at=at: work(at)) for at in range(50)]
    assert [ticket.get() for ticket in tickets] == [at * at for at in range(50)]
    assert order == list(range(50))
    assert threads == {"lane"}
    lane.close()


def test_submitting_does_not_wait(gate: threading.Event) -> None:
    lane = ThreadLane("lane")
    ticket = lane.submit(lambda: gate.wait(20))
    gate.set()  # not reached if `submit` ran the work
    assert ticket.get() is True
    lane.close()


def test_a_ticket_gives_its_result_again() -> None:
    lane = ThreadLane("lane")
    ticket = lane.submit(lambda: [1])
    assert ticket.get() is ticket.get()
    lane.close()


def test_an_error_reaches_the_ticket_and_the_listener_and_the_lane_goes_on() -> None:
    heard: list[BaseException] = []
    lane = ThreadLane("lane", on_error=heard.append)
    failing, next_one = lane.submit(boom), lane.submit(lambda: "still here")
    assert next_one.get() == "still here"
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^boom$"):
            failing.get()
    assert [str(error) for error in heard] == ["boom"]
    lane.close()


def test_an_error_is_told_without_anyone_asking_for_the_result() -> None:
    heard = threading.Event()
    lane = ThreadLane("lane", on_error=lambda error: heard.set())
    lane.submit(boom)
    assert heard.wait(20)
    lane.close()


def test_news_of_a_failure_ends_a_wait(gate: threading.Event) -> None:
    known = threading.Event()

    def check() -> None:
        if known.is_set():
            raise RemoteFailure("rank 3 has failed")

    lane = ThreadLane("lane", check=check)
    stuck = lane.submit(lambda: gate.wait(60))
    threading.Timer(0.1, known.set).start()
    with pytest.raises(RemoteFailure, match=r"^rank 3 has failed$"):
        stuck.get()
    assert not gate.is_set()
    known.clear()
    gate.set()
    assert stuck.get() is True  # the work itself was not harmed
    lane.close()


def test_news_of_a_failure_do_not_take_back_a_result() -> None:
    def check() -> None:
        raise RemoteFailure("rank 3 has failed")

    lane = ThreadLane("lane", check=check)
    done = threading.Event()
    ticket = lane.submit(lambda: "in time")
    lane.submit(done.set)
    assert done.wait(20)
    assert ticket.get() == "in time"


class Kept:
    """Something that a weak reference can watch."""


def test_a_lane_that_waits_holds_neither_its_last_work_nor_the_result() -> None:
    lane = ThreadLane("lane")
    x = Kept()
    used, made = weakref.ref(x), weakref.ref(lane.submit(lambda x=x: Kept()).get())
    del x
    deadline = time.monotonic() + 20
    while used() is not None or made() is not None:  # the thread may still be letting go
        assert time.monotonic() < deadline, (used(), made())
        time.sleep(0.005)
    lane.close()


class Lost(ThreadLane):
    """A lane whose thread cannot get to where it works."""

    def _place(self) -> AbstractContextManager[object]:
        raise RuntimeError("no such device")


def test_a_lane_without_a_place_to_work_tells_everyone_who_waits() -> None:
    heard: list[str] = []
    lane = Lost("lost", on_error=lambda error: heard.append(str(error)))
    ran: list[str] = []
    for ticket in [lane.submit(lambda: ran.append("ran")) for _ in range(3)]:
        with pytest.raises(RuntimeError, match=r"^no such device$"):
            ticket.get()
    with pytest.raises(RuntimeError, match=r"^no such device$"):
        lane.close()
    assert (heard, ran) == (["no such device"], [])
    lane._thread.join(20)
    assert not lane._thread.is_alive()


def test_closing_finishes_what_was_submitted() -> None:
    lane = ThreadLane("closing")
    ran: list[int] = []
    for at in range(20):
        lane.submit(lambda at=at: ran.append(at))
    lane.close()
    assert ran == list(range(20))
    assert not any(thread.name == "closing" for thread in threading.enumerate())


def test_closing_does_not_wait_for_a_wire_once_another_rank_failed(gate: threading.Event) -> None:
    def check() -> None:
        raise RemoteFailure("rank 3 has failed")

    lane = ThreadLane("lane", check=check)
    lane.submit(lambda: gate.wait(60))
    with pytest.raises(RemoteFailure):
        lane.close()
    assert not gate.is_set()


def test_labelled_work_is_recorded_when_it_succeeds() -> None:
    spans: list[tuple[str, str, float, float]] = []
    lane = ThreadLane("lane", record=lambda *span: spans.append(span))
    lane.submit(lambda: None, label="one")
    lane.submit(lambda: None)
    lane.submit(boom, label="failed")
    lane.submit(lambda: None, label="two")
    lane.close()
    assert [span[:2] for span in spans] == [("lane", "one"), ("lane", "two")]
    (_, _, start, end), (_, _, next_start, next_end) = spans
    assert start <= end <= next_start <= next_end
