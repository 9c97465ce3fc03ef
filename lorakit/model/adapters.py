"""Adapter kinds: a recipe's adapter section -> PEFT's configuration. One plain function each."""

from typing import Any

from lorakit.recipe.schema import Adapter
from lorakit.tables import ADAPTERS


def _lora(settings: Adapter, targets: list[str], **special: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
        **special,
    )


@ADAPTERS.register("lora")
def lora(settings: Adapter, targets: list[str]) -> Any:
    """LoRA (Hu et al., arXiv 2106.09685): W + alpha/rank * B A."""
    return _lora(settings, targets)


@ADAPTERS.register("rslora")
def rslora(settings: Adapter, targets: list[str]) -> Any:
    """Rank-stabilized LoRA (Kalajdzievski, arXiv 2312.03732): W + alpha/sqrt(rank) * B A."""
    return _lora(settings, targets, use_rslora=True)
