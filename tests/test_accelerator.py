"""What a training needs of its device, whoever made it; on the processor, the only device of this machine."""

import os

import pytest
import torch

from lorakit.distributed import binding
from lorakit.distributed.launchers import LaunchedProcess
from lorakit.errors import UserError
from lorakit.hardware.accelerator import (
    current_accelerator,
    in_float64,
    random_states,
    restoring_random_states,
    set_random_states,
)
from lorakit.hardware.memory import is_out_of_memory, process_peak, run_peak
from lorakit.train.checkpoint import restore_device_generator, save_device_generator

CPU = torch.device("cpu")


def test_random_states_that_are_put_back_draw_the_same_again():
    states = random_states(CPU)
    first = torch.rand(5)
    set_random_states(CPU, states)
    assert torch.equal(torch.rand(5), first)


@pytest.mark.parametrize("device", [None, CPU])
def test_what_is_drawn_within_leaves_no_trace(device):
    states = random_states(CPU)
    with restoring_random_states(device):
        torch.manual_seed(3)
        torch.rand(7)
    assert torch.equal(random_states(CPU)[0], states[0])


def test_the_generators_that_the_trainer_saves_are_not_saved_again(tmp_path):
    for kind in ("cpu", "cuda"):
        save_device_generator(torch.device(kind), tmp_path)
        restore_device_generator(torch.device(kind), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_that_goes_on_on_another_device_has_no_generator_to_restore(tmp_path):
    state = torch.get_rng_state()
    restore_device_generator(torch.device("mps"), tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_numbers_in_float64_are_the_same_numbers():
    numbers = torch.rand(9)
    assert in_float64(numbers).dtype == torch.float64
    assert torch.equal(in_float64(numbers).float(), numbers)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_peak_is_that_of_the_process():
    assert current_accelerator() is None
    assert run_peak(CPU) == process_peak()


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory",
        "HIP error: out of memory",
        "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`",
        "MPS backend out of memory (MPS allocated: 7.64 GiB, other allocations: 68.91 GiB, max allowed: 88.13 GiB).",
        "Invalid buffer size: 18.48 GiB",
        "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
        "level_zero backend failed with error: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)",
    ],
)
def test_every_makers_words_for_too_little_memory_are_understood(text):
    assert is_out_of_memory(RuntimeError(text))


@pytest.mark.parametrize(
    "text", ["level_zero backend failed with error: 20 (UR_RESULT_ERROR_DEVICE_LOST)", "HIP error"]
)
def test_other_failures_of_a_device_are_no_lack_of_memory(text):
    assert not is_out_of_memory(RuntimeError(text))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has a GPU")
def test_processes_of_a_processor_are_bound_to_nothing_and_a_mac_has_one_gpu():
    environment = dict(os.environ)
    place = LaunchedProcess("torchrun", rank=1, size=2, local_rank=1, local_size=2)
    binding.bind_device(place, binding.device_type())
    assert dict(os.environ) == environment
    with pytest.raises(UserError, match="a Mac has one GPU"):
        binding.bind_device(place, "mps")


def test_every_type_of_device_that_several_processes_use_has_a_backend():
    assert {*binding.VISIBLE, "cpu"} == set(binding.BACKENDS)
    for device, backend in binding.BACKENDS.items():
        own = torch.distributed.Backend.default_device_backend_map[device]
        assert own in backend, "torch's own backend for the device"
