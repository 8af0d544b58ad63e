"""NCCL groups between real processes, over a stand-in for cupy (see tests/support/fake_nccl.py): what the groups ask of
NCCL and what they do when it does not answer. What NCCL itself does is for the GPU tests."""

from __future__ import annotations

import inspect
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_nccl
import pytest
import torch
from farspan.comm.codecs.codec import RawCodec
from farspan.comm.errors import InterfaceError, LinkTimeout, RemoteFailure, WireError
from farspan.comm.groups.nccl import _TYPES as TYPES
from farspan.comm.groups.nccl import NcclGroup, bind, id_from_text, id_to_text, load
from farspan.comm.groups.watchdog import Watchdog
from farspan.comm.lanes.lane import ThreadLane
from farspan.comm.link import Receiver, Sender
from peers import Peer, Told, error_of, play
from torch import Tensor

CPU = torch.device("cpu")
LONG = 120.0  # seconds: longer than the whole test may take
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.uint8]


def numbers(rank: int, size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(rank)) * 10.0**rank


def connect(me: Peer, name: str, watchdog: Watchdog | None = None, timeout_s: float = 20.0) -> NcclGroup:
    watchdog = watchdog or Watchdog(lambda: None, lambda error: None)
    return NcclGroup(me.store, name, me.ranks, me.rank, "lo", timeout_s, CPU, watchdog)


def collectives(me: Peer, version: str) -> dict[str, Any]:
    fake_nccl.install(version)
    group, place = connect(me, "all"), me.ranks.index(me.rank)
    answer: dict[str, Any] = {"size": group.size}
    for n in (1, 40_001):
        x = numbers(me.rank, 3 * n)
        in_order = numbers(1, 3 * n) + numbers(4, 3 * n) + numbers(6, 3 * n)
        group.all_reduce(x, timeout_s=20)
        answer[f"sum {n}"] = torch.equal(x, in_order)
        x = numbers(me.rank, 3 * n)
        group.reduce_scatter(x, timeout_s=20)
        own = x.view(3, n)[place]
        answer[f"scattered {n}"] = torch.equal(own, in_order.view(3, n)[place])
        whole = torch.full((3, n), float("nan"))
        whole[place] = own
        group.all_gather(whole.view(-1), timeout_s=20)
        answer[f"gathered {n}"] = torch.equal(whole.view(-1), in_order)
    for dtype in DTYPES:
        x = torch.full((5,), me.rank).to(dtype)
        group.all_reduce(x, timeout_s=20)
        answer[str(dtype)] = x.tolist() == [11] * 5
    x = torch.full((2, 3), me.rank == 4)
    group.broadcast(x, 4, timeout_s=20)
    answer["told"] = bool(x.all())
    if me.rank == 6:
        group.send(torch.arange(7), 1, timeout_s=20)
    if me.rank == 1:
        x = torch.zeros(7, dtype=torch.int64)
        group.post(x, 6)(20)  # asked for when it is waited for, since nothing is ahead of time
        answer["told"] = x.tolist() == list(range(7))
    group.barrier(timeout_s=20)
    group.close()
    return answer


def collectives_13(me: Peer) -> dict[str, Any]:
    return collectives(me, "13.6.0")


def collectives_14(me: Peer) -> dict[str, Any]:
    return collectives(me, "14.2.0")


@pytest.mark.parametrize("scenario", [collectives_13, collectives_14])
def test_all_that_a_group_can(tmp_path: Path, scenario: Callable[[Peer], Any]) -> None:
    for answer in play(scenario, (1, 4, 6), tmp_path).values():
        assert answer.pop("size") == 3
        assert answer == dict.fromkeys(answer, True)
        assert len(answer) == 14


def link(me: Peer) -> list[bool]:
    """Both directions, each a group of its own, each receive posted when it is asked for."""
    fake_nccl.install()
    groups = {name: connect(me, name) for name in ("0→1", "1→0")}
    lanes = [ThreadLane("send"), ThreadLane("receive")]
    out = Sender(groups[f"{me.rank}→{me.other}"], me.other, RawCodec(), lanes[0], 20.0)
    into = Receiver(groups[f"{me.other}→{me.rank}"], me.other, RawCodec(), lanes[1], 20.0, device=CPU, depth=0)
    shapes = [(400_000,), (3, 5), (7, 1, 2)]
    dtypes = [torch.float32, torch.bfloat16, torch.bfloat16]
    for shape, dtype in zip(shapes, dtypes, strict=True):
        into.expect(1, shape, dtype)
    sent = [
        out.send(torch.full(shape, 10.0 * me.rank + at, dtype=dtype))
        for at, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    right = []
    for at, shape in enumerate(shapes):
        x = into.recv().get()
        right.append(x.shape == shape and bool((x == 10.0 * me.other + at).all()))
    for ticket in sent:
        ticket.get()
    for end in (*lanes, *groups.values()):
        end.close()
    return right


def test_links_over_nccl(tmp_path: Path) -> None:
    assert play(link, (0, 1), tmp_path) == {0: [True] * 3, 1: [True] * 3}


def test_ids_travel_as_text_between_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    unique, signed, unsigned = bytes(range(128, 256)), tuple(range(-128, 0)), tuple(range(128, 256))
    assert id_to_text(unique) == id_to_text(signed) == id_to_text(unsigned)
    for version, machine, expected in (
        ("13.6.0", "x86_64", signed), ("13.6.0", "aarch64", unsigned), ("14.2.0", "x86_64", unique),
    ):  # fmt: skip
        cupy = ModuleType("cupy")
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        cupy.__version__ = version  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        assert id_from_text(id_to_text(unique)) == expected


def test_the_stand_in_has_the_calls_of_cupy() -> None:
    """Where cupy and an NCCL are installed: no GPU is needed to look."""
    nccl = pytest.importorskip("cupy.cuda.nccl", exc_type=ImportError)
    if not nccl.available:
        pytest.skip("cupy finds no NCCL")
    for name in (
        "send", "recv", "allReduce", "bcast", "allGather", "check_async_error", "abort", "destroy",
    ):  # fmt: skip
        told = getattr(nccl.NcclCommunicator, name).__doc__.partition("\n")[0]
        real = [word.split()[-1] for word in told.partition("(")[2].partition(")")[0].split(",")]
        assert real == list(inspect.signature(getattr(fake_nccl.NcclCommunicator, name)).parameters), name
    assert callable(nccl.groupStart)
    assert callable(nccl.groupEnd)
    assert id_from_text(id_to_text(nccl.get_unique_id())) is not None
    assert nccl.NcclError(6).status == 6
    names = {"INT8": torch.int8, "UINT8": torch.uint8, "INT32": torch.int32, "INT64": torch.int64}
    names |= {"FLOAT16": torch.float16, "FLOAT32": torch.float32, "FLOAT64": torch.float64, "BFLOAT16": torch.bfloat16}
    assert {dtype: getattr(nccl, f"NCCL_{name}") for name, dtype in names.items()} == TYPES
    assert nccl.NCCL_SUM == 0


OPERATIONS = ("receiving x", "summing x", "scattering x", "gathering x", "spreading x", "barrier")


def operations(group: NcclGroup, timeout_s: float) -> dict[str, Callable[[], object]]:
    (other,) = set(group.members) - {group.rank}
    return {
        "receiving x": lambda: group.recv(torch.zeros(4), other, timeout_s=timeout_s, operation="receiving x"),
        "summing x": lambda: group.all_reduce(torch.zeros(4), timeout_s=timeout_s, operation="summing x"),
        "scattering x": lambda: group.reduce_scatter(torch.zeros(4), timeout_s=timeout_s, operation="scattering x"),
        "gathering x": lambda: group.all_gather(torch.zeros(4), timeout_s=timeout_s, operation="gathering x"),
        "spreading x": lambda: group.broadcast(torch.zeros(4), other, timeout_s=timeout_s, operation="spreading x"),
        "barrier": lambda: group.barrier(timeout_s=timeout_s),
    }


def wait_in_vain(me: Peer, timeout_s: float, meanwhile: Callable[[], object]) -> dict[str, tuple[Told, Told | None]]:
    """As a stream would: the call returns at once, and what it queued never ends. What the watchdog tells of each
    operation, in a group of its own, and what the group says next."""
    fake_nccl.install(wait=False)
    told: dict[str, list[WireError]] = {name: [] for name in OPERATIONS}
    groups = {}
    for name in OPERATIONS:
        groups[name] = connect(me, name, Watchdog(lambda: None, told[name].append, period_s=0.02), timeout_s=LONG)
    if me.rank == 7:
        me.hear("waiting")
        meanwhile()
        me.hear("done")
        return {}
    for name in OPERATIONS[:-1]:
        operations(groups[name], timeout_s)[name]()
    at_the_barrier = ThreadLane("barrier").submit(operations(groups["barrier"], timeout_s)["barrier"])
    me.say("waiting")
    assert error_of(at_the_barrier.get) is not None  # the one that waits comes out
    deadline = time.monotonic() + 30
    while not all(group._comm.aborted for group in groups.values()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    then = {name: error_of(operations(groups[name], LONG)["receiving x"]) for name in OPERATIONS}
    me.say("done")

    def again(error: WireError) -> None:
        raise error

    return {name: (error_of(lambda name=name: again(told[name][0])), then[name]) for name in OPERATIONS}


def lose_a_peer(me: Peer) -> dict[str, Any]:
    return wait_in_vain(me, LONG, meanwhile=lambda: os.kill(os.getpid(), signal.SIGKILL))


def be_silent(me: Peer) -> dict[str, Any]:
    return wait_in_vain(me, 0.3, meanwhile=lambda: None)


@pytest.mark.parametrize(
    ("scenario", "dying", "kind", "words"),
    [(lose_a_peer, [7], "PeerLost", "lost"), (be_silent, [], "LinkTimeout", "timed out waiting for")],
)
def test_what_never_ends_is_told_and_aborted(
    tmp_path: Path, scenario: Callable[[Peer], Any], dying: list[int], kind: str, words: str
) -> None:
    told = play(scenario, (3, 7), tmp_path, dying=dying)[3]
    for operation in OPERATIONS:
        error, next_error = told[operation]
        assert error.kind == kind, error
        assert error.line.startswith(f"rank 3: {words} rank 7 (interface lo, {operation} in group {operation}, after ")
        assert "\n" not in error.line
        assert next_error is not None  # the group is dead
        assert next_error.line == error.line


STATUSES = {
    3: ("PeerLost", " s): NCCL_ERROR_INTERNAL_ERROR: in words: see rank 7's last line"),
    5: ("InterfaceError", "NCCL gives up (interface lo, receiving x in group 5): NCCL_ERROR_INVALID_USAGE: in words"),
    7: ("InterfaceError", "receiving x in group 7): status 7, for which this cupy has no words; NCCL_DEBUG"),
}


def lose_a_peer_in_other_words(me: Peer) -> dict[int, Told | None]:
    fake_nccl.install(wait=False)
    groups = {status: connect(me, str(status), timeout_s=LONG) for status in STATUSES}
    if me.rank == 7:
        me.hear("waiting")
        os.kill(os.getpid(), signal.SIGKILL)
    for status, group in groups.items():
        group._comm.lost_status = status
        group.recv(torch.zeros(4), 7, timeout_s=LONG, operation="receiving x")
    me.say("waiting")
    deadline = time.monotonic() + 30
    while not all(group._comm.aborted for group in groups.values()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return {
        status: error_of(lambda group=group: group.recv(torch.zeros(4), 7, timeout_s=LONG))
        for status, group in groups.items()
    }


def test_every_status_of_nccl_is_told(tmp_path: Path) -> None:
    errors = play(lose_a_peer_in_other_words, (3, 7), tmp_path, dying=[7])[3]
    for status, (kind, words) in STATUSES.items():
        assert errors[status].kind == kind
        assert errors[status].line.startswith("rank 3: ")
        assert words in errors[status].line


def be_late(me: Peer) -> tuple[bool, list[str]]:
    """Two receives, each of which comes in time, though both together take longer than the deadline of one."""
    fake_nccl.install(wait=False)
    told: list[str] = []
    group = connect(me, "7→3", Watchdog(lambda: None, lambda error: told.append(str(error)), period_s=0.02))
    if me.rank == 7:
        for _ in range(3):
            time.sleep(0.4)
            group.send(torch.ones(1), 3, timeout_s=LONG)
        me.hear("done")
        return True, told
    got = [torch.zeros(1) for _ in range(3)]
    for x in got:
        group.recv(x, 7, timeout_s=0.9)
    deadline = time.monotonic() + 30
    while not all(map(bool, got)) and not told:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    me.say("done")
    return all(map(bool, got)), told


def test_a_deadline_begins_when_nothing_is_before_it(tmp_path: Path) -> None:
    assert play(be_late, (3, 7), tmp_path)[3] == (True, [])


def come_never(me: Peer) -> Told | None:
    fake_nccl.install()
    return error_of(lambda: connect(me, "x", timeout_s=0.3)) if me.rank == 3 else None


def test_a_peer_that_never_comes_is_a_timeout_of_connecting(tmp_path: Path) -> None:
    error = play(come_never, (3, 7), tmp_path)[3]
    assert error.kind == "LinkTimeout"
    assert error.line.startswith("rank 3: timed out waiting for rank 7 (interface lo, connecting in group x, after 0.")


def hear_of_a_failure(me: Peer) -> Told | None:
    fake_nccl.install()

    def check() -> None:
        raise RemoteFailure("rank 9 has failed")

    watchdog = Watchdog(check, lambda error: None)
    return error_of(lambda: connect(me, "x", watchdog, timeout_s=LONG)) if me.rank == 3 else None


def test_news_of_a_failure_ends_connecting(tmp_path: Path) -> None:
    assert play(hear_of_a_failure, (3, 7), tmp_path)[3].line == "rank 9 has failed"


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(InterfaceError, match="pip install cupy-cuda13x"):
        load()
    cupy, cuda, nccl = ModuleType("cupy"), ModuleType("cupy.cuda"), ModuleType("cupy.cuda.nccl")
    cupy.__version__, cupy.cuda, cuda.nccl, nccl.available = "14.2.0", cuda, nccl, False  # type: ignore[attr-defined]
    for name, module in (("cupy", cupy), ("cupy.cuda", cuda), ("cupy.cuda.nccl", nccl)):
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(InterfaceError, match=r"cupy 14.2.0 finds no NCCL library: pip install nvidia-nccl-cu13"):
        load()


def test_the_interface_is_named_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "CUDA_DEVICE_MAX_CONNECTIONS"):
        monkeypatch.setenv(name, "")  # or what bind sets would outlive the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_IB_DISABLE", "0")
    bind("eth1")
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=eth1"
    assert os.environ["NCCL_IB_DISABLE"] == "0"  # the user's own word


class Group:
    """A group whose trouble the test makes."""

    def __init__(self, name: str, order: list[str], trouble: WireError | None = None) -> None:
        self.name, self._order, self._trouble = name, order, trouble

    def trouble(self) -> WireError | None:
        return self._trouble

    def abort(self, error: WireError) -> None:
        self._order.append(f"abort {self.name}: {error}")


def eventually(order: list[str], count: int) -> list[str]:
    deadline = time.monotonic() + 20
    while len(order) < count:
        assert time.monotonic() < deadline, order
        time.sleep(0.005)
    return order


def test_the_failure_is_told_before_anything_is_aborted() -> None:
    order: list[str] = []
    lost = LinkTimeout(rank=0, peer=1, interface="lo", operation="x", seconds=1.0)
    watchdog = Watchdog(lambda: None, lambda error: order.append(f"told {error}"), period_s=0.01)
    for group in (Group("a", order), Group("b", order, lost)):
        watchdog.watch(group)
    assert eventually(order, 3)[0] == f"told {lost}"
    assert sorted(order[1:]) == [f"abort a: {lost}", f"abort b: {lost}"]
    watchdog.close()


def test_news_abort_without_being_told_again() -> None:
    order: list[str] = []

    def check() -> None:
        raise RemoteFailure("rank 9 has failed")

    watchdog = Watchdog(check, lambda error: order.append("told"), period_s=0.01)
    watchdog.watch(Group("a", order))
    assert eventually(order, 1) == ["abort a: rank 9 has failed"]
    watchdog.close()


def test_a_broken_device_is_trouble_too() -> None:
    class Broken(Group):
        def trouble(self) -> WireError | None:
            raise RuntimeError("CUDA error: an illegal memory access\nadvice")

    order: list[str] = []
    watchdog = Watchdog(lambda: None, lambda error: order.append(str(error)), period_s=0.01)
    watchdog.watch(Broken("a", order))
    assert eventually(order, 2)[0] == "the CUDA device has failed: CUDA error: an illegal memory access"
    watchdog.close()


def test_whatever_the_watchdog_stumbles_over_is_told_and_aborts() -> None:
    class Strange(Group):
        def trouble(self) -> WireError | None:
            raise KeyError(7)

    order: list[str] = []
    watchdog = Watchdog(lambda: None, lambda error: order.append(str(error)), period_s=0.01)
    watchdog.watch(Strange("a", order))
    assert eventually(order, 2) == ["NCCL: KeyError: 7", "abort a: NCCL: KeyError: 7"]
    watchdog.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failure_that_cannot_be_told_aborts_all_the_same() -> None:
    def refuse(error: WireError) -> None:
        raise OSError("nobody listens")

    order: list[str] = []
    lost = LinkTimeout(rank=0, peer=1, interface="lo", operation="x", seconds=1.0)
    watchdog = Watchdog(lambda: None, refuse, period_s=0.01)
    watchdog.watch(Group("a", order, lost))
    assert eventually(order, 1) == [f"abort a: {lost}"]
    watchdog.close()


def test_a_group_that_was_forgotten_is_left_alone() -> None:
    looks: list[str] = []

    class Counting(Group):
        def trouble(self) -> WireError | None:
            looks.append(self.name)
            return None

    watchdog = Watchdog(lambda: None, lambda error: None, period_s=0.01)
    for group in (Counting("a", looks), Counting("b", looks)):
        watchdog.watch(group)
        if group.name == "a":
            watchdog.forget(group)
    seen = looks.count("a")
    eventually(looks, seen + 3)
    assert looks.count("a") == seen
    watchdog.close()


def refuse(me: Peer) -> Told | None:
    """cupy's own refusal, of two ranks on one GPU say."""
    fake_nccl.install()

    class Refusing(fake_nccl.NcclCommunicator):
        def __init__(self, *_: Any) -> None:  # noqa: ANN401
            raise fake_nccl.NcclError(5)

    fake_nccl.NcclCommunicator = Refusing  # type: ignore[misc]
    return error_of(lambda: connect(me, "x"))


def test_what_nccl_refuses_is_one_line(tmp_path: Path) -> None:
    error = play(refuse, (3, 7), tmp_path)[3]
    assert error.kind == "InterfaceError"
    assert error.line == (
        "rank 3: NCCL gives up (interface lo, connecting in group x): NCCL_ERROR_INVALID_USAGE: in words; "
        "NCCL_DEBUG=WARN says more"
    )
