"""Norms in fewer passes: the models' own result, whatever the family, and only where it is the same."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lorakit.model.rms_norm import fused_norms

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
FAMILIES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "granite",
    "cohere",
]
PLAIN_NORMS = {"cohere"}  # LayerNorm, of its own making


def tiny(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, pad_token_id=0, attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter)).requires_grad_(False)
    return model


def outcome(model, ids):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    return loss.detach(), gradients


def replaced(model):
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_in_fewer_passes_are_the_models_own(family):
    model, ids = tiny(family), torch.arange(24).reshape(2, 12)
    loss, gradients = outcome(model, ids)
    with fused_norms(model):
        assert bool(replaced(model)) == (family not in PLAIN_NORMS)
        other, others = outcome(model, ids)
    assert not replaced(model)
    assert torch.allclose(loss, other, rtol=1e-6)
    for own, ours in zip(gradients, others, strict=True):
        assert torch.allclose(own, ours, rtol=1e-4, atol=1e-6)


def test_a_norm_whose_weight_is_trained_or_that_computes_something_else_keeps_its_forward():
    class Doubled(torch.nn.RMSNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    model = torch.nn.Sequential(torch.nn.RMSNorm(8, eps=1e-6), Doubled(8, eps=1e-6), torch.nn.RMSNorm(8, eps=1e-6))
    model[1:].requires_grad_(False)
    with fused_norms(model):
        assert replaced(model) == ["2"]


def test_other_types_and_autocast_take_the_models_own_forward():
    model, ids = tiny("llama"), torch.arange(12)[None]
    with torch.autocast("cpu", torch.bfloat16):
        own, _ = outcome(model, ids)
        with fused_norms(model):
            ours, _ = outcome(model, ids)
    assert float(own) == float(ours)
    half = model.to(torch.bfloat16)
    with fused_norms(half):
        assert not replaced(half)
