"""Which interface what takes: flags against each other, against the environment, and in a run of two hosts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from farspan.comm.errors import InterfaceError
from farspan.comm.meeting import interfaces as room
from farspan.comm.meeting.interfaces import Interface
from farspan.runtime.flags.config import Config, ConfigError, parse
from farspan.runtime.flags.validation import validate
from farspan.runtime.setup import network as there
from farspan.runtime.setup.network import find_network, permits
from launch import Run, read_metrics
from netns import hosts

Flags = Callable[..., dict[str, Any]]

MACHINE = {
    "lo": Interface("lo", ("127.0.0.1", "::1"), up=True, mtu=65536),
    "wan0": Interface("wan0", ("10.9.0.2",), up=True, mtu=1500),
    "lan0": Interface("lan0", ("192.168.0.2",), up=True, mtu=9000),
}


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "flags" not in request.fixturenames:  # those run for real
        monkeypatch.setattr(room, "interfaces", lambda: MACHINE)
        monkeypatch.setattr(there, "interfaces", lambda: MACHINE)
        monkeypatch.setattr(there, "interface_towards", lambda host, port: MACHINE["wan0"])


def told(extra: str = "", master: str = "10.9.0.1", rank: int = 1) -> Config:
    base = f"--model-name m --task-name a.jsonl --checkpoint-path c --total-steps 8 --rank {rank} --data-group-size 2"
    made, _ = parse([*base.split(), "--dist-url", f"tcp://{master}:9000", *extra.split()], {})
    validate(made)
    return made


def test_all_takes_the_route_to_the_master_unless_told() -> None:
    network = find_network(told(), {})
    assert (network.wire.name, network.gradients.name, network.named) == ("wan0", "wan0", False)
    network = find_network(told("--net-interface lan0"), {})
    assert (network.wire.name, network.gradients.name, network.named) == ("lan0", "lan0", True)


def test_gradients_between_replicas_take_an_interface_of_their_own() -> None:
    network = find_network(told("--net-interface wan0 --dp-net-interface lan0"), {})
    names = ("replicas of stage 0", "0→1", "world", "tied embedding of replica 0", "tokens→1")
    assert [network.of(name) for name in names] == ["lan0", "wan0", "wan0", "wan0", "wan0"]
    assert str(network) == "wan0 (lan0 between replicas)"


def test_nccl_has_one_interface_a_process() -> None:
    with pytest.raises(
        ConfigError, match="--dp-net-interface lan0: NCCL has one interface a process, so with --dist-b"
    ):
        told("--dist-backend nccl --dp-backend nccl --net-interface wan0 --dp-net-interface lan0")


@pytest.mark.parametrize(
    ("variable", "value", "fits"),
    [
        ("GLOO_SOCKET_IFNAME", "wan0", True),
        ("GLOO_SOCKET_IFNAME", "lan0,wan0", True),
        ("GLOO_SOCKET_IFNAME", "wan", False),
        ("NCCL_SOCKET_IFNAME", "wan", True),
        ("NCCL_SOCKET_IFNAME", "=wan", False),
        ("NCCL_SOCKET_IFNAME", "=wan0", True),
        ("NCCL_SOCKET_IFNAME", "lan,wan", True),
        ("NCCL_SOCKET_IFNAME", "^docker,lo", True),
        ("NCCL_SOCKET_IFNAME", "^wan", False),
        ("NCCL_SOCKET_IFNAME", "^=wan", True),
    ],
)
def test_what_the_environment_permits(variable: str, value: str, fits: bool) -> None:
    assert permits(variable, value, "wan0") == fits


@pytest.mark.parametrize(
    ("extra", "variable", "value", "words"),
    [
        ("--net-interface wan0", "GLOO_SOCKET_IFNAME", "lan0", "=lan0 contradicts --net-interface wan0"),
        ("--net-interface wan0", "NCCL_SOCKET_IFNAME", "=lan0", "==lan0 contradicts --net-interface wan0"),
        ("--dp-net-interface lan0", "GLOO_SOCKET_IFNAME", "wan0", "=wan0 contradicts --dp-net-interface lan0"),
        ("", "GLOO_SOCKET_IFNAME", "lan0", "=lan0 contradicts wan0, which the route to rank 0 takes"),
    ],
)
def test_a_contradicting_environment_is_named(extra: str, variable: str, value: str, words: str) -> None:
    with pytest.raises(InterfaceError) as caught:
        find_network(told(extra), {variable: value})
    assert str(caught.value).startswith(f"rank 1: {variable}{words}")


def test_an_agreeing_environment_is_none_of_our_business() -> None:
    find_network(told("--net-interface wan0"), {"GLOO_SOCKET_IFNAME": "wan0", "NCCL_SOCKET_IFNAME": "^docker"})
    find_network(told("--dp-net-interface lan0"), {"GLOO_SOCKET_IFNAME": "wan0,lan0"})
    find_network(told(), {"NCCL_SOCKET_IFNAME": "=ib0"})  # no flag, and no NCCL in this run


def test_the_named_interface_against_the_masters_address() -> None:
    with pytest.raises(InterfaceError, match=r"--net-interface lo reaches this machine alone, and rank 0 is at 10\."):
        find_network(told("--net-interface lo"), {})
    with pytest.raises(InterfaceError, match=r"10\.9\.0\.2, an address of wan0, and --net-interface lan0: name 192"):
        find_network(told("--net-interface lan0", master="10.9.0.2", rank=0), {})
    assert find_network(told("--net-interface lan0", master="127.0.0.1", rank=0), {}).wire.name == "lan0"
    assert find_network(told("--net-interface wan0", master="10.9.0.2", rank=0), {}).wire.name == "wan0"


def test_a_run_sends_gradients_over_one_interface_and_the_rest_over_another(flags: Flags) -> None:
    """2 replicas × 2 stages: replica 0 on one host, replica 1 on the other."""
    with hosts(2, ["wan0", "lan0"]) as two:
        near, far = (host.enter for host in two)
        told = flags(
            dist_url="tcp://10.77.0.1:29999", net_interface="wan0", dp_net_interface="lan0", total_steps=20,
            bucket_mb=0.01,
        )  # fmt: skip
        with Run(2, 2, told, faults={0: near, 1: near, 2: far, 3: far}) as run:
            run.succeed()
        sent = [host.sent() for host in two]
        assert read_metrics(run.folder)[-1]["step"] == 20
    for name in ("rank0.err", "rank2.err"):
        assert "interface wan0 (lan0 between replicas)" in (run.folder / name).read_text()
    # 20 updates of 4 bytes × some 38,000 parameters cross lan0; tokens, votes and heartbeats cross wan0.
    for host in sent:
        assert host["lan0"] > 20 * 4 * 38_000
        assert host["wan0"] < 0.2 * host["lan0"]


def test_a_run_whose_bytes_take_another_interface_ends_and_says_so(flags: Flags) -> None:
    with hosts(2, ["wan0", "lan0"]) as two:
        two[1].ip(
            "route add 10.77.0.1/32 dev lan0"
        )  # one way only: the store's client is bound, Gloo follows the route
        near, far = (host.enter for host in two)
        told = flags(dist_url="tcp://10.77.0.1:29999", net_interface="wan0", join_timeout=30)
        with Run(2, 1, told, faults={0: near, 1: far}) as run:
            ended = run.wait(60)
    for end in ended.values():
        assert end.code == 1, end.err
        assert "they went over lan0" in end.err, end.err


def test_data_ports_come_from_the_kernels_range(flags: Flags) -> None:
    """As docs/ports.md says: all but rank 0's own, and without those that are reserved."""
    with hosts(2, ["wan0"]) as two:
        near, far = (host.enter for host in two)
        for host in two:
            host.set("net/ipv4/ip_local_port_range", "29500 29539")
            host.set("net/ipv4/ip_local_reserved_ports", "29510-29519")
        told = flags(dist_url="tcp://10.77.0.1:7033", total_steps=100_000)
        with Run(2, 1, told, faults={0: near, 1: far}) as run:
            run.wait_for_step(2)
            open_here, open_there = (host.ports() for host in two)
    allowed = {*range(29500, 29510), *range(29520, 29540)}
    assert open_here - {7033} <= allowed
    assert open_there <= allowed
    assert 7033 in open_here
    assert len(open_here) > 4
    assert len(open_there) > 4


def test_an_environment_that_contradicts_ends_the_run(flags: Flags) -> None:
    with Run(2, 1, flags(net_interface="lo"), env={"GLOO_SOCKET_IFNAME": "eth9"}) as run:
        ended = run.wait(60)
    for end in ended.values():
        assert end.code == 1
        assert "GLOO_SOCKET_IFNAME=eth9 contradicts --net-interface lo" in end.err
