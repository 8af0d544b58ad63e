"""A stand-in for cupy's NCCL and for what of CUDA the groups use, so that their protocol can be tried without a GPU.

The same calls as cupy 13 and 14, real sockets between real processes, tensors in host memory. As with the real one, a
transfer whose peer is gone or silent never ends by itself: it goes on until the communicator is aborted.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    0: torch.int8, 1: torch.uint8, 2: torch.int32, 4: torch.int64,
    6: torch.float16, 7: torch.float32, 8: torch.float64, 9: torch.bfloat16,
}  # fmt: skip
_WORDS = {2: "SYSTEM_ERROR", 3: "INTERNAL_ERROR", 5: "INVALID_USAGE", 6: "REMOTE_ERROR"}
"""As in cupy, another status ends in a `KeyError`."""
blocking = True
"""Whether a call returns when its transfer is done; else at once, as with real streams."""
as_tuple = False
_listeners: dict[bytes, socket.socket] = {}
_here = threading.local()


class NcclError(RuntimeError):
    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"NCCL_ERROR_{_WORDS[status]}: in words")


class Stream:
    """A thread's current stream; it remembers the last transfer that was queued there."""

    def __init__(self) -> None:
        self.cuda_stream = threading.get_ident()
        self.last: threading.Thread | None = None


class Event:
    def __init__(self, **_: Any) -> None:  # noqa: ANN401
        self._after: threading.Thread | None = None

    def record(self, stream: Stream) -> None:
        self._after = stream.last

    def query(self) -> bool:
        return self._after is None or not self._after.is_alive()


def current_stream(_device: object = None) -> Stream:
    if not hasattr(_here, "stream"):
        _here.stream = Stream()
    return _here.stream


def get_unique_id() -> bytes | tuple[int, ...]:
    listener = socket.create_server(("127.0.0.1", 0))
    unique = struct.pack("!H", listener.getsockname()[1]) + os.urandom(62) + b"\xff" * 64
    _listeners[unique] = listener
    return tuple(struct.unpack("128b", unique)) if as_tuple else unique


def groupStart() -> None:
    _here.group = []


def groupEnd() -> None:
    calls, _here.group = _here.group, None
    if calls:
        calls[0][0]._point_to_point(calls)


class NcclCommunicator:
    lost_status = 6
    """What it answers once its peer is gone."""

    def __init__(self, ndev: int, commId: Any, rank: int, config: Any = None) -> None:  # noqa: ANN401
        if not isinstance(commId, tuple if as_tuple else bytes):
            raise TypeError(f"commId is a {type(commId).__name__}")
        unique = struct.pack("128b", *commId) if as_tuple else commId
        self._size, self._rank, self.lost, self.aborted = ndev, rank, False, False
        self._last: threading.Thread | None = None
        self._peers: dict[int, socket.socket] = {}
        listener = _listeners.pop(unique) if rank == 0 else socket.create_server(("127.0.0.1", 0))
        ports = {}
        if rank == 0:
            for _ in range(ndev - 1):
                peer, _ = listener.accept()
                other, port = struct.unpack("!HH", _exactly(peer, 4))
                self._peers[other], ports[other] = peer, port
            for peer in self._peers.values():
                peer.sendall(struct.pack(f"!{ndev - 1}H", *(ports[r] for r in range(1, ndev))))
        else:
            root = socket.create_connection(("127.0.0.1", struct.unpack_from("!H", unique)[0]))
            root.sendall(struct.pack("!HH", rank, listener.getsockname()[1]))
            self._peers[0] = root
            told = struct.unpack(f"!{ndev - 1}H", _exactly(root, 2 * (ndev - 1)))
            for other in range(1, rank):
                self._peers[other] = socket.create_connection(("127.0.0.1", told[other - 1]))
                self._peers[other].sendall(struct.pack("!H", rank))
            for _ in range(rank + 1, ndev):
                peer, _ = listener.accept()
                self._peers[struct.unpack("!H", _exactly(peer, 2))[0]] = peer
        listener.close()

    def send(self, sendbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._queue_or_run((self, "send", sendbuf, count * _DTYPES[datatype].itemsize, peer, stream))

    def recv(self, recvbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._queue_or_run((self, "recv", recvbuf, count * _DTYPES[datatype].itemsize, peer, stream))

    def allReduce(self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, stream: int) -> None:
        if op != 0:
            raise NcclError(5)
        dtype = _DTYPES[datatype]
        size = count * dtype.itemsize

        def work() -> None:
            mine = _read(sendbuf, size)
            all_ranks = self._swap(dict.fromkeys(self._peers, mine), dict.fromkeys(self._peers, size))
            all_ranks[self._rank] = mine
            total = _tensor(all_ranks[0], dtype)
            for rank in range(1, self._size):
                total = total + _tensor(all_ranks[rank], dtype)
            ctypes.memmove(recvbuf, total.data_ptr(), size)

        self._enqueue(work, stream)

    def bcast(self, buff: int, count: int, datatype: int, root: int, stream: int) -> None:
        size = count * _DTYPES[datatype].itemsize

        def work() -> None:
            if self._rank == root:
                self._swap(dict.fromkeys(self._peers, _read(buff, size)), {})
            else:
                ctypes.memmove(buff, self._swap({}, {root: size})[root], size)

        self._enqueue(work, stream)

    def allGather(self, sendbuf: int, recvbuf: int, count: int, datatype: int, stream: int) -> None:
        size = count * _DTYPES[datatype].itemsize

        def work() -> None:
            mine = _read(sendbuf, size)
            got = self._swap(dict.fromkeys(self._peers, mine), dict.fromkeys(self._peers, size))
            for rank, data in {**got, self._rank: mine}.items():
                ctypes.memmove(recvbuf + rank * size, data, size)

        self._enqueue(work, stream)

    def check_async_error(self) -> None:
        if self.lost:
            raise NcclError(self.lost_status)

    def abort(self) -> None:
        self.aborted = True
        self.destroy()

    def destroy(self) -> None:
        for peer in self._peers.values():
            try:
                peer.shutdown(socket.SHUT_RDWR)
            except OSError:
                self.lost = True
            peer.close()

    def _queue_or_run(self, call: tuple) -> None:
        if getattr(_here, "group", None) is None:
            self._point_to_point([call])
        else:
            _here.group.append(call)

    def _point_to_point(self, calls: list[tuple]) -> None:
        def work() -> None:
            outgoing = {peer: _read(at, size) for _, kind, at, size, peer, _ in calls if kind == "send"}
            wanted = {peer: (at, size) for _, kind, at, size, peer, _ in calls if kind == "recv"}
            got = self._swap(outgoing, {peer: size for peer, (_, size) in wanted.items()})
            for peer, (at, size) in wanted.items():
                ctypes.memmove(at, got[peer], size)

        self._enqueue(work, calls[0][-1])

    def _swap(self, outgoing: dict[int, bytes], wanted: dict[int, int]) -> dict[int, bytes]:
        failed: list[OSError] = []

        def push(peer: socket.socket, data: bytes) -> None:
            try:
                peer.sendall(data)
            except OSError as error:
                failed.append(error)

        pushing = [threading.Thread(target=push, args=(self._peers[p], d), daemon=True) for p, d in outgoing.items()]
        for thread in pushing:
            thread.start()
        got = {peer: _exactly(self._peers[peer], size) for peer, size in wanted.items()}
        for thread in pushing:
            thread.join()
        if failed:
            raise failed[0]
        return got

    def _enqueue(self, work: Callable[[], None], stream: int) -> None:
        assert stream == current_stream().cuda_stream, "not the current stream"
        before = self._last

        def run() -> None:
            if before is not None:
                before.join()
            try:
                work()
            except OSError:
                self.lost = True
                while not self.aborted:
                    time.sleep(0.01)

        self._last = current_stream().last = threading.Thread(target=run, daemon=True)
        self._last.start()
        if blocking:
            self._last.join()


def _exactly(peer: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = peer.recv(min(size - len(data), 1 << 20))
        if not part:
            raise ConnectionError("closed")
        data += part
    return bytes(data)


def _read(at: int, size: int) -> bytes:
    return ctypes.string_at(at, size)


def _tensor(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype)


def install(version: str = "14.2.0", *, wait: bool = True) -> None:
    """Let this process's `import cupy` find the stand-in, of that version. `wait`: see `blocking`."""
    global blocking, as_tuple
    blocking, as_tuple = wait, int(version.split(".")[0]) < 14
    cupy, cuda, nccl = ModuleType("cupy"), ModuleType("cupy.cuda"), sys.modules[__name__]
    cupy.__version__, cupy.cuda, cuda.nccl, nccl.available = version, cuda, nccl, True  # type: ignore[attr-defined]
    sys.modules.update({"cupy": cupy, "cupy.cuda": cuda, "cupy.cuda.nccl": nccl})
    torch.cuda.Event, torch.cuda.current_stream = Event, current_stream  # type: ignore[assignment,misc]
    torch.cuda.set_device = lambda device: None  # type: ignore[assignment]


def take_the_place_of_cuda() -> None:
    """A whole rank on the stand-in: NCCL's groups over tensors in host memory."""
    from farspan.comm.groups.nccl import bind, load
    from farspan.runtime.setup import set_up

    def pick_device(config: Any, network: Any) -> torch.device:  # noqa: ANN401
        bind(network.wire.name)
        load()
        return torch.device("cpu")

    install()
    set_up.pick_device = pick_device
