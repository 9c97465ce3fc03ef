"""Optimizers: the recipe's words for them, and LoRA+."""

from typing import Any

# Our words -> transformers' names.
OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw-8bit": "adamw_8bit",
    "paged-adamw": "paged_adamw_32bit",
    "paged-adamw-8bit": "paged_adamw_8bit",
}


# bitsandbytes leaves the states of smaller tensors in 32 bits (its optim/optimizer.py, min_8bit_size).
_LEAST_IN_8_BITS = 4096


def share_in_8_bits(model: Any) -> float:
    """The share of the trained numbers whose states bitsandbytes keeps in 8 bits."""
    sizes = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    return sum(size for size in sizes if size >= _LEAST_IN_8_BITS) / sum(sizes)


def with_faster_b(groups: list[dict[str, Any]], model: Any, ratio: float) -> list[dict[str, Any]]:
    """An optimizer's groups with the B matrices in groups of their own, whose learning rate is `ratio` times as high.

    LoRA+ (Hayou et al., arXiv 2402.12354). DoRA's magnitudes and modules trained whole keep the rate of A: the paper
    says nothing of them.
    """
    fast = {id(parameter) for name, parameter in model.named_parameters() if ".lora_B." in name}
    split = []
    for group in groups:
        b = [parameter for parameter in group["params"] if id(parameter) in fast]
        others = [parameter for parameter in group["params"] if id(parameter) not in fast]
        split += [{**group, "params": others}, {**group, "params": b, "lr": group["lr"] * ratio}]
    return [group for group in split if group["params"]]
