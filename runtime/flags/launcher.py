"""What the launcher of this process says of it in the environment: its rank, how many there are, where rank 0 is."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from .errors import ConfigError


class Launcher(NamedTuple):
    """The variables in which a launcher tells a process its number, how many there are, and its number on its host."""

    rank: str
    size: str
    local: tuple[str, ...]


SLURM = Launcher("SLURM_PROCID", "SLURM_NTASKS", ("SLURM_LOCALID",))
LAUNCHERS = (
    Launcher("RANK", "WORLD_SIZE", ("LOCAL_RANK",)),  # torchrun, Ray Train, Accelerate
    Launcher("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", ("OMPI_COMM_WORLD_LOCAL_RANK",)),  # Open MPI
    Launcher("PMI_RANK", "PMI_SIZE", ("MPI_LOCALRANKID", "SLURM_LOCALID")),  # MPICH, Intel MPI, srun --mpi=pmi2
    SLURM,
)
"""In this order: an mpirun inside a Slurm job leaves the variables of the job's own script in place."""

ALONE = "tcp://127.0.0.1:0"
"""Where the one rank of a run meets nobody: port 0 is any free one."""
FIRST_PORT, PORTS, STEP = 20000, 12000, 1009
"""Slurm's jobs have their ports here, below those that the kernel hands out; two steps of a job lie `STEP` apart."""


def from_launcher(told: argparse.Namespace, env: Mapping[str, str]) -> dict[str, Any]:
    """Rank, world size and master where the flags `told` do not have them. Raises `ConfigError`."""
    found: dict[str, Any] = {}
    launcher = _launcher(env)
    size = told.world_size
    if not size:
        grid = told.pipeline_group_size * told.data_group_size
        size = found["world_size"] = _number(env, launcher.size) if launcher and launcher.size in env else grid
    if told.rank < 0:
        if launcher is not None:
            found["rank"] = _number(env, launcher.rank)
        elif size == 1:
            found["rank"] = 0
    if not told.dist_url:
        found["dist_url"] = ALONE if size == 1 else _master(env)
    return found


def local_rank(env: Mapping[str, str]) -> int:
    """This process's number on its host, 0 where nothing says so. Raises `ConfigError`."""
    launcher = _launcher(env)
    names = launcher.local if launcher is not None else ()
    return next((_number(env, name) for name in names if name in env), 0)


def port_advice(url: str, env: Mapping[str, str]) -> str:
    """What to do where another program has the port of `url`, if the environment is where that came from; else ""."""
    if "MASTER_PORT" not in env or url != _master(env):
        return ""
    return (
        ". The environment's MASTER_ADDR and MASTER_PORT name it, and the launcher may hold that port itself, as Ray "
        f"Train does: give all ranks --dist-url tcp://{env['MASTER_ADDR']}:PORT, with a free port"
    )


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: `n[03-05,9],m1` → `n03`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    return "".join(filter(None, match.groups())) if match else nodes


def _launcher(env: Mapping[str, str]) -> Launcher | None:
    whole = (each for each in LAUNCHERS if each.rank in env and each.size in env)
    return next(whole, SLURM if SLURM.rank in env else None)  # a Slurm job of one process says nothing of its size


def _master(env: Mapping[str, str]) -> str:
    if "MASTER_ADDR" in env and "MASTER_PORT" in env:
        # torchrun's own agent listens on MASTER_PORT itself.
        port = _number(env, "MASTER_PORT") + (env.get("TORCHELASTIC_USE_AGENT_STORE") == "True")
        return f"tcp://{env['MASTER_ADDR']}:{port}"
    nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST"))
    if SLURM.rank not in env or not nodes:
        return ""
    job, step = (_number(env, name) if name in env else 0 for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return f"tcp://{first_host(nodes)}:{FIRST_PORT + (job + STEP * step) % PORTS}"


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise ConfigError(f"the environment's {name}={env[name]} is no number: unset or mend it") from None
