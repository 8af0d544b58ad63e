"""`comm/` alone: two processes hand tensors to each other over a network interface by name.

    python example_scripts/comm_alone.py 0 &
    python example_scripts/comm_alone.py 1

Rank 0 sends three tensors, and rank 1 sends each back doubled. On two hosts, give both
`--url tcp://HOST-OF-RANK-0:7040`, and each `--interface` its own name of the interface that leads to the other.
(A run also proves, as `runtime/setup/wiring.py` shows, that each connection is the peer's and takes that interface.)
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import NoReturn

import torch
from farspan.comm.codecs.codec import RawCodec
from farspan.comm.errors import WireError
from farspan.comm.link import Receiver, Sender
from farspan.comm.meeting.interfaces import Interface, interface
from farspan.comm.meeting.rendezvous import Rendezvous
from farspan.comm.transport import Transport, Wanted

COUNT, SHAPE = 3, (2, 4)  # both ends know how many messages come, and of what shape: no size is ever sent
WAIT_S = 60.0  # the longest that any one wait may take
CPU = torch.device("cpu")


def talk(meeting: Rendezvous, here: Interface) -> None:
    me, other = meeting.rank, 1 - meeting.rank
    transport = Transport(meeting, CPU, WAIT_S)
    # Each direction is a group of its own, so the two never wait for each other.
    transport.connect(Wanted("gloo", name, (0, 1), here.name) for name in ("0→1", "1→0"))
    out, into = transport.groups[f"{me}→{other}"], transport.groups[f"{other}→{me}"]
    sender = Sender(out, other, RawCodec(), transport.lane("send"), WAIT_S)
    receiver = Receiver(into, other, RawCodec(), transport.lane("receive"), WAIT_S, device=CPU, depth=into.ahead)
    receiver.expect(COUNT, SHAPE, torch.float32)  # asked for ahead of time: a message leaves at once when it is ready
    if me == 0:
        for number in range(COUNT):
            sender.send(torch.full(SHAPE, float(number)))  # returns at once
        for _ in range(COUNT):
            print(f"rank 0 got {receiver.recv().get().tolist()} over {here.name}", flush=True)
    else:
        for _ in range(COUNT):
            sender.send(2 * receiver.recv().get())  # `get` waits for the message
    transport.close()  # finishes what is under way
    meeting.close()


def give_up(line: str) -> NoReturn:
    print(line, file=sys.stderr, flush=True)
    os._exit(1)  # no tearing down: threads may be stuck in the wire


def main() -> None:
    parser = argparse.ArgumentParser(description="Two processes hand tensors to each other.")
    parser.add_argument("rank", type=int, choices=(0, 1))
    parser.add_argument("--url", default="tcp://127.0.0.1:7040", help="where rank 0 can be reached [%(default)s]")
    parser.add_argument("--interface", default="lo", help="network interface for all traffic [%(default)s]")
    told = parser.parse_args()
    try:
        here = interface(told.interface)
        meeting = Rendezvous(
            told.url, told.rank, world=2, timeout_s=WAIT_S, on_hopeless=give_up, via=here, leave_by=here
        )
    except WireError as error:
        give_up(str(error))
    try:
        talk(meeting, here)
    except WireError as error:
        give_up(str(meeting.failed(error)))  # both ranks print the first cause, whoever had it


if __name__ == "__main__":
    main()
