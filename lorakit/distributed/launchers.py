"""Where a launcher put this process: what torchrun, accelerate launch, srun, mpirun or lorakit itself say of it in the
environment.

Sources: torch's torch/distributed/run.py, "Output environment variables" in SLURM's srun(1), Open MPI's "OMPI_*
environment variables", accelerate's accelerate/utils/launch.py.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lorakit.errors import UserError

# Set by `launch`: the process that started this one.
PARENT = "LORAKIT_LAUNCHER_PID"
# By these accelerate, transformers, TRL, DeepSpeed and torch would take part of the work over, or count processes
# themselves: each process is one device to them.
LAUNCHER_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK"),
    *("ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE", PARENT),
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_ERROR_FILE"),
    *("TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_SIGNALS_TO_HANDLE", "PMI_RANK", "PMI_SIZE", "PMIX_RANK"),
    *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    *("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    *("MPI_LOCALRANKID", "MPI_LOCALNRANKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NPROCS"),
)
# What `accelerate launch` was told that would change the run -> values that change nothing, and the remedy.
_SETTINGS = {
    "ACCELERATE_MIXED_PRECISION": ("no", "write model.dtype (float32, bfloat16 or float16) into the recipe"),
    "ACCELERATE_USE_FSDP": ("false", "write train.sharding: fsdp into the recipe"),
    "ACCELERATE_USE_DEEPSPEED": ("false", "write train.sharding: zero-2 or zero-3 into the recipe"),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "write train.sharding: fsdp into the recipe, which shards as well"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("false", "write train.sharding into the recipe"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "leave --dynamo_backend out: lorakit does not compile models"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "write train.micro_batch into the recipe"),
}
# Ports that are neither a known service's nor handed out for outgoing connections (Linux: from 32768 on).
_FIRST_PORT, _PORTS = 15000, 15000


@dataclass(frozen=True)
class LaunchedProcess:
    """Where a launcher put this process. `address`, `port`: where the processes find each other; `hosted`: whether the
    launcher itself answers there, and not the process of rank 0. `parent`: the process id of the lorakit that started
    it, else 0."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str = ""
    port: int = 0
    hosted: bool = False
    parent: int = 0


def launched(environment: Mapping[str, str] = os.environ) -> LaunchedProcess | None:
    """What a launcher's environment says of this process; None where it is started alone. UserError where what it says
    cannot be."""
    for read in (_of_torchrun, _of_srun, _of_mpirun):
        if place := read(environment):
            return _checked(place)
    return None


def refuse_accelerate_settings(environment: Mapping[str, str] = os.environ) -> None:
    """UserError for what `accelerate launch`, or its config file, was told and lorakit would have to ignore."""
    if "ACCELERATE_DYNAMO_BACKEND" not in environment:  # which accelerate launch always sets
        return
    for name, (harmless, remedy) in _SETTINGS.items():
        given = environment.get(name, "")
        if given.lower() not in ("", harmless):
            raise UserError(
                f"accelerate launch set {name}={given}, which the recipe does not know of. Instead {remedy}, and "
                "start without it (accelerate config writes such answers into its file: --config_file names another)."
            )
    if environment.get("MASTER_PORT") and "RANK" not in environment and "OMPI_COMM_WORLD_RANK" not in environment:
        raise UserError(
            "accelerate launch was told of several processes and started one, as it does on a machine without GPUs. "
            "Start `lorakit train RECIPE --devices N`, or torchrun."
        )


def _of_torchrun(environment: Mapping[str, str]) -> LaunchedProcess | None:
    """torchrun, accelerate launch, lorakit itself, and whoever sets torch's variables."""
    if environment.get("WORLD_SIZE", "1") in ("", "1"):
        return LaunchedProcess("torchrun", 0, 1, 0, 1) if "RANK" in environment else None
    return LaunchedProcess(
        "lorakit" if PARENT in environment else "torchrun",
        rank=_number(environment, "RANK"),
        size=_number(environment, "WORLD_SIZE"),
        local_rank=_number(environment, "LOCAL_RANK", "0"),
        local_size=_number(environment, "LOCAL_WORLD_SIZE", "1"),
        hosted=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        parent=_number(environment, PARENT, "0"),
        address=_address(environment),
        port=_number(environment, "MASTER_PORT"),
    )


def _of_srun(environment: Mapping[str, str]) -> LaunchedProcess | None:
    """A step of several tasks. The shell of an allocation has SLURM_NTASKS, and a script SLURM_PROCID, without being
    tasks of a step; a step of one task may start the processes of its machine itself."""
    if environment.get("SLURM_STEP_NUM_TASKS", "1") == "1" or "SLURM_PROCID" not in environment:
        return None
    tasks = expand_task_counts(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = _number(environment, "SLURM_NODEID")
    if node >= len(tasks):
        raise UserError(f"SLURM_NODEID={node}, but SLURM_STEP_TASKS_PER_NODE has {len(tasks)} nodes: {tasks}.")
    number = _number(environment, "SLURM_JOB_ID") + _number(environment, "SLURM_STEP_ID", "0")
    return LaunchedProcess(
        "srun",
        rank=_number(environment, "SLURM_PROCID"),
        size=_number(environment, "SLURM_STEP_NUM_TASKS"),
        local_rank=_number(environment, "SLURM_LOCALID"),
        local_size=tasks[node],
        address=environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_STEP_NODELIST", "")),
        port=_number(environment, "MASTER_PORT", str(_FIRST_PORT + number % _PORTS)),
    )


def _of_mpirun(environment: Mapping[str, str]) -> LaunchedProcess | None:
    if environment.get("OMPI_COMM_WORLD_SIZE", "1") == "1":
        return None
    return LaunchedProcess(
        "mpirun",
        rank=_number(environment, "OMPI_COMM_WORLD_RANK"),
        size=_number(environment, "OMPI_COMM_WORLD_SIZE"),
        local_rank=_number(environment, "OMPI_COMM_WORLD_LOCAL_RANK"),
        local_size=_number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE"),
        address=_address(environment),
        port=_number(environment, "MASTER_PORT"),
    )


def _address(environment: Mapping[str, str]) -> str:
    if not environment.get("MASTER_ADDR"):
        raise UserError(
            "a launcher started this process as one of several, and MASTER_ADDR does not say where they find each "
            "other. Set MASTER_ADDR to the host of rank 0 and MASTER_PORT to a free port there, or start with torchrun."
        )
    return environment["MASTER_ADDR"]


def _checked(place: LaunchedProcess) -> LaunchedProcess:
    if not (0 <= place.rank < place.size and 0 <= place.local_rank < place.local_size <= place.size):
        raise UserError(
            f"what the launcher ({place.launcher}) says of this process cannot be: rank {place.rank} of {place.size}, "
            f"on its machine {place.local_rank} of {place.local_size}. Is a variable of another launcher left over "
            "(RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE)? Unset it."
        )
    return place


def _number(environment: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environment.get(name, default)
    if text is None:
        raise UserError(
            f"the launcher's environment is not complete: {name} is not set. Start with torchrun, or unset RANK and "
            "WORLD_SIZE to run alone."
        )
    if not text.strip().isdigit():
        raise UserError(f"{name}={text}: the launcher's environment has no number there.")
    return int(text)


def first_host(nodes: str) -> str:
    """The first host of SLURM's list, such as gpu01 of `gpu[01-04,07],login`."""
    if not nodes:
        raise UserError("SLURM_STEP_NODELIST is not set: set MASTER_ADDR to the host of rank 0.")
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0]) if first else nodes


def expand_task_counts(text: str) -> list[int]:
    """SLURM's tasks a node, such as `2(x3),1`: 2, 2, 2, 1."""
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, nodes in counts for _ in range(int(nodes or 1))]
