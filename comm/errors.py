"""What can go wrong on a wire. Each message is one line: rank, peer, interface, operation, seconds, and what to try."""

from __future__ import annotations


class WireError(RuntimeError):
    """Base of all wire errors; `str()` is the one line that a person reads."""


class _OperationError(WireError):
    what = "failed"
    advice = ""

    def __init__(
        self,
        *,
        rank: int,
        peer: int | None,
        interface: str,
        operation: str,
        seconds: float,
        detail: str = "",
    ) -> None:
        self.rank, self.peer, self.interface = rank, peer, interface
        self.operation, self.seconds, self.detail = operation, seconds, detail
        who = "a peer" if peer is None else f"rank {peer}"
        line = f"rank {rank}: {self.what.format(who=who)} (interface {interface}, {operation}, after {seconds:.1f} s)"
        advice = self.advice.format(who=who, whose="its" if peer is None else f"rank {peer}'s", interface=interface)
        super().__init__(": ".join(part for part in (line, detail, advice) if part))

    def blaming(self, peer: int) -> _OperationError:
        """The same error, once it is known which peer it was."""
        return type(self)(
            rank=self.rank,
            peer=peer,
            interface=self.interface,
            operation=self.operation,
            seconds=self.seconds,
            detail=self.detail,
        )


class PeerLost(_OperationError):
    """A peer's process or its connection is gone."""

    what = "lost {who}"
    advice = "see {whose} last line and its host's log for why; start all ranks again, and they resume"


class PeerSilent(PeerLost):
    """Nothing was heard of a peer for the patience: its process is stopped, or its host or the way there is gone."""

    what = "no sign of life from {who}"
    advice = (
        "is its process stopped, its host down, or a firewall on the way over {interface}? Try ping, then start all "
        "ranks again, and they resume"
    )


class LinkTimeout(_OperationError):
    """A peer is there, as far as known, but an operation passed its deadline."""

    what = "timed out waiting for {who}"
    advice = (
        "where {who} or the link over {interface} is only slow, give a longer --wire-timeout (--join-timeout to start)"
    )


class Mismatch(WireError):
    """Ranks were started with something that must agree and does not."""


class RendezvousError(WireError):
    """The ranks could not meet: port taken, master not reached, a rank that never came."""


class Occupied(RendezvousError):
    """Another program, or another run, has the port of the rendezvous."""


class StoreLost(WireError):
    """The connection to rank 0's store is gone, and with it, most likely, rank 0."""


class InterfaceError(WireError):
    """The named network interface cannot be used."""


class Intruder(WireError):
    """Something that is no rank of this run is at the other end of a connection."""


class RemoteFailure(WireError):
    """Another rank failed first; carries that rank's own line."""


class Stopped(RuntimeError):
    """A signal ended this rank; nothing failed."""


def line_of(rank: int, error: BaseException) -> str:
    """What a person reads of `error`: it always says which rank speaks."""
    line = str(error)
    return line if line.startswith("rank ") else f"rank {rank}: {line}"
