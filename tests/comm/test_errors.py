"""Each error is one line that names rank, peer, interface, operation and seconds."""

from __future__ import annotations

import pytest
from farspan.comm.errors import LinkTimeout, PeerLost, WireError

FACTS = {"rank": 3, "interface": "eth0", "operation": "receiving activations", "seconds": 12.34}


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            PeerLost(peer=4, **FACTS),
            "rank 3: lost rank 4 (interface eth0, receiving activations, after 12.3 s)",
        ),
        (
            LinkTimeout(peer=0, **FACTS, detail="no bytes"),
            "rank 3: timed out waiting for rank 0 (interface eth0, receiving activations, after 12.3 s): no bytes",
        ),
        (
            PeerLost(peer=None, **FACTS),
            "rank 3: lost a peer (interface eth0, receiving activations, after 12.3 s)",
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
