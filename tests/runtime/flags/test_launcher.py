"""What launchers leave unsaid is found in the environment: torchrun, srun, mpirun, Ray Train, or nobody at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from farspan.comm.errors import Occupied, RendezvousError
from farspan.comm.meeting.rendezvous import Rendezvous
from farspan.runtime.flags.config import Config, ConfigError, parse
from farspan.runtime.flags.launcher import ALONE, first_host, local_rank
from farspan.runtime.flags.validation import validate
from farspan.runtime.setup import prepare
from farspan.runtime.setup.network import find_network
from farspan.runtime.train import meet
from launch import REPO, flags_of, read_metrics

Flags = Callable[..., dict[str, Any]]
GRID = ("--pipeline-group-size", "2", "--data-group-size", "2")
SLURM = {
    "SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_NODELIST": "n[03-05,9],m1",
    "SLURM_JOB_ID": "41",
}  # fmt: skip
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def place(env: dict[str, str], *flags: str) -> tuple[int, int, str]:
    made, _ = parse([*GRID, *flags], env)
    return made.rank, made.world_size, made.dist_url


def test_torchrun() -> None:
    assert place(TORCHRUN) == (3, 4, "tcp://10.0.0.1:29500")
    assert local_rank(TORCHRUN) == 1
    agent = {**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True"}  # it listens at MASTER_PORT itself
    assert place(agent, "--rank", "1") == (1, 4, "tcp://10.0.0.1:29501")  # a flag wins


def test_slurm() -> None:
    assert place(SLURM) == (2, 4, "tcp://n03:20041")
    assert local_rank(SLURM) == 1
    assert place({"SLURM_PROCID": "0"}) == (0, 4, "")  # a job of one process says nothing of its size


def test_two_job_steps_of_one_job_meet_at_two_ports() -> None:
    urls = {place({**SLURM, "SLURM_STEP_ID": str(step)})[2] for step in range(8)}
    assert len(urls) == 8
    assert "tcp://n03:20041" in urls
    last = place({**SLURM, "SLURM_JOB_ID": "67108863", "SLURM_STEP_ID": "4294967291"})[2]
    assert 20000 <= int(last.rpartition(":")[2]) < 32000


@pytest.mark.parametrize(
    "env",
    [
        {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
        {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"},
    ],
)
def test_mpi(env: dict[str, str]) -> None:
    url = "tcp://10.0.0.1:9000"
    assert place(env, "--dist-url", url) == (3, 4, url)
    assert local_rank(env) == 1
    inside = {**SLURM, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", **env}  # the job's script has a rank of its own
    assert place(inside) == (3, 4, "tcp://n03:20041")
    assert local_rank(inside) == 1


def test_an_environment_that_cannot_be_read_is_named() -> None:
    for change in ({"WORLD_SIZE": "x"}, {"MASTER_PORT": "abc"}):
        ((name, value),) = change.items()
        with pytest.raises(ConfigError, match=f"the environment's {name}={value} is no number"):
            place({**TORCHRUN, **change})


@pytest.mark.parametrize(("nodes", "first"), [("n1", "n1"), ("n[1-3]", "n1"), ("a-b[07,9]", "a-b07"), ("x,y", "x")])
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_one_process_needs_no_url_and_no_rank() -> None:
    for env in ({}, {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}):
        made, _ = parse([], env)
        assert (made.rank, made.world_size, made.dist_url) == (0, 1, ALONE)
    two, _ = parse(["--model-name", "m", "--pipeline-group-size", "2"], {})
    with pytest.raises(ConfigError, match="--dist-url is needed"):
        validate(two)
    with pytest.raises(RendezvousError, match="names no port"):
        Rendezvous(ALONE, 0, 2, timeout_s=1, on_hopeless=print)


def test_where_one_device_is_visible_it_is_the_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm with --gpus-per-task=1 shows each task its own GPU, as device 0."""
    config, _ = parse(["--use-cuda", "true"], {})
    network, chosen = find_network(config), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.setenv(name, "1")
    for count, number in ((1, 0), (2, 1), (8, 1)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert prepare.pick_device(config, network) == torch.device("cuda", number)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="--cuda-id 1: this process sees 1 CUDA device, from 0 on"):
        prepare.pick_device(Config(use_cuda="true", cuda_id=1), network)


def test_a_port_that_the_launcher_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train's torch backend serves torch's own store at the MASTER_PORT that it gives to its workers."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    for rank, line in ((0, "the port is in use"), (1, "does not answer as farspan's rank 0 does")):
        monkeypatch.setenv("RANK", str(rank))
        config, _ = parse([])
        with pytest.raises(Occupied) as caught:
            meet(config, 0.5)
        assert line in str(caught.value)
        assert "launcher may hold that port itself" in str(caught.value)
        assert "give all ranks --dist-url tcp://127.0.0.1:PORT" in str(caught.value)
        by_flag, _ = parse(["--dist-url", f"tcp://localhost:{store.port}"])
        with pytest.raises(Occupied) as caught:
            meet(by_flag, 0.5)
        assert "launcher" not in str(caught.value)


IN_A_THREAD = """
import json, signal, sys, threading
from farspan.runtime.cli import main

good, bad = json.loads(sys.argv[1])
before, statuses = signal.getsignal(signal.SIGINT), []

def work():
    statuses.append(main(good))
    print(statuses, signal.getsignal(signal.SIGINT) is before, flush=True)
    main(bad)

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def test_outside_the_main_thread(flags: Flags, tmp_path: Path) -> None:
    """So Ray Train runs its workers: a run works there, and a failure is one line and no traceback."""

    good = [str(word) for word in flags_of({**flags(total_steps=2), "use_cuda": "false"})]
    bad = [*good, "--model-name", str(tmp_path / "nowhere")]
    done = subprocess.run(
        [sys.executable, "-c", IN_A_THREAD, json.dumps([good, bad])],
        capture_output=True, text=True, timeout=120, cwd=REPO, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout == "[0] True\n", done.stderr
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "nowhere" in done.stderr.splitlines()[-1]
    assert [row["step"] for row in read_metrics(tmp_path / "ck")] == [1, 2]
