"""Kernels in the place of a model's own code: to the same numbers, and of the model nothing is left changed."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from kernel_doubles import DOUBLES
from model_families import FAMILIES, _of
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lorakit.model.fused_lora import fused_lora
from lorakit.model.kernel_families import KERNEL_FAMILIES, kernel_family
from lorakit.model.kernels import Kernels, use_kernels

# Those of the table that model_families.py does not have.
OTHERS = {
    "ministral": _of("Ministral", head_dim=4, layer_types=["full_attention"] * 2),
    "gemma": _of("Gemma", head_dim=4),
    "olmo3": _of("Olmo3"),
    "exaone4": _of("Exaone4", layer_types=["full_attention"] * 2),
    "hunyuan-v1-dense": _of("HunYuanDenseV1", head_dim=4),
    "glm4": _of("Glm4", head_dim=4),
}
CONFIGS = {name: family.config for name, family in FAMILIES.items()} | OTHERS
COVERED = [name for name, config in CONFIGS.items() if kernel_family(config.get_text_config().model_type)]
IDS = torch.arange(3, 21).reshape(2, 9)


def made(config, dtype=torch.float32):
    """A tiny model whose norms scale, so that an offset or a cast in the wrong place would show."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.to(dtype)


def adapted(model, **options):
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", **options)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def loss_and_gradients(model):
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def assert_same(one, two, tolerance=1e-6):
    assert torch.allclose(one[0], two[0], rtol=tolerance)
    assert one[1].keys() == two[1].keys()
    for name, gradient in one[1].items():
        assert (gradient - two[1][name]).norm() <= tolerance * (1 + gradient.norm()), name


def test_every_family_of_the_table_is_tried_here():
    tried = {CONFIGS[name].get_text_config().model_type for name in COVERED}
    assert tried == set(KERNEL_FAMILIES)


@pytest.mark.parametrize("name", COVERED)
def test_the_table_says_how_each_family_computes(name):
    """With kernels that compute what Liger's do, bit for bit what transformers computes."""
    for dtype in (torch.float32, torch.bfloat16):
        if dtype == torch.bfloat16 and name in ("qwen3-moe", "qwen3-next"):
            continue  # torch's grouped product on a CPU refuses the width of tiny experts in bfloat16
        model = made(CONFIGS[name], dtype)
        with torch.no_grad():
            own = model(IDS, use_cache=False).logits
            with use_kernels(model, DOUBLES) as replaced:
                assert torch.equal(model(IDS, use_cache=False).logits, own)
        family = kernel_family(CONFIGS[name].get_text_config().model_type)
        assert replaced["rms_norm"] >= 2 * model.config.get_text_config().num_hidden_layers
        assert set(family.kernels(on_gpu=True)) >= replaced.keys() >= {"rms_norm", *family.kernels(on_gpu=True)[2:]}


@pytest.mark.parametrize("name", ["gpt2", "stablelm", "cohere", "llama4", "deepseek-v3", "falcon-h1", "gpt-oss"])
def test_other_families_keep_their_own_code(name):
    with use_kernels(made(CONFIGS[name]), DOUBLES) as replaced:
        assert not replaced


def test_nothing_of_the_model_or_of_its_modeling_file_is_left_changed():
    model = adapted(made(CONFIGS["gemma2"]))
    file = sys.modules[type(model.get_base_model().model.layers[0].self_attn).__module__]

    def state():
        return dict(vars(file)), [dict(vars(module)) for module in model.modules()]

    before = state()
    with pytest.raises(RuntimeError, match="in a pass"), use_kernels(model, DOUBLES) as replaced:
        assert replaced == {"rms_norm": 9, "geglu": 2, "rotary": 2}
        assert state() != before
        raise RuntimeError("in a pass")
    assert state() == before


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["norm", "input_layernorm"]}])
def test_adapters_inside_and_trained_norms_get_the_same_gradients(options):
    model = adapted(made(CONFIGS["qwen3"]), **options)
    own = loss_and_gradients(model)
    assert any("norm" in name for name in own[1]) is ("modules_to_save" in options)
    with fused_lora(model), use_kernels(model, DOUBLES):
        assert_same(loss_and_gradients(model), own, 1e-5)


def test_with_gradient_checkpointing_and_4_bits_too(tmp_path):
    made(CONFIGS["llama"]).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model = adapted(model).train()
    own = loss_and_gradients(model)
    with use_kernels(model, DOUBLES) as replaced:
        assert replaced == {"rms_norm": 5, "rotary": 2, "swiglu": 2}
        assert_same(loss_and_gradients(model), own, 1e-5)


def test_a_kernel_alone_may_be_taken():
    with use_kernels(made(CONFIGS["llama"]), Kernels(swiglu=DOUBLES.swiglu)) as replaced:
        assert replaced == {"swiglu": 2}


LIGER = """
import triton_on_cpu
triton_on_cpu.close_gaps()
from test_kernels import CONFIGS, adapted, assert_same, loss_and_gradients, made
from lorakit.model.kernels import Kernels, liger_kernels, use_kernels

liger = liger_kernels()
tried = {"llama": ("rms_norm", "rotary", "swiglu"), "phi3": ("rotary", "swiglu"), "gemma2": ("rms_norm", "geglu")}
for name, kernels in tried.items():
    model = adapted(made(CONFIGS[name]), modules_to_save=["norm"])
    own = loss_and_gradients(model)
    for kernel in kernels:
        with use_kernels(model, Kernels(**{kernel: getattr(liger, kernel)})) as replaced:
            assert replaced[kernel] > 0
            assert_same(loss_and_gradients(model), own, 1e-5)
        print(name, kernel)
"""


def triton_folder() -> str | None:
    """Where Liger-Kernel and Triton are: installed, or beside the packages, where tools/install.sh puts them on a
    machine without a GPU, so that nothing else finds a Triton there."""
    if find_spec("liger_kernel") and find_spec("triton"):
        return ""
    aside = Path(sys.prefix) / "kernels"
    return str(aside) if (aside / "liger_kernel").is_dir() and (aside / "triton").is_dir() else None


@pytest.mark.slow
@pytest.mark.skipif(triton_folder() is None, reason="liger-kernel and triton are not installed (tools/install.sh)")
def test_ligers_kernels_forward_and_backward_in_tritons_interpreter():
    """Liger's own code on CPU tensors, through a whole tiny model; triton_on_cpu.py says what the interpreter lacks."""
    places = [str(Path(__file__).parent), str(Path(__file__).parent.parent), *filter(None, [triton_folder()])]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, "-c", LIGER]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split("\n")[:-1] == [
        "llama rms_norm",
        "llama rotary",
        "llama swiglu",
        "phi3 rotary",
        "phi3 swiglu",
        "gemma2 rms_norm",
        "gemma2 geglu",
    ]
