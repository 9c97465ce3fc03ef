"""Adapters that plain PEFT makes and saves, of many kinds, with trained weights drawn at random."""

from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from lorakit.model.spec_from_meta import meta_model
from lorakit.model.targets import select_targets, trains_every_weight
from lorakit.recipe.adapter_kind import adapter_spec
from lorakit.recipe.schema import Adapter

_QV = ["q_proj", "v_proj"]


def lora(**more: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": _QV, "task_type": "CAUSAL_LM", **more})


KINDS: dict[str, Any] = {
    "lora": lambda: lora(),
    "rslora": lambda: lora(use_rslora=True),
    "dora": lambda: lora(use_dora=True),
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "pissa of random parts": lambda: lora(init_lora_weights="pissa_niter_2"),
    "olora": lambda: lora(init_lora_weights="olora"),
    "bias all": lambda: lora(bias="all"),
    "bias lora_only": lambda: lora(bias="lora_only"),
    "lora_bias": lambda: lora(lora_bias=True),
    "head": lambda: lora(modules_to_save=["lm_head"]),
    "embeddings": lambda: lora(modules_to_save=["embed_tokens"]),
    "head and embeddings": lambda: lora(modules_to_save=["lm_head", "embed_tokens"]),
    "tied ends": lambda: lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "norms": lambda: lora(modules_to_save=["norm", "input_layernorm"]),
    "tokens": lambda: lora(trainable_token_indices=[3, 5, 7]),
    "lora on embeddings": lambda: lora(target_modules=[*_QV, "embed_tokens"]),
    "lora on the head": lambda: lora(target_modules=[*_QV, "lm_head"]),
    "ia3": lambda: IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "vera": lambda: VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
}
"""PEFT's configurations by what sets them apart."""


def save_peft_adapter(base: Path, folder: Path, config: Any, seed: int = 0, strength: float = 0.1) -> Path:
    """An adapter on the model of a folder, its trained weights changed at random, as PEFT saves it."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    scatter(model, strength)
    model.save_pretrained(folder)
    return folder


def scatter(model: PeftModel, strength: float = 0.1) -> None:
    """Change what is trained."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += strength * torch.randn_like(parameter)


def write_old_layout(
    folder: Path, base: Path, targets: Any, shapes: dict[str, tuple[int, int]], without: str = "", **config: Any
) -> Path:
    """An adapter as an older transformers named its tensors, of layers (path -> out, in), `without` some tensors."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for path, (outer, inner) in shapes.items():
        name = f"base_model.model.{path}"
        tensors[f"{name}.lora_A.weight"] = 0.1 * torch.randn(4, inner, generator=generator)
        tensors[f"{name}.lora_B.weight"] = 0.1 * torch.randn(outer, 4, generator=generator)
    made = lora(target_modules=targets, inference_mode=True, **config)
    made.base_model_name_or_path = str(base)
    made.save_pretrained(str(folder))
    kept = {name: tensor for name, tensor in tensors.items() if not (without and without in name)}
    save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def expert_shapes(experts: str, names: tuple[str, str, str], inner: int, width: int, layers: int = 2, count: int = 4):
    """One LoRA on each matrix of each expert; `names` of the gate, up and down projection."""
    shapes = {}
    for layer in range(layers):
        for expert in range(count):
            stem = f"model.layers.{layer}.{experts}.{expert}"
            gate, up, down = names
            shapes |= {f"{stem}.{gate}": (inner, width), f"{stem}.{up}": (inner, width)}
            shapes[f"{stem}.{down}"] = (width, inner)
    return shapes


def counted_by_peft(config: dict[str, Any], settings: Adapter) -> tuple[int, int]:
    """Trainable and all parameters of the model of a config with a recipe's adapter, by PEFT's own count."""
    model, kind = meta_model(config), adapter_spec(settings)
    targets = select_targets(model, settings)
    with torch.device("meta"):
        adapter = kind.function(settings, targets)
        if adapter is not None:
            trainable, total = get_peft_model(model, adapter).get_nb_trainable_parameters()
            return int(trainable), int(total)
    total = sum(parameter.numel() for parameter in model.parameters())
    named = [*(f"{path}.weight" for path in targets.modules), *targets.experts]
    return total if trains_every_weight(settings) else sum(model.get_parameter(name).numel() for name in named), total
