"""This process among the processes of its launch, by the variables that the launcher has set."""

import os
import re
from collections.abc import MutableMapping

from dash_train.errors import UserError

# Rank, number of ranks and rank on this machine: torchrun and deepspeed, Open MPI, Slurm's srun, MPICH and Intel MPI.
# mpirun within a Slurm job stands before Slurm: its processes inherit the variables of the daemon that starts them.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)


def find_place(variables: MutableMapping[str, str] = os.environ) -> tuple[int, int, int]:
    """Rank, number of ranks, and rank on this machine; a process without a launcher is a world of its own.

    Raises:
        UserError: the variables contradict each other.
    """
    for names in LAUNCHERS:
        if names[0] == "RANK" and names[0] in variables and names[1] not in variables:
            raise UserError(
                f"RANK is {variables['RANK']} but WORLD_SIZE is not set: start by a launcher (deepspeed, torchrun, "
                "srun), set both, or unset RANK"
            )
        if names[0] in variables and names[1] in variables:
            rank, size, local = (_number(variables, name) for name in names)
            if not 0 <= rank < size:
                raise UserError(f"{names[0]} is {rank} and {names[1]} is {size}: expected a rank from 0 to {size - 1}")
            return rank, size, local
    return 0, 1, 0


def set_place(variables: MutableMapping[str, str] = os.environ) -> None:
    """Give torch and DeepSpeed the place under the names that they look for.

    Raises:
        UserError: there are several ranks, and it is not known where they meet.
    """
    rank, size, local = find_place(variables)
    launched_for_torch = "RANK" in variables
    variables.update({"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(local)})
    if size == 1 or launched_for_torch:
        variables.setdefault("MASTER_ADDR", "127.0.0.1")
        return
    if "MASTER_ADDR" not in variables:
        variables["MASTER_ADDR"] = _first_host(variables, size)
    if "MASTER_PORT" not in variables:
        # The same for all ranks of the launch, and seldom that of another one.
        own = variables.get("SLURM_JOB_ID", str(os.getppid())) + variables.get("SLURM_STEP_ID", "")
        variables["MASTER_PORT"] = str(20000 + int(re.sub(r"\D", "", own) or 0) % 10000)


def _first_host(variables: MutableMapping[str, str], size: int) -> str:
    nodes = variables.get("SLURM_STEP_NODELIST", variables.get("SLURM_JOB_NODELIST", ""))
    if variables.get("OMPI_COMM_WORLD_LOCAL_SIZE") == str(size) or (not nodes and "SLURM_PROCID" in variables):
        return "127.0.0.1"
    if match := re.match(r"([^,\[]+)(?:\[(\w+))?", nodes):  # node[03-05,07],other1 begins with node03
        return match[1] + (match[2] or "")
    raise UserError(f"{size} ranks were started, but not where rank 0 is: set MASTER_ADDR and MASTER_PORT for all")


def _number(variables: MutableMapping[str, str], name: str) -> int:
    try:
        return int(variables.get(name, "0"))
    except ValueError as error:
        raise UserError(f"{name} is {variables[name]!r}: expected a number, as a launcher sets it") from error
