"""The fused forward with two active adapters and on quantized bases equals PEFT's."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_dora import BASES, IN, One, assert_same, result_and_gradients

from lorakit.model.fused_lora import FUSED_LAYERS, fused_lora


def two_adapters(base: str, dropout: float) -> torch.nn.Module:
    """A layer with a trained adapter and a frozen one beside it, both active, as pissa and olora have them."""
    torch.manual_seed(4)
    model = One(BASES[base](True))
    model.is_loaded_in_8bit = base == "8 bits"
    more = {"fan_in_fan_out": base == "conv1d", "init_lora_weights": False, "target_modules": ["layer"]}
    made = get_peft_model(model, LoraConfig(r=4, lora_alpha=7, lora_dropout=dropout, **more)).train()
    made.add_adapter("initial", LoraConfig(r=3, lora_alpha=5, **more))
    made.base_model.set_adapter(["default", "initial"])
    for name, parameter in made.named_parameters():
        parameter.requires_grad_("default" in name)
    return made


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("base", BASES)
def test_two_active_adapters_give_peft_s_result_and_gradients(base, dropout, monkeypatch):
    model = two_adapters(base, dropout)
    x = torch.randn(2, 5, 64 if base == "4 bits" else IN)
    theirs = result_and_gradients(model, x)
    assert len(theirs) == 4, "output, x, A and B of the trained adapter"
    for kind in FUSED_LAYERS:
        monkeypatch.setattr(kind, "forward", None)  # a layer that falls back to PEFT's forward cannot
    with fused_lora(model):
        mine = result_and_gradients(model, x)
    assert_same(mine, theirs)


def test_the_order_of_the_active_adapters_and_those_a_layer_lacks_are_no_matter():
    model = two_adapters("linear", 0.0)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    x = torch.randn(3, IN)
    for names in (["initial", "default"], ["other"], ["default", "other", "initial"]):
        model.base_model.set_adapter(names)
        with torch.no_grad():
            theirs = model(x)
            with fused_lora(model):
                assert torch.allclose(model(x), theirs, atol=1e-5)


def test_layers_on_quantized_bases_evaluate_as_peft_s():
    for base in ("4 bits", "8 bits"):
        model, x = two_adapters(base, 0.4).eval(), torch.randn(3, 64 if base == "4 bits" else IN)
        theirs = result_and_gradients(model, x)
        with fused_lora(model):
            assert_same(result_and_gradients(model, x), theirs)
