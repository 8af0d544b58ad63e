"""A `Group` without a wire: messages wait in queues, so that the ranks of a test are threads of one process."""

from __future__ import annotations

import queue
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor


class MemoryWire:
    """What the members of memory groups share."""

    def __init__(self) -> None:
        self.queues: defaultdict[tuple[str, int, int], queue.Queue[Tensor]] = defaultdict(queue.Queue)


class MemoryGroup:
    """One rank's end of it. Point to point only; the sizes of both ends must agree, as on a real wire."""

    interface = "memory"

    def __init__(self, wire: MemoryWire, name: str, members: tuple[int, ...], rank: int) -> None:
        self.name, self.members, self.rank, self._queues = name, members, rank, wire.queues
        self.operations: list[str] = []

    @property
    def size(self) -> int:
        return len(self.members)

    def send(self, x: Tensor, to: int, *, timeout_s: float, operation: str = "send") -> None:
        self.operations.append(operation)
        self._queues[self.name, self.rank, to].put(x.clone())

    def recv(self, out: Tensor, source: int, *, timeout_s: float, operation: str = "receive") -> None:
        self.post(out, source, operation=operation)(timeout_s)

    def post(self, out: Tensor, source: int, *, operation: str = "receive") -> Callable[[float], None]:
        self.operations.append(operation)
        return lambda timeout_s: self._take(out, source, timeout_s)

    def _take(self, out: Tensor, source: int, timeout_s: float) -> None:
        message = self._queues[self.name, source, self.rank].get(timeout=timeout_s)
        if (message.dtype, message.shape) != (torch.uint8, out.shape):
            raise ValueError(f"{list(message.shape)} of {message.dtype} came where {list(out.shape)} was expected")
        out.copy_(message)

    def all_reduce(self, x: Tensor, *, timeout_s: float, operation: str = "all-reduce") -> None:
        raise NotImplementedError

    def broadcast(self, x: Tensor, source: int, *, timeout_s: float, operation: str = "broadcast") -> None:
        raise NotImplementedError

    def barrier(self, *, timeout_s: float, operation: str = "barrier") -> None:
        raise NotImplementedError

    def close(self) -> None:
        self._queues.clear()
