"""A GPU is found by any of its names or by its memory, and its rates are those of its maker."""

import pytest

from lorakit.errors import UserError
from lorakit.hardware.gpus import GPUS, find_gpu, match_gpu

GIB = 2**30


@pytest.mark.parametrize("text", ["RTX 4090", "4090", "rtx-4090", "GeForce RTX 4090", "NVIDIA GeForce RTX 4090"])
def test_one_card_has_many_names(text):
    assert find_gpu(text).name == "RTX 4090"


@pytest.mark.parametrize(
    ("shown", "name"),
    [
        ("Tesla T4", "T4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell"),
        ("NVIDIA GeForce RTX 3060", "RTX 3060 12GB"),
        ("Tesla V100-SXM2-16GB", "V100 16GB"),
    ],
)
def test_what_nvidia_smi_prints_is_understood(shown, name):
    assert find_gpu(shown).name == name
    assert match_gpu(shown, find_gpu(name).memory) == find_gpu(name)


def test_every_device_is_found_by_its_own_name():
    assert [find_gpu(device.name) for device in GPUS] == list(GPUS)
    assert len({device.name for device in GPUS}) == len(GPUS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("A100", "A100 40GB, A100 80GB"),
        ("h100", "H100 PCIe, H100 SXM, H100 NVL"),
        ("V100", "V100 16GB, V100 32GB"),
    ],
)
def test_a_name_of_several_cards_asks_which(text, said):
    with pytest.raises(UserError, match=f"more than one GPU. Write one of: {said}"):
        find_gpu(text)


def test_an_unknown_name_says_which_is_near():
    with pytest.raises(UserError, match=r"'RTX 4099' is not a known GPU.* Did you mean RTX 4090\?"):
        find_gpu("RTX 4099")


@pytest.mark.parametrize("text", ["RTX 4090 Laptop GPU", "a fast one", ""])
def test_an_unknown_name_asks_for_the_memory(text):
    with pytest.raises(UserError, match="another card write its memory: 24GB"):
        find_gpu(text)


@pytest.mark.parametrize("text", ["24GB", "24 GiB", "24g", "24 gb", "24000MB", "24576 MiB", "0.024TB"])
def test_memory_alone_is_a_card_as_slow_as_the_slowest_of_that_size(text):
    device = find_gpu(text)
    assert device.memory == 24 * GIB
    assert device.float16 == min(find_gpu(name).float16 for name in ("A10G", "RTX 3090", "L4", "RTX 4090"))
    assert "the slowest known card" in device.source and "A10G" in device.source
    assert device.bfloat16, "a card of this size has bfloat16, though an old one may not"


@pytest.mark.parametrize("text", ["0GB", "9999GB"])
def test_a_memory_that_no_gpu_has_is_refused(text):
    with pytest.raises(UserError, match="is not a memory size"):
        find_gpu(text)


def test_a_card_of_this_machine_keeps_the_memory_it_shows():
    device = match_gpu("NVIDIA GeForce RTX 4090", 24217 << 20)
    assert device is not None and (device.name, device.memory) == ("RTX 4090", 24217 << 20)
    assert match_gpu("NVIDIA GeForce RTX 4090", 48 * GIB) is None, "a rebuilt card is another one"
    assert match_gpu("AMD Instinct MI100", 32 * GIB) is None


@pytest.mark.parametrize(
    ("name", "tensor", "float32"),
    # TFLOP/s with float32 accumulation, dense, as NVIDIA's white papers and data sheets print them.
    [
        ("RTX 3090", 71, 35.6),
        ("RTX 4080", 97.5, 48.7),
        ("RTX 4090", 165.2, 82.6),
        ("RTX 5090", 209.5, 104.8),
        ("RTX A5000", 111.1, 27.8),
        ("RTX A6000", 154.8, 38.7),
        ("RTX 6000 Ada", 364.25, 91.1),
    ],
)
def test_rates_computed_from_the_clock_are_those_that_are_printed(name, tensor, float32):
    device = find_gpu(name)
    assert device.float16 / 1e12 == pytest.approx(tensor, rel=0.005)
    assert device.float32 / 1e12 == pytest.approx(float32, rel=0.005)


def test_no_rate_is_a_sparse_one_or_out_of_order():
    for device in GPUS:
        assert device.source
        assert 1e11 < device.bandwidth < 1e13 and 5 * GIB < device.memory < 300 * GIB
        assert device.float32 < device.float16 < 2.5e15, device.name
        assert (device.bfloat16 is None) == (0 < device.capability < 8.0), device.name
        assert device.bfloat16 in (None, device.float16), device.name


@pytest.mark.parametrize(
    ("shown", "name"),
    [
        ("AMD Instinct MI300X", "MI300X"),
        ("AMD Instinct MI300X VF", "MI300X"),
        ("AMD Instinct MI210", "MI210"),
        ("AMD INSTINCT MI250 (MCM) OAM AC MBA", "MI250 (one die)"),
        ("AMD Radeon RX 7900 XTX", "RX 7900 XTX"),
        ("7900 XTX", "RX 7900 XTX"),
        ("Intel(R) Arc(TM) A770 Graphics", "Arc A770 16GB"),
        ("B580", "Arc B580"),
        ("Intel(R) Data Center GPU Max 1550", "Max 1550 (one stack)"),
    ],
)
def test_cards_of_other_makers_are_found_by_what_their_drivers_print(shown, name):
    assert find_gpu(shown).name == name


@pytest.mark.parametrize("text", ["M3 Max 64GB", "Apple M3 Max, 64 GB", "m3 max 64g"])
def test_an_apple_chip_has_what_metal_leaves_of_its_memory_and_no_rates(text):
    chip = find_gpu(text)
    assert (chip.name, chip.device) == ("Apple M3 Max 64GB", "mps")
    assert 42 * GIB < chip.memory < 43 * GIB
    assert chip.float16 == 0 and "publishes no rates" in chip.source


@pytest.mark.parametrize("text", ["M4", "apple m2 ultra", "M4 Pro 0GB", "M4 Pro 2048GB"])
def test_an_apple_chip_without_a_memory_asks_for_it(text):
    with pytest.raises(UserError, match=r"different memory. Write it too: M\d( \w+)? 64GB"):
        find_gpu(text)


def test_half_of_what_amd_prints_is_planned_for_a_card_of_two_devices():
    for name, board in (("MI250", 362.1e12), ("MI250X", 383.0e12)):
        assert find_gpu(name).bfloat16 == pytest.approx(board / 2)
        assert find_gpu(name).memory == pytest.approx(64 * GIB, rel=0.001)
