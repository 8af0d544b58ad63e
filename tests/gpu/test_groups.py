"""Groups, links and lanes on a GPU: NCCL and Gloo carry what lies there, and streams, not the host, wait for it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu
import pytest
import torch
from farspan.comm.codecs.codec import RawCodec
from farspan.comm.errors import WireError
from farspan.comm.groups.group import Group
from farspan.comm.groups.nccl import NcclGroup, bind
from farspan.comm.groups.watchdog import Watchdog
from farspan.comm.lanes.stream_lane import StreamLane
from farspan.comm.link import Receiver, Sender
from peers import Peer, error_of, play
from torch import Tensor

pytestmark = gpu.with_nccl
DEVICE = gpu.DEVICE
LONG = 120.0


def numbers(rank: int, size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(rank)) * 10.0**rank


def nccl(me: Peer, name: str, told: list[WireError] | None = None) -> NcclGroup:
    torch.cuda.set_device(DEVICE)
    watchdog = Watchdog(lambda: None, told.append if told is not None else lambda error: None)
    return NcclGroup(me.store, name, me.ranks, me.rank, "lo", 60.0, DEVICE, watchdog)


def collectives(me: Peer, group: Group) -> dict[str, bool]:
    """With tensors on the device and in host memory."""
    answer, place = {}, me.ranks.index(me.rank)
    for where in (DEVICE, torch.device("cpu")):
        for n in (1, 40_001):
            mine, all_in_order = numbers(me.rank, 3 * n), numbers(1, 3 * n) + numbers(4, 3 * n) + numbers(6, 3 * n)
            x = mine.clone().to(where)
            group.all_reduce(x, timeout_s=60)
            answer[f"{where.type} sum {n}"] = torch.allclose(x.cpu(), all_in_order, rtol=1e-5, atol=1e-2)
            x = mine.clone().to(where)
            group.reduce_scatter(x, timeout_s=60)
            own = x.view(3, n)[place]
            answer[f"{where.type} scattered {n}"] = torch.equal(own.cpu(), all_in_order.view(3, n)[place])
            whole = torch.full((3, n), float("nan"), device=where)
            whole[place] = own
            group.all_gather(whole.view(-1), timeout_s=60)
            answer[f"{where.type} gathered {n}"] = torch.equal(whole.view(-1).cpu(), all_in_order)
        x = torch.full((5,), me.rank, device=where).bfloat16()
        group.all_reduce(x, timeout_s=60)
        answer[f"{where.type} bf16"] = x.tolist() == [11.0] * 5
        x = torch.full((2, 3), me.rank == 4, device=where)
        group.broadcast(x, 4, timeout_s=60)
        answer[f"{where.type} told"] = bool(x.all())
        if me.rank == 6:
            group.send(torch.arange(7, device=where), 1, timeout_s=60)
        if me.rank == 1:
            x = torch.zeros(7, dtype=torch.int64, device=where)
            group.recv(x, 6, timeout_s=60)
            answer[f"{where.type} told"] &= x.tolist() == list(range(7))
    group.barrier(timeout_s=60)
    return answer


def collectives_over_nccl(me: Peer) -> dict[str, bool]:
    gpu.own_host(me.rank)
    bind("lo")
    group = nccl(me, "all")
    answer = collectives(me, group)
    group.close()
    return answer


def collectives_over_gloo(me: Peer) -> dict[str, bool]:
    torch.cuda.set_device(DEVICE)
    group = me.group("all", 60.0)
    answer = collectives(me, group)
    group.close()
    return answer


@pytest.mark.parametrize("scenario", [collectives_over_nccl, collectives_over_gloo])
def test_all_that_a_group_can(tmp_path: Path, scenario: Callable[[Peer], Any]) -> None:
    for answer in play(scenario, (1, 4, 6), tmp_path).values():
        assert answer == dict.fromkeys(answer, True)
        assert len(answer) == 2 * 8


def cross(me: Peer, groups: dict[str, Group]) -> list[bool]:
    """Both directions at once; what is received is used, and its memory used again, without the host waiting."""
    lanes = [StreamLane("send", DEVICE), StreamLane("receive", DEVICE)]
    out_group, in_group = groups[f"{me.rank}→{me.other}"], groups[f"{me.other}→{me.rank}"]
    out = Sender(out_group, me.other, RawCodec(), lanes[0], 60.0)
    into = Receiver(in_group, me.other, RawCodec(), lanes[1], 60.0, device=DEVICE, depth=in_group.ahead)
    size, count = 1_000_000, 8
    into.expect(count, (size,), torch.float32)
    sums = []
    for at in range(count):
        out.send(torch.full((size,), float(10 * me.rank + at), device=DEVICE))  # nobody else holds it
        torch.zeros(size, device=DEVICE).add_(1)  # would take the memory of what is still being sent
        x = into.recv().get()
        sums.append((x == 10 * me.other + at).all())
        del x
    right = [bool(s) for s in sums]
    for end in (*lanes, *groups.values()):
        end.close()
    return right


def cross_over_nccl(me: Peer) -> list[bool]:
    gpu.own_host(me.rank)
    bind("lo")
    return cross(me, {name: nccl(me, name) for name in ("0→1", "1→0")})


def cross_over_gloo(me: Peer) -> list[bool]:
    torch.cuda.set_device(DEVICE)
    return cross(me, {name: me.group(name, 60.0) for name in ("0→1", "1→0")})


@pytest.mark.parametrize("scenario", [cross_over_nccl, cross_over_gloo])
def test_links_carry_what_lies_on_the_device(tmp_path: Path, scenario: Callable[[Peer], Any]) -> None:
    assert play(scenario, (0, 1), tmp_path) == {0: [True] * 8, 1: [True] * 8}


def wait_in_vain(me: Peer, timeout_s: float, meanwhile: Callable[[], object]) -> tuple[str, str, float] | None:
    """The host waits for a stream that waits for a peer: it must come out of that."""
    gpu.own_host(me.rank)
    bind("lo")
    told: list[WireError] = []
    group = nccl(me, "7→3", told)
    if me.rank == 7:
        me.hear("waiting")
        meanwhile()
        me.hear("done")
        return None
    group.recv(torch.zeros(4, device=DEVICE), 7, timeout_s=timeout_s, operation="receiving x")
    me.say("waiting")
    start = time.monotonic()
    torch.cuda.current_stream(DEVICE).synchronize()
    took = time.monotonic() - start
    then = error_of(lambda: group.recv(torch.zeros(4, device=DEVICE), 7, timeout_s=LONG))
    me.say("done")
    assert then is not None
    return str(told[0]), then.line, took


def lose_a_peer(me: Peer) -> Any:  # noqa: ANN401
    return wait_in_vain(me, LONG, meanwhile=lambda: os.kill(os.getpid(), signal.SIGKILL))


def be_silent(me: Peer) -> Any:  # noqa: ANN401
    return wait_in_vain(me, 2.0, meanwhile=lambda: None)


@pytest.mark.parametrize(
    ("scenario", "dying", "words"), [(lose_a_peer, [7], "lost"), (be_silent, [], "timed out waiting for")]
)
def test_a_stream_that_waits_in_vain_is_let_go(
    tmp_path: Path, scenario: Callable[[Peer], Any], dying: list[int], words: str
) -> None:
    first, then, took = play(scenario, (3, 7), tmp_path, dying=dying, deadline_s=60)[3]
    assert first.startswith(f"rank 3: {words} rank 7 (interface lo, receiving x in group 7→3, after ")
    assert then == first
    assert took < LONG / 2
