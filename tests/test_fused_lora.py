"""One function a layer: with two active adapters, what it keeps and casts, and what it leaves to PEFT's forward."""

import pytest
import torch
from conftest import TINY_LLAMA
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from test_dora import BASES, IN, OUT, One, assert_same, result_and_gradients
from transformers import LlamaConfig, LlamaForCausalLM

from lorakit.model import dora
from lorakit.model.dora import BUILT_AT_ONCE, row_norms
from lorakit.model.fused_lora import FUSED_LAYERS, describe_unfused, fused_lora
from lorakit.model.lora_function import casts_of_steps
from lorakit.model.peft_adapter import attach_adapter
from lorakit.model.targets import select_targets
from lorakit.plan.memory import DORA_ROWS
from lorakit.recipe.schema import Adapter


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


class Three(torch.nn.Module):
    """Queries, keys and values of one input."""

    def __init__(self):
        super().__init__()
        self.parts = torch.nn.ModuleDict({name: torch.nn.Linear(IN, OUT, bias=False) for name in "qkv"})

    def forward(self, x):
        return sum(part(x) for part in self.parts.values())


def three(dtype: torch.dtype, **settings) -> torch.nn.Module:
    torch.manual_seed(2)
    model = Three().to(dtype)
    return get_peft_model(
        model, LoraConfig(r=4, target_modules=list("qkv"), init_lora_weights=False, **settings)
    ).train()


def saved_storages(model, x, half: bool) -> dict[int, int]:
    """What autograd saves of a pass besides the model's weights: storage -> bytes."""
    own, sizes, alive = {one.untyped_storage().data_ptr() for one in model.parameters()}, {}, []

    def pack(tensor):
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    casting = disable_input_dtype_casting(model, active=half)
    with (
        casting,
        torch.autocast("cpu", torch.bfloat16, half),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        model(x)
    return sizes


@pytest.mark.parametrize(("inputs", "half"), [(torch.float32, False), (torch.bfloat16, True), (torch.float32, True)])
def test_layers_keep_one_copy_of_the_input_that_they_share(inputs, half):
    model, x = three(torch.bfloat16 if half else torch.float32), torch.randn(50, IN).to(inputs).requires_grad_()
    theirs = sum(saved_storages(model, x, half).values())
    with fused_lora(model):
        mine = saved_storages(model, x, half)
    assert list(mine.values()) == [50 * IN * (2 if half else 4)] and sum(mine.values()) < theirs


def test_dropout_keeps_a_byte_a_number_beside_it():
    model, x = three(torch.float32, lora_dropout=0.3), torch.randn(50, IN, requires_grad=True)
    with fused_lora(model):
        mine = saved_storages(model, x, False)
    assert sorted(mine.values()) == [50 * IN] * 3 + [50 * IN * 4]


class PastVersions(torch.optim.Optimizer):
    """Steps as bitsandbytes' optimizers do: torch does not see that the weights change."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.detach().numpy()[:] *= 2


def test_factors_are_cast_once_a_step_and_anew_when_they_have_changed():
    model, x = three(torch.bfloat16), torch.randn(5, IN, dtype=torch.bfloat16)
    optimizer = PastVersions([one for one in model.parameters() if one.requires_grad])
    with torch.autocast("cpu", torch.bfloat16):
        with fused_lora(model), casts_of_steps() as casts:
            factor = next(one for one in model.parameters() if one.requires_grad)
            first = casts.of_factor(factor, torch.bfloat16)
            result_and_gradients(model, x)
            before = model(x)
            assert casts.of_factor(factor, torch.bfloat16) is first
            optimizer.step()
            assert torch.equal(casts.of_factor(factor, torch.bfloat16), 2 * first)
            after = model(x)
        with disable_input_dtype_casting(model):
            assert (after - model(x)).norm() < 0.01 * after.norm()
    assert (after - before).abs().max() > 0.1


def test_contexts_within_one_another_leave_each_its_own():
    model, x = three(torch.float32), torch.randn(5, IN)
    with fused_lora(model):
        outer = [vars(layer).get("forward") for layer in model.modules()]
        with fused_lora(model):
            pass
        assert [vars(layer).get("forward") for layer in model.modules()] == outer
        mine = model(x)
    assert not any("forward" in vars(layer) for layer in model.modules())
    assert torch.allclose(mine, model(x), atol=1e-5)


def test_what_a_layer_gives_may_be_changed_in_place():
    model, x = three(torch.float32), torch.randn(2, 5, IN)
    with fused_lora(model):
        model.get_submodule("base_model.model.parts.q")(x).mul_(2).sum().backward()
    assert model.get_submodule("base_model.model.parts.q").lora_B["default"].weight.grad.any()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, None),
        (
            {"lora_bias": True, "target_modules": ["layer"]},
            "fused LoRA: 0 of 1 layers; 1 through PEFT's forward (bias)",
        ),
        (
            {"target_modules": ["layer", "words", "wide"], "use_dora": True},
            "fused LoRA: 1 of 3 layers; 2 through PEFT's forward (1 embedding, 1 conv1d)",
        ),
    ],
)
def test_layers_that_keep_peft_s_forward_are_counted_with_the_reason(settings, said):
    model = torch.nn.Module()
    model.layer, model.words = torch.nn.Linear(IN, OUT), torch.nn.Embedding(9, IN)
    model.wide = torch.nn.Conv1d(3, 3, 1)
    model.forward = lambda ids: model.layer(model.words(ids))
    made = get_peft_model(
        model, LoraConfig(r=2, **{"target_modules": ["layer"], "init_lora_weights": False} | settings)
    )
    assert describe_unfused(made) == said
    ids = torch.arange(9)
    theirs = made(ids)
    with fused_lora(made):
        assert torch.allclose(made(ids), theirs, atol=1e-5)


def test_a_base_with_hooks_or_trained_weights_keeps_its_own_backward():
    model, x = two_adapters("linear", 0.0), torch.randn(2, 5, IN)
    base = model.base_model.model.layer.base_layer
    seen = []
    base.register_forward_hook(lambda *_: None)
    base.register_full_backward_hook(lambda *_: seen.append(1))
    base.bias.requires_grad_()
    theirs = result_and_gradients(model, x)
    with fused_lora(model):
        assert_same(result_and_gradients(model, x), theirs)
    assert len(theirs) == 5 and len(seen) == 2


def test_a_base_in_half_precision_without_autocast_computes_as_peft_s():
    """So it is evaluated: the adapter's own products stay in float32."""
    model, x = three(torch.bfloat16).eval(), torch.randn(3, IN, dtype=torch.bfloat16)
    with torch.no_grad():
        theirs = model(x)
        with fused_lora(model):
            mine = model(x)
        with torch.inference_mode(), fused_lora(model):
            assert torch.equal(model(x), mine)
    assert mine.dtype == theirs.dtype and torch.allclose(mine.float(), theirs.float(), rtol=0.02, atol=0.02)


def test_the_norms_of_dora_in_half_precision_are_those_of_float32():
    torch.manual_seed(0)
    weight, a, b = torch.randn(70, 90).bfloat16(), torch.randn(4, 90), torch.randn(70, 4)
    true = (weight.double() + 0.5 * b.double() @ a.double()).norm(dim=1)
    norms = row_norms(weight, weight.float().square().sum(1), a, b, 0.5)
    half = (weight + 0.5 * (b.bfloat16() @ a.bfloat16())).norm(dim=1)  # as PEFT takes them under autocast
    assert (norms / true - 1).abs().max() < 1e-6 < 1e-3 < (half / true - 1).abs().max()
    assert BUILT_AT_ONCE == DORA_ROWS  # what the plan counts


def test_norms_of_large_weights_are_taken_in_parts(monkeypatch):
    weight, a, b = torch.randn(70, 90).bfloat16(), torch.randn(4, 90), torch.randn(70, 4)
    whole = row_norms(weight, torch.zeros(70), a, b, 0.5)
    monkeypatch.setattr(dora, "BUILT_AT_ONCE", 900)
    assert torch.allclose(row_norms(weight, torch.zeros(70), a, b, 0.5), whole)


def test_the_rank_that_adalora_divides_by_is_not_trained():
    base = LlamaForCausalLM(LlamaConfig(vocab_size=97, **TINY_LLAMA)).bfloat16().requires_grad_(False)
    settings = Adapter(kind="adalora", rank=4)
    model = attach_adapter(base, settings, 0, select_targets(base, settings))
    trained = {name.split(".")[-2] for name, one in model.named_parameters() if one.requires_grad}
    assert trained == {"lora_A", "lora_B", "lora_E"}
