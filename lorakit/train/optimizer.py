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
# It pages those of larger tensors only, to the processor's memory (get_state_buffer in the same file).
_LEAST_PAGED = 100_000
# Numbers that share a scale in 8-bit states (its functional.py).
_BLOCK = 256


def share_in_8_bits(model: Any) -> float:
    """The share of the trained numbers whose states bitsandbytes keeps in 8 bits."""
    sizes = [parameter.numel() for parameter in _trained(model)]
    return sum(size for size in sizes if size >= _LEAST_IN_8_BITS) / sum(sizes)


def state_bytes(model: Any, optimizer: str) -> int:
    """What the optimizer's two states of every trained number take on the model's device, from the first step on."""
    total = 0
    for parameter in _trained(model):
        size = parameter.numel()
        if "paged" in optimizer and parameter.is_cuda and size >= _LEAST_PAGED:
            continue
        if optimizer.endswith("8bit") and size >= _LEAST_IN_8_BITS:
            total += 2 * (size + 4 * -(-size // _BLOCK))
        else:
            total += 2 * size * (parameter.element_size() if optimizer == "adamw" else 4)
    return total


def states_do_not_fit(model: Any, optimizer: str, when: str) -> str:
    """The message where memory runs out while the optimizer makes its states."""
    smaller = "" if "8bit" in optimizer else "optimizer: adamw-8bit or paged-adamw-8bit, "
    return (
        f"out of memory {when}: the optimizer's states of {sum(p.numel() for p in _trained(model)):,} trained "
        f"parameters take {state_bytes(model, optimizer) / 2**30:.2f} GiB. Its step cannot be done again in parts. "
        f"Write {smaller}a smaller adapter.rank or fewer adapter.targets; lorakit plan tells what fits."
    )


def _trained(model: Any) -> list[Any]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def with_faster_b(groups: list[dict[str, Any]], model: Any, ratio: float) -> list[dict[str, Any]]:
    """An optimizer's groups with the B matrices in separate groups, whose learning rate is `ratio` times as high.

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
