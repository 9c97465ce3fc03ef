"""What a type of GPU cannot do is refused with what works there, and `auto` never chooses it. Decided from facts alone:
none of these devices is on this machine."""

import bitsandbytes
import pytest
import torch

from lorakit.errors import UserError
from lorakit.hardware.gpus import find_gpu
from lorakit.hardware.machine import Machine, machine_with
from lorakit.hardware.unsupported import UNSUPPORTED
from lorakit.plan.auto import resolve_auto, with_values
from lorakit.recipe.schema import Data, Model, Recipe

MACHINES = {"mps": machine_with(find_gpu("M3 Max 64GB")), "xpu": machine_with(find_gpu("Arc B580"))}


def recipe(**values):
    return with_values(Recipe(model=Model(base="a/b"), data=Data(train="a/b")), values)


@pytest.mark.parametrize("case", UNSUPPORTED, ids=" ".join)
def test_what_a_device_cannot_do_is_refused_and_the_remedy_works(case):
    (device, key, value), unsupported = case, UNSUPPORTED[case]
    with pytest.raises(UserError, match=f"{key}: {value} does not work on .*Write {unsupported.instead}"):
        resolve_auto(recipe(**{key: value}), MACHINES[device], None)
    resolve_auto(recipe(**{key: unsupported.instead}), MACHINES[device], None)


@pytest.mark.parametrize("device", MACHINES)
@pytest.mark.parametrize("quantization", ["none", "q8", "nf4"])
def test_auto_computes_in_bfloat16_without_flash_attention(device, quantization):
    settled, _ = resolve_auto(
        recipe(**{"model.quantization": quantization}), MACHINES[device], None, attentions=("sdpa", "flash_attention_2")
    )
    assert (settled.model.dtype, settled.model.attention, settled.train.optimizer) == ("bfloat16", "sdpa", "adamw")


def test_a_mac_whose_system_has_no_bfloat16_computes_in_float32():
    old = Machine("mps", "Apple M1", 8 << 30, bfloat16=False)
    assert resolve_auto(recipe(), old, None)[0].model.dtype == "float32"


def test_an_amd_card_may_do_what_nvidias_may():
    for key, value in {(key, value) for _, key, value in UNSUPPORTED} - {("model.attention", "flash_attention_2")}:
        resolve_auto(recipe(**{key: value}), machine_with(find_gpu("MI300X")), None)


def test_bitsandbytes_has_no_8_bit_optimizer_for_every_device():
    """Metal has none of its own, so that the table is out of date when there is one for all."""
    assert "mps" in bitsandbytes.supported_torch_devices
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for name, is_there in (("dequantize_4bit", True), ("optimizer_update_8bit_blockwise", False)):
        assert has_kernel(f"bitsandbytes::{name}", "CompositeExplicitAutograd") == is_there
        assert has_kernel(f"bitsandbytes::{name}", "CPU"), "the name of the operator is out of date"
