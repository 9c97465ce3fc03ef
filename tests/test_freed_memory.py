"""Freed memory on a processor: kept for the next tensors where there is room for it, else given back."""

import platform
import resource
from types import SimpleNamespace

import pytest
import torch

from lorakit.hardware.machine import Machine
from lorakit.hardware.memory import keep_freed_memory
from lorakit.plan.memory import Memory
from lorakit.train.run import _has_room_to_keep

NUMBERS = 16 << 20  # of 64 MiB, more than glibc keeps by itself


def new_pages(times: int = 5) -> int:
    """How many pages the system gave anew for a tensor that is made and freed several times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(NUMBERS)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have allocators of their own")
def test_freed_memory_is_kept_within_and_given_back_afterwards():
    pages = 4 * NUMBERS // resource.getpagesize()
    with keep_freed_memory():
        assert new_pages() <= 2 * pages  # of the first, and of one beside it
        assert new_pages() < pages
    assert new_pages() > 4 * pages


@pytest.mark.parametrize(
    ("free", "device", "recomputes", "keeps"),
    [(3, "cpu", False, True), (1.9, "cpu", False, False), (3, "cuda", False, False), (3, "cpu", True, False)],
)
def test_it_is_kept_where_twice_what_is_planned_is_free(free, device, recomputes, keeps):
    machine = Machine(device, "", int(free * (1 << 30)), bfloat16=False)
    prepared = SimpleNamespace(machine=machine, expected=Memory(weights=1 << 30))
    runner = SimpleNamespace(prepared=prepared, recomputes=recomputes, sharding=SimpleNamespace(is_collective=False))
    assert _has_room_to_keep(runner) is keeps
