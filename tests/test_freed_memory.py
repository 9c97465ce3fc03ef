"""Freed memory on a processor: kept for the next tensors where there is room for it, else given back."""

import platform
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

from lorakit.hardware.machine import Machine
from lorakit.plan.memory import Memory
from lorakit.train.run import _has_room_to_keep

# A process of its own: where memory once ran out, glibc may go on in another arena, which maps every large block.
PROGRAM = """
import resource
import torch
from lorakit.hardware.memory import keep_freed_memory, return_freed_memory

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(16 << 20)  # 64 MiB, more than glibc keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with keep_freed_memory():
    new_pages()
    kept = new_pages()
given_back = new_pages()
with keep_freed_memory():
    return_freed_memory()  # as gradient checkpointing does, where a run takes to it
    print(kept, given_back, new_pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have allocators of their own")
def test_freed_memory_is_kept_within_and_given_back_afterwards():
    pages = (64 << 20) // resource.getpagesize()
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    kept, given_back, given_back_within = map(int, done.stdout.split())
    assert kept < 2 * pages  # of five tensors
    assert given_back > 4 * pages
    assert given_back_within > 4 * pages


@pytest.mark.parametrize(
    ("free", "device", "recomputes", "keeps"),
    [(3, "cpu", False, True), (1.9, "cpu", False, False), (3, "cuda", False, False), (3, "cpu", True, False)],
)
def test_it_is_kept_where_twice_what_is_planned_is_free(free, device, recomputes, keeps):
    machine = Machine(device, "", int(free * (1 << 30)), bfloat16=False)
    prepared = SimpleNamespace(machine=machine, expected=Memory(weights=1 << 30))
    runner = SimpleNamespace(prepared=prepared, recomputes=recomputes, sharding=SimpleNamespace(is_collective=False))
    assert _has_room_to_keep(runner) is keeps
