"""How a process finds the others: from the environment of torchrun, accelerate launch, srun or lorakit itself."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta

from lorakit.distributed.processes import World, set_world

# One process may prepare rows or write a checkpoint while the others wait: it is the watch that notices who is gone.
_PATIENCE = timedelta(hours=24)
# By these accelerate, transformers and TRL would take part of the work over. Each process is one device to them.
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class LaunchedProcess:
    """Where a launcher put this process."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def launched() -> LaunchedProcess | None:
    """What a launcher's environment says of this process; None where it is started alone."""
    environment = os.environ
    if int(environment.get("WORLD_SIZE", "1")) > 1:
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_rank = int(environment.get("LOCAL_RANK", "0"))
        return LaunchedProcess(rank, size, local_rank, int(environment.get("LOCAL_WORLD_SIZE", "1")))
    return None


@contextmanager
def joined(device: str = "cpu") -> Iterator[World]:
    """Within, this process is one of those that its launcher started; alone where none did. `device`: the type of
    device that it computes on."""
    place = launched()
    if place is None:
        yield World()
        return
    from torch import distributed

    backend = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}[device]
    distributed.init_process_group(backend, init_method="env://", rank=place.rank, world_size=place.size)
    hidden = {name: os.environ.pop(name) for name in _LAUNCHER_VARIABLES if name in os.environ}
    world = World(place.rank, place.size, place.local_rank, place.local_size)
    world = replace(world, control=distributed.new_group(backend="gloo", timeout=_PATIENCE))
    set_world(world)
    try:
        yield world
    finally:
        set_world(World())
        os.environ.update(hidden)
        distributed.destroy_process_group()
