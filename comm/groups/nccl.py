"""NCCL groups, through cupy: one communicator a group, its id handed round through the store.

NCCL never gives up by itself, so `comm/groups/watchdog.py` looks after every call. cupy's communicators block while
they connect (its `NcclConfig` knows no other way), so that happens in a thread that can be abandoned.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Store

from ..errors import InterfaceError, LinkTimeout, PeerLost, WireError
from ..lanes.lane import ThreadLane
from ..lanes.staging import placed
from .group import add_in_order, only_other
from .watchdog import Watchdog

# nccl.h: ncclDataType_t and ncclRedOp_t. What is only moved travels as bytes.
_BYTES, _SUM = 1, 0
_TYPES = {
    torch.int8: 0, torch.uint8: 1, torch.int32: 2, torch.int64: 4,
    torch.float16: 6, torch.float32: 7, torch.float64: 8, torch.bfloat16: 9,
}  # fmt: skip
_GONE = (2, 6)
"""ncclResult_t: a system call failed (a connection was reset), the remote process exited."""
_INTERNAL = 3
"""An internal error: between ranks that were connected, most often a lost one all the same (NVIDIA/nccl#795)."""


def load() -> Any:  # noqa: ANN401 - a module that is imported where it is used
    """cupy's `nccl` module. Raises `InterfaceError`, which says what is missing."""
    try:
        import cupy
        from cupy.cuda import nccl
    except ImportError as error:
        reason = str(error).strip().partition("\n")[0]
        raise InterfaceError(
            f"NCCL needs cupy, for the CUDA version that torch has: pip install cupy-cuda13x ({reason})"
        ) from error
    if not nccl.available:
        raise InterfaceError(f"cupy {cupy.__version__} finds no NCCL library: pip install nvidia-nccl-cu13")
    return nccl


def bind(interface: str) -> None:
    """Let NCCL's sockets use `interface` alone. NCCL and CUDA read the environment once a process, so this comes
    before the first use of either."""
    os.environ["NCCL_SOCKET_IFNAME"] = f"={interface}"  # without the sign it would be a prefix
    # A named interface means sockets over it; who wants InfiniBand beside it says NCCL_IB_DISABLE=0.
    os.environ.setdefault("NCCL_IB_DISABLE", "1")
    # Streams that share a hardware queue wait for each other, and a transfer may wait for what is queued behind it.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def id_to_text(unique: bytes | tuple[int, ...]) -> str:
    """An NCCL id as cupy gives it: bytes since 14, before that a tuple of C's `char`."""
    return (unique if isinstance(unique, bytes) else bytes(value & 0xFF for value in unique)).hex()


def id_from_text(text: str) -> bytes | tuple[int, ...]:
    """An NCCL id as this cupy takes it."""
    import cupy

    unique = bytes.fromhex(text)
    if int(cupy.__version__.partition(".")[0]) >= 14:
        return unique
    signed = platform.machine() != "aarch64"  # C's `char` has no sign there
    return tuple(value - 256 if signed and value > 127 else value for value in unique)


@dataclass
class _Call:
    """What was asked of NCCL and may not be done. `done` is set once it is queued, `since` once nothing of this group
    is before it. It holds the tensors that the device still uses."""

    operation: str
    peer: int | None
    timeout_s: float
    tensors: Sequence[Tensor]
    done: Any = None
    since: float = 0.0

    def finished(self) -> bool:
        return self.done is not None and self.done.query()


class NcclGroup:
    """A `Group` over NCCL, for tensors on `device`; others are staged there. Calls queue work on the current stream.

    Creating one blocks until all members have come, at most `timeout_s` seconds. A group of two connects its two
    directions at once: NCCL would do it at the first message, and allocate, which must not happen while a transfer that
    waits for a peer occupies the device.
    """

    # A posted receive occupies the device until its message comes, so each waits for its turn in the plan: then what is
    # on the device never depends on something that this rank has yet to queue behind it.
    ahead = 0

    def __init__(
        self,
        store: Store,
        name: str,
        members: tuple[int, ...],
        rank: int,
        interface: str,
        timeout_s: float,
        device: torch.device,
        watchdog: Watchdog,
    ) -> None:
        self.name, self.members, self.rank, self.interface = name, members, rank, interface
        self._other = only_other(members, rank)
        self._device, self._timeout_s, self._watchdog = device, timeout_s, watchdog
        self._nccl = load()
        # cupy has no words for every status (13.6 and 14.2: for 0 to 6), and raises a KeyError for the others.
        self._failures = (self._nccl.NcclError, KeyError)
        self._place = members.index(rank)
        self._error: WireError | None = None
        self._calls: deque[_Call] = deque()
        self._guard = threading.Lock()  # of `_calls`
        self._busy = threading.Lock()  # held inside NCCL: nobody aborts a communicator under a call
        self._comm = self._in_time("connecting", lambda in_time: self._connect(store, in_time))
        watchdog.watch(self)

    @property
    def size(self) -> int:
        return len(self.members)

    def send(self, x: Tensor, to: int, *, timeout_s: float, operation: str = "send") -> None:
        with placed(x, self._device, write=False) as y:
            place = self.members.index(to)
            self._run(lambda stream: self._send(y, place, stream), [y], to, timeout_s, operation)

    def recv(self, out: Tensor, source: int, *, timeout_s: float, operation: str = "receive") -> None:
        with placed(out, self._device, read=False) as y:
            place = self.members.index(source)
            self._run(lambda stream: self._recv(y, place, stream), [y], source, timeout_s, operation)

    def post(self, out: Tensor, source: int, *, operation: str = "receive") -> Callable[[float], None]:
        return lambda timeout_s: self.recv(out, source, timeout_s=timeout_s, operation=operation)

    def all_reduce(self, x: Tensor, *, timeout_s: float, operation: str = "all-reduce") -> None:
        with placed(x, self._device) as y:

            def enqueue(stream: int) -> None:
                at = _address(y)
                self._comm.allReduce(at, at, y.numel(), _TYPES[y.dtype], _SUM, stream)

            self._run(enqueue, [y], self._other, timeout_s, operation)

    def reduce_scatter(self, x: Tensor, *, timeout_s: float, operation: str = "reduce-scatter") -> None:
        # NCCL's own adds in an order that depends on the place.
        with placed(x, self._device) as y:
            places = y.view(self.size, -1)
            arriving = torch.empty_like(places)
            self._run(
                lambda stream: self._exchange(places, arriving, stream),
                [places, arriving], self._other, timeout_s, operation,
            )  # fmt: skip
            add_in_order(places, arriving, self._place)

    def all_gather(self, x: Tensor, *, timeout_s: float, operation: str = "all-gather") -> None:
        with placed(x, self._device) as y:

            def enqueue(stream: int) -> None:
                at, part = _address(y), y.nbytes // self.size
                self._comm.allGather(at + self._place * part, at, part, _BYTES, stream)

            self._run(enqueue, [y], self._other, timeout_s, operation)

    def broadcast(self, x: Tensor, source: int, *, timeout_s: float, operation: str = "broadcast") -> None:
        mine = source == self.rank
        with placed(x, self._device, read=mine, write=not mine) as y:
            root = self.members.index(source)
            self._run(
                lambda stream: self._comm.bcast(_address(y), y.nbytes, _BYTES, root, stream),
                [y], self._other, timeout_s, operation,
            )  # fmt: skip

    def barrier(self, *, timeout_s: float, operation: str = "barrier") -> None:
        """Unlike the others, this one returns when all have come."""
        x = torch.zeros(1, device=self._device)

        def enqueue(stream: int) -> None:
            self._comm.allReduce(_address(x), _address(x), 1, _TYPES[x.dtype], _SUM, stream)

        call = self._run(enqueue, [x], self._other, timeout_s, operation)
        while not call.finished():
            self._alive()
            time.sleep(0.001)
        self._alive()

    def close(self) -> None:
        """When the lanes are: nothing is under way any more."""
        self._watchdog.forget(self)
        self._in_time("closing", lambda in_time: self._comm.destroy())

    # ---- for the watchdog

    def trouble(self) -> WireError | None:
        """What is wrong, as far as it can be seen from outside: a broken connection, or a call past its deadline. A
        communicator without a call is not asked: at the end of a run, a peer may have closed its own already."""
        now = time.monotonic()
        call = self._first_call()
        if call is None:
            return None
        call.since = call.since or now
        try:
            self._comm.check_async_error()
        except self._failures as error:
            return self._explain(error, call)
        if now - call.since <= call.timeout_s:
            return None
        return LinkTimeout(
            rank=self.rank,
            peer=call.peer,
            interface=self.interface,
            operation=f"{call.operation} in group {self.name}",
            seconds=now - call.since,
        )

    def abort(self, error: WireError) -> None:
        """Let the device go on without the peers; every further call raises `error`. NCCL may block in here."""
        self._error = self._error or error
        if self._busy.acquire(timeout=1.0):
            try:
                self._comm.abort()
            finally:
                self._busy.release()

    # ---- the rest is this group's own

    def _alive(self) -> None:
        if self._error is not None:
            raise self._error

    def _first_call(self) -> _Call | None:
        """The first that is not done; lets go of those that are, and of their tensors."""
        with self._guard:
            while self._calls and self._calls[0].finished():
                self._calls.popleft()
            return self._calls[0] if self._calls else None

    def _run(
        self,
        enqueue: Callable[[int], None],
        tensors: Sequence[Tensor],
        peer: int | None,
        timeout_s: float,
        operation: str,
    ) -> _Call:
        call = _Call(operation, peer, timeout_s, tensors)
        self._first_call()
        with self._busy:
            self._alive()
            with self._guard:
                self._calls.append(call)
            torch.cuda.set_device(self._device)  # each thread has its own
            stream = torch.cuda.current_stream(self._device)
            try:
                enqueue(stream.cuda_stream)
            except self._failures as error:
                self._error = self._explain(error, call)
                raise self._error from error
            done = torch.cuda.Event()
            done.record(stream)
            call.done = done
        return call

    def _send(self, x: Tensor, place: int, stream: int) -> None:
        self._comm.send(_address(x), x.nbytes, _BYTES, place, stream)

    def _recv(self, x: Tensor, place: int, stream: int) -> None:
        self._comm.recv(_address(x), x.nbytes, _BYTES, place, stream)

    def _exchange(self, outgoing: Tensor, arriving: Tensor, stream: int) -> None:
        """Send `outgoing[m]` to member m and receive `arriving[m]` from it, with all others at once."""
        self._nccl.groupStart()
        for m in range(self.size):
            if m != self._place:
                self._send(outgoing[m], m, stream)
                self._recv(arriving[m], m, stream)
        self._nccl.groupEnd()

    def _connect(self, store: Store, in_time: Callable[[], None]) -> Any:  # noqa: ANN401 - cupy has no types
        key = f"nccl/{self.name}"
        if self._place == 0:
            store.set(key, id_to_text(self._nccl.get_unique_id()))
        while not store.check([key]):
            in_time()
            time.sleep(0.02)
        torch.cuda.set_device(self._device)
        self._comm = self._nccl.NcclCommunicator(self.size, id_from_text(store.get(key).decode()), self._place)
        if self.size == 2:
            probe = torch.zeros(2, 2, dtype=torch.uint8, device=self._device)
            stream = torch.cuda.current_stream(self._device)
            self._exchange(probe[0], probe[1], stream.cuda_stream)
            done = torch.cuda.Event()
            done.record(stream)
            while not done.query():
                in_time()
                time.sleep(0.001)
        return self._comm

    def _in_time(self, operation: str, work: Callable[[Callable[[], None]], Any]) -> Any:  # noqa: ANN401
        """`work` in a thread that is left behind when the time is up, or when another rank has failed. What it is
        given raises then."""
        call = _Call(operation, self._other, self._timeout_s, (), since=time.monotonic())

        def in_time() -> None:
            self._watchdog.check()
            if time.monotonic() > call.since + self._timeout_s:
                raise LinkTimeout(
                    rank=self.rank,
                    peer=self._other,
                    interface=self.interface,
                    operation=f"{operation} in group {self.name}",
                    seconds=time.monotonic() - call.since,
                )

        lane = ThreadLane(f"{operation} {self.name}", check=in_time)
        try:
            value = lane.submit(lambda: work(in_time)).get()
        except self._failures as error:
            raise self._explain(error, call, connected=False) from error
        lane.close()
        return value

    def _explain(self, error: Any, call: _Call, *, connected: bool = True) -> WireError:  # noqa: ANN401 - one of `_failures`
        seconds = time.monotonic() - (call.since or time.monotonic())
        operation = f"{call.operation} in group {self.name}"
        status, detail = getattr(error, "status", None), str(error)
        if status is None:
            detail = f"status {error}, for which this cupy has no words"
        if status in _GONE or (connected and status == _INTERNAL):
            return PeerLost(
                rank=self.rank, peer=call.peer, interface=self.interface, operation=operation, seconds=seconds,
                detail=detail,
            )  # fmt: skip
        return InterfaceError(
            f"rank {self.rank}: NCCL gives up (interface {self.interface}, {operation}): {detail}; "
            "NCCL_DEBUG=WARN says more"
        )


def _address(x: Tensor) -> int:
    if not x.is_contiguous():
        raise ValueError(f"NCCL cannot carry a tensor of strides {x.stride()} as it lies")
    return x.data_ptr()
