"""What one directed edge can carry, measured over connections of its own kind by its two ends."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from .codecs.codec import RawCodec
from .groups.group import Group
from .lanes.lane import Lane
from .link import WINDOW, Receiver, Sender

_ROUNDS = 5
_FIRST, _MOST = 1 << 16, 1 << 26  # bytes of the first and of the largest stream
_ENOUGH_S = 0.7
_REST_S = 0.3  # and a round trip: as long as makes TCP careful again, its retransmission time at the least
_SHORT, _LONGEST_S = 8, 3.0  # messages of a burst, and how long it may take
_HOST = torch.device("cpu")


@dataclass(frozen=True)
class EdgeFigures:
    """One direction. Rates in bytes/s: of one connection, and of `connections` together.

    `burst_s`: what the k-th of several messages of `message_bytes`, sent in a row after a rest, takes of the wire, and
    then the mean of those behind the first, for all later ones. `turn_s`: between two messages the wire rests so long,
    until the receiver says that it is ready for the next.
    """

    round_trip_s: float
    one_rate: float
    many_rate: float
    connections: int
    message_bytes: int = 0
    burst_s: tuple[float, ...] = ()
    turn_s: float = 0.0


@dataclass(frozen=True)
class Probe:
    """One end of the edge `source` → `target`: the run's own group for each direction (it may be the same), and `more`
    connections for streams, since a stream that fills a queue until packets are lost leaves TCP careful for long."""

    source: int
    target: int
    there: Group
    back: Group
    more: Sequence[Group]
    lanes: Sequence[Lane]
    """One for each of `more`."""
    timeout_s: float

    def measure(self, message_bytes: int = 0, messages: int = 0) -> EdgeFigures | None:
        """Both ends call this together; the source gets the figures. `message_bytes`: of the messages of a run, up to
        `messages` of which are sent in a burst."""
        if self.there.rank == self.target:
            self._answer(messages)
            return None
        round_trip = min(self._ping() for _ in range(_ROUNDS))
        one = self._rate(self.more[:1], round_trip)
        many = self._rate(self.more, round_trip)
        if not messages:
            return EdgeFigures(round_trip, one, many, len(self.more))
        # A message that would take too long is measured by a shorter one, and the rest of it by the rate.
        count = max(1, min(messages, _SHORT, int(_LONGEST_S * one / message_bytes)))
        size = min(message_bytes, max(_FIRST, int(_LONGEST_S * one / count)))
        rest = (message_bytes - size) / one
        _, *gaps = self._burst(8, _SHORT, round_trip)
        turn = statistics.median(gaps)
        self._burst(size, count, round_trip)  # in which TCP learns the way, as it does in the first steps of a run
        first, *later = self._burst(size, count, round_trip)
        burst = [first + rest, *(max(gap - turn, 0.0) + rest for gap in later)]
        # A lost packet holds one message back, and the next ones come all at once behind it: hence the mean.
        burst.append(statistics.fmean(burst[1:] or burst))
        return EdgeFigures(round_trip, one, many, len(self.more), message_bytes, tuple(burst), turn)

    def _ping(self) -> float:
        start = time.perf_counter()
        self._say(self.there, 0.0)
        self._hear(self.back)
        return time.perf_counter() - start

    def _rate(self, groups: Sequence[Group], round_trip: float) -> float:
        """Bytes/s of streams over all `groups` at once; they grow until they take long enough to tell."""
        size = _FIRST
        while True:
            self._say(self.there, size, len(groups))
            self._hear(self.back)
            start = time.perf_counter()
            self._all(groups, size, sending=True)
            self._hear(self.back)
            took = max(time.perf_counter() - start - round_trip, 1e-6)
            if took >= _ENOUGH_S or size >= _MOST:
                self._say(self.there, 0.0)
                return size / took
            size = min(_MOST, int(size * min(8.0, 1.5 * _ENOUGH_S / took)))

    def _burst(self, size: int, count: int, round_trip: float) -> list[float]:
        """Seconds of the wire for the first, then between the arrivals of each and the one before."""
        self._say(self.there, size, count)
        self._hear(self.back)
        time.sleep(_REST_S + round_trip)
        sender = Sender(self.there, self.target, RawCodec(), self.lanes[0], self.timeout_s)
        payload = torch.zeros(size, dtype=torch.uint8)
        start = time.perf_counter()
        for _ in range(count):
            sender.send(payload)
        gaps = self._hear(self.back, count)[:count]
        total = time.perf_counter() - start
        return [max(total - round_trip - sum(gaps[1:]), 0.0), *gaps[1:]]

    def _answer(self, messages: int) -> None:
        for _ in range(_ROUNDS):
            self._hear(self.there)
            self._say(self.back, 0.0)
        for _ in range(2):
            while (order := self._hear(self.there, 2))[0]:
                self._say(self.back, 0.0)
                self._all(self.more[: int(order[1])], int(order[0]), sending=False)
                self._say(self.back, 0.0)
        for _ in range(3 if messages else 0):
            self._answer_burst()

    def _answer_burst(self) -> None:
        size, count = map(int, self._hear(self.there, 2))
        receiver = Receiver(
            self.there, self.source, RawCodec(), self.lanes[0], self.timeout_s, device=_HOST, depth=self.there.ahead,
            window=WINDOW,
        )  # fmt: skip
        receiver.expect(count, (size,), torch.uint8)
        self._say(self.back, 0.0)
        arrivals = []
        for _ in range(count):
            receiver.recv().get()
            arrivals.append(time.perf_counter())
        self._say(self.back, 0.0, *(b - a for a, b in pairwise(arrivals)))

    def _all(self, groups: Sequence[Group], size: int, *, sending: bool) -> None:
        share = size // len(groups)

        def carry(group: Group) -> None:
            x = torch.zeros(share, dtype=torch.uint8)
            if sending:
                group.send(x, self.target, timeout_s=self.timeout_s, operation="measuring")
            else:
                group.recv(x, self.source, timeout_s=self.timeout_s, operation="measuring")

        tickets = [lane.submit(partial(carry, g)) for lane, g in zip(self.lanes, groups, strict=False)]
        for ticket in tickets:
            ticket.get()

    def _say(self, group: Group, *numbers: float) -> None:
        to = self.target if group.rank == self.source else self.source
        numbers = numbers if len(numbers) > 1 else (*numbers, 0.0)
        x = torch.tensor(numbers, dtype=torch.float64)
        group.send(x, to, timeout_s=self.timeout_s, operation="measuring")

    def _hear(self, group: Group, count: int = 2) -> list[float]:
        """What the other end says: at least two numbers, so that both ends know the size."""
        source = self.target if group.rank == self.source else self.source
        x = torch.empty(max(count, 2), dtype=torch.float64)
        group.recv(x, source, timeout_s=self.timeout_s, operation="measuring")
        return x.tolist()
