"""Adapters that plain PEFT makes and saves, of many kinds, with trained weights drawn at random."""

from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM

_QV = ["q_proj", "v_proj"]


def _lora(**more: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": _QV, "task_type": "CAUSAL_LM", **more})


KINDS: dict[str, Any] = {
    "lora": lambda: _lora(),
    "rslora": lambda: _lora(use_rslora=True),
    "dora": lambda: _lora(use_dora=True),
    "pissa": lambda: _lora(init_lora_weights="pissa"),
    "pissa of random parts": lambda: _lora(init_lora_weights="pissa_niter_2"),
    "olora": lambda: _lora(init_lora_weights="olora"),
    "bias all": lambda: _lora(bias="all"),
    "bias lora_only": lambda: _lora(bias="lora_only"),
    "lora_bias": lambda: _lora(lora_bias=True),
    "head": lambda: _lora(modules_to_save=["lm_head"]),
    "embeddings": lambda: _lora(modules_to_save=["embed_tokens"]),
    "head and embeddings": lambda: _lora(modules_to_save=["lm_head", "embed_tokens"]),
    "tied ends": lambda: _lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "norms": lambda: _lora(modules_to_save=["norm", "input_layernorm"]),
    "tokens": lambda: _lora(trainable_token_indices=[3, 5, 7]),
    "lora on embeddings": lambda: _lora(target_modules=[*_QV, "embed_tokens"]),
    "lora on the head": lambda: _lora(target_modules=[*_QV, "lm_head"]),
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
