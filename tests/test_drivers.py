"""The GPUs of other makers are read from what their drivers' tools print. The texts have the form that the tools'
documentation and their users show; none of these devices is on this machine."""

import json

import pytest

from lorakit.hardware.drivers import (
    DriverGpu,
    hides_gpus,
    parse_amd_smi,
    parse_rocm_smi,
    parse_sysctl,
    parse_xpu_smi,
    select_visible,
    visible_names,
)
from lorakit.hardware.gpus import find_gpu
from lorakit.hardware.machine import machine_of, machine_with

GIB = 2**30
MI300X = 196592 << 20

ROCM_SMI = {
    "card1": {
        "VRAM Total Memory (B)": "25753026560",
        "VRAM Total Used Memory (B)": "0",
        "Card Series": "AMD Radeon RX 7900 XTX",
        "GFX Version": "gfx1100",
    },
    "card0": {
        "VRAM Total Memory (B)": str(MI300X),
        "VRAM Total Used Memory (B)": "301989888",
        "Card Series": "AMD Instinct MI300X",
        "GFX Version": "gfx942",
    },
    "system": {"Driver version": "6.10.5"},
}
AMD_SMI = [
    {
        "gpu": 0,
        "asic": {"market_name": "AMD Instinct MI300X", "target_graphics_version": "gfx942"},
        "vram": {"type": "HBM3", "size": {"value": 196592, "unit": "MB"}},
        "driver": {"name": "amdgpu", "version": "6.19.14"},
    }
]
XPU_SMI = {
    "device_id": 0,
    "device_name": "Intel(R) Arc(TM) B580 Graphics",
    "driver_version": "1.6.31294",
    "memory_physical_size_byte": "12821987328",
    "memory_free_size_byte": "12000000000",
    "vendor_name": "Intel(R) Corporation",
}
SYSCTL = "machdep.cpu.brand_string: Apple M3 Max\nhw.memsize: 68719476736\niogpu.wired_limit_mb: {limit}\n"


def test_rocm_smi_is_read_card_by_card():
    warning = "WARNING: AMD GPU device(s) is/are in a low-power state. Check power control/runtime_status\n\n"
    first, second = parse_rocm_smi(warning + json.dumps(ROCM_SMI))
    assert first == DriverGpu("AMD Instinct MI300X", MI300X, MI300X - 301989888, "6.10.5", "gfx942")
    assert (second.name, second.memory, second.capability) == ("AMD Radeon RX 7900 XTX", 25753026560, "gfx1100")


def test_an_older_rocm_smi_writes_its_keys_in_other_letters():
    card = {"Card series": "AMD Radeon RX 7900 XTX", "VRAM Total Memory (B)": "25753026560"}
    (gpu,) = parse_rocm_smi(json.dumps({"card0": card}))
    assert (gpu.name, gpu.memory, gpu.driver) == ("AMD Radeon RX 7900 XTX", 25753026560, "")


def test_a_card_without_a_name_goes_by_its_instruction_set():
    (gpu,) = parse_rocm_smi('{"card0": {"Card Series": "N/A", "VRAM Total Memory (B)": "8", "GFX Version": "gfx950"}}')
    assert gpu.name == "AMD gfx950"


@pytest.mark.parametrize("printed", [AMD_SMI, {"gpu_data": AMD_SMI}], ids=["older", "newer"])
def test_amd_smi_is_read_in_both_its_forms(printed):
    assert parse_amd_smi(json.dumps(printed)) == [DriverGpu("AMD Instinct MI300X", MI300X, MI300X, "6.19.14", "gfx942")]


def test_a_memory_that_amd_smi_does_not_know_is_no_number():
    printed = [{"gpu": 0, "asic": {"market_name": "AMD Radeon"}, "vram": {"size": "N/A"}}]
    assert parse_amd_smi(json.dumps(printed)) == [DriverGpu("AMD Radeon", 0, 0, "", "")]


def test_xpu_smi_is_read():
    (gpu,) = parse_xpu_smi(json.dumps(XPU_SMI))
    assert (gpu.name, gpu.memory, gpu.driver) == ("Intel(R) Arc(TM) B580 Graphics", 12821987328, "1.6.31294")
    assert machine_of("xpu", gpu).is_gpu and machine_of("xpu", gpu).bfloat16


@pytest.mark.parametrize(("limit", "memory"), [(0, 64 * GIB * 2 // 3), (57344, 56 * GIB)])
def test_a_mac_has_the_limit_that_was_set_for_its_gpu_or_what_metal_recommends(limit, memory):
    (gpu,) = parse_sysctl(SYSCTL.format(limit=limit), "15.5")
    assert (gpu.name, gpu.driver) == ("Apple M3 Max", "macOS 15.5")
    assert gpu.memory == pytest.approx(memory, abs=1)


def test_a_mac_that_knows_no_limit_prints_two_of_the_three():
    text = "".join(SYSCTL.format(limit=0).splitlines(keepends=True)[:2])
    assert parse_sysctl(text, "14.0")[0].memory == pytest.approx(64 * GIB * 2 / 3, abs=1)


def test_a_card_of_the_table_on_this_machine_has_its_rates():
    machine = machine_of("cuda", parse_rocm_smi(json.dumps(ROCM_SMI))[0])
    assert machine.card is not None and machine.card.name == "MI300X"
    assert machine_of("mps", parse_sysctl(SYSCTL.format(limit=0), "15.5")[0]).card is None


@pytest.mark.parametrize(
    ("text", "device", "rated"), [("MI300X", "cuda", True), ("Arc B580", "xpu", False), ("M2 Max 96GB", "mps", False)]
)
def test_a_machine_to_plan_for_is_of_the_cards_type(text, device, rated):
    machine = machine_with(find_gpu(text))
    assert (machine.device, machine.bfloat16, machine.card is not None) == (device, True, rated)


@pytest.mark.parametrize(
    ("maker", "environment", "shown"),
    [
        ("amd", {}, None),
        ("amd", {"CUDA_VISIBLE_DEVICES": "1"}, "1"),
        ("amd", {"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"}, "0"),
        ("intel", {"ZE_AFFINITY_MASK": "1,0", "CUDA_VISIBLE_DEVICES": "2"}, "1,0"),
        ("apple", {"CUDA_VISIBLE_DEVICES": ""}, None),
    ],
)
def test_each_maker_has_its_own_variables_of_what_is_visible(monkeypatch, maker, environment, shown):
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert visible_names(maker) == shown
    assert not hides_gpus(maker)


def test_visible_gpus_are_in_the_order_in_which_the_environment_names_them():
    gpus = parse_rocm_smi(json.dumps(ROCM_SMI))
    assert select_visible(gpus, None) == select_visible(gpus, "0,1") == gpus
    assert select_visible(gpus, "1, 0") == gpus[::-1]
    assert select_visible(gpus, "GPU-5fd4") == gpus[:1]
    assert select_visible(gpus, "7") == []
