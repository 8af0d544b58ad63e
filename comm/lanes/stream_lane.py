"""The lane of a CUDA device: a thread with a stream of its own. Waiting for a ticket makes a stream wait, not the host.

The thread is there because the calls that queue work may themselves block: Gloo's always, NCCL's when it connects or
when its queues are full. The main thread only ever waits until a message's transfer is queued.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .lane import Recorder, ThreadLane, Ticket
from .stopwatch import StreamStopwatch


class StreamTicket(Ticket):
    """A ticket whose result is there when the stream of whoever calls `get` gets to that point."""

    def __init__(self, check: Callable[[], None], device: torch.device) -> None:
        super().__init__(check)
        self._device = device
        self.done = torch.cuda.Event()

    def get(self) -> Any:  # noqa: ANN401
        value = super().get()
        self._check()  # after a failure the streams go on, over what aborted transfers have left behind
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self.done)
        if isinstance(value, Tensor) and value.device == self._device:
            value.record_stream(stream)  # its memory is the lane's: not to be used again before this stream is done
        return value


class StreamLane(ThreadLane):
    """Work runs in the order of submission on a stream of the lane's own, after what the submitter's current stream
    had queued by then, or with `after_caller` False at once. What is recorded is the time that it takes on the stream,
    told when a later piece begins."""

    def __init__(
        self,
        name: str,
        device: torch.device,
        *,
        check: Callable[[], None] = lambda: None,
        on_error: Callable[[BaseException], object] = lambda error: None,
        record: Recorder | None = None,
    ) -> None:
        self._device = device
        # Transfers first: a small kernel that a peer waits for should not queue behind a large product.
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._watch = StreamStopwatch(record, device) if record is not None else None
        super().__init__(name, check=check, on_error=on_error)

    def submit(
        self, fn: Callable[[], Any], *, label: str = "", uses: Tensor | None = None, after_caller: bool = True
    ) -> Ticket:
        ready = None
        if after_caller:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._device))
        if uses is not None and uses.device == self._device:
            # `fn` holds it until what reads it is queued. Said here and not in the lane's thread: who runs out of
            # memory holds the allocator's lock while it waits for the device, which may wait for a peer that waits for
            # this very message.
            uses.record_stream(self._stream)
        ticket = StreamTicket(self._check, self._device)
        watch = self._watch

        def work() -> Any:  # noqa: ANN401
            if watch is not None:
                watch.settle()
            if ready is not None:
                self._stream.wait_event(ready)
            start = watch.start() if watch is not None and label else None
            value = fn()
            ticket.done.record(self._stream)
            if watch is not None and label:
                watch.stop(self.name, label, start)
            return value

        self._queue.put((work, label, ticket))
        return ticket

    def close(self) -> None:
        """Finish what was submitted, on the device too."""
        super().close()
        while not self._stream.query():
            self._check()
            time.sleep(0.001)

    @contextmanager
    def _place(self) -> Iterator[None]:
        torch.cuda.set_device(self._device)  # each thread has its own
        with torch.cuda.stream(self._stream):
            yield
