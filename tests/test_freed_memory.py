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

# A process of its own: where memory once ran out, glibc may go on in another arena, which maps every large block. Each
# tensor is larger than all before it together, so that none fits where another one was.
PROGRAM = """
from pathlib import Path
import torch
from lorakit.hardware.memory import keep_freed_memory, return_freed_memory

def left_of(mebibytes):
    before = resident()
    torch.ones(mebibytes << 18)
    return (resident() - before) / mebibytes

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE >> 20

left_of(8)
before = resident()
with keep_freed_memory():
    with keep_freed_memory():  # as the answers that training gives
        pass
    kept = left_of(64)
after = (resident() - before) / 64
given_back = left_of(96)
with keep_freed_memory():
    return_freed_memory()  # as gradient checkpointing does, where a run takes to it
    print(kept, after, given_back, left_of(256))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have allocators of their own")
def test_freed_memory_is_kept_within_and_given_back_afterwards():
    program = PROGRAM.replace("PAGE", str(resource.getpagesize()))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    kept, after, given_back, given_back_within = map(float, done.stdout.split())
    assert kept > 0.9
    assert max(after, given_back, given_back_within) < 0.1


@pytest.mark.parametrize(
    ("free", "device", "recomputes", "keeps"),
    [(3, "cpu", False, True), (1.9, "cpu", False, False), (3, "cuda", False, False), (3, "cpu", True, False)],
)
def test_it_is_kept_where_twice_what_is_planned_is_free(free, device, recomputes, keeps):
    machine = Machine(device, "", int(free * (1 << 30)), bfloat16=False)
    prepared = SimpleNamespace(machine=machine, expected=Memory(weights=1 << 30))
    runner = SimpleNamespace(prepared=prepared, recomputes=recomputes, sharding=SimpleNamespace(is_collective=False))
    assert _has_room_to_keep(runner) is keeps
