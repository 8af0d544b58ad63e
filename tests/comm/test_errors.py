"""Each error is one line: rank, peer, interface, operation, seconds, and what to try."""

from __future__ import annotations

import pytest
from farspan.comm.errors import LinkTimeout, PeerLost, PeerSilent, WireError, line_of

FACTS = {"rank": 3, "interface": "eth0", "operation": "receiving activations", "seconds": 12.34}


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            PeerLost(peer=4, **FACTS),
            "rank 3: lost rank 4 (interface eth0, receiving activations, after 12.3 s): see rank 4's last line and its "
            "host's log for why; start all ranks again, and they resume",
        ),
        (
            LinkTimeout(peer=0, **FACTS, detail="no bytes"),
            "rank 3: timed out waiting for rank 0 (interface eth0, receiving activations, after 12.3 s): no bytes: "
            "where rank 0 or the link over eth0 is only slow, give a longer --wire-timeout (--join-timeout to start)",
        ),
        (
            PeerLost(peer=None, **FACTS),
            "rank 3: lost a peer (interface eth0, receiving activations, after 12.3 s): see its last line and its "
            "host's log for why; start all ranks again, and they resume",
        ),
        (
            PeerSilent(peer=4, **FACTS),
            "rank 3: no sign of life from rank 4 (interface eth0, receiving activations, after 12.3 s): is its process "
            "stopped, its host down, or a firewall on the way over eth0? Try ping, then start all ranks again, and "
            "they resume",
        ),
    ],
)
def test_the_line(error: WireError, line: str) -> None:
    assert str(error).startswith(line)


@pytest.mark.parametrize("kind", [PeerLost, LinkTimeout])
def test_blaming_changes_the_peer_alone(kind: type[PeerLost] | type[LinkTimeout]) -> None:
    error = kind(peer=None, **FACTS, detail="why")
    blamed = error.blaming(5)
    assert type(blamed) is kind
    assert vars(blamed) == {**vars(error), "peer": 5}
    assert str(blamed) == str(kind(peer=5, **FACTS, detail="why"))
    assert error.peer is None


def test_every_line_says_which_rank_speaks() -> None:
    assert line_of(2, ValueError("no such file")) == "rank 2: no such file"
    assert line_of(2, ValueError("rank 1: no such file")) == "rank 1: no such file"
