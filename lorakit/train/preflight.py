"""Two rows are tried before a run begins: the loss must be the model's own, and reach the adapter."""

from typing import Any

import torch

from lorakit.data.batches import collate, collate_packed
from lorakit.data.conversations import IGNORED
from lorakit.errors import LorakitError, UserError
from lorakit.model.fused_lora import fused_lora
from lorakit.model.loss import EXACT, HALF, full_logits_loss, is_causal, losses_agree, supervised_loss
from lorakit.model.tokenizer import pad_token_id
from lorakit.prepare import Prepared
from lorakit.train.micro_batching import autocast

# Tokens of each row that are tried: enough to tell, and little memory however long the rows are.
_TRIED = 128


def check_loss(model: Any, prepared: Prepared) -> None:
    """Check on two short rows that the loss is that of the model's full logits: families differ in head and body."""
    rows = [_excerpt(row) for row in sorted(prepared.train.rows, key=lambda row: len(row["input_ids"]))[:2]]
    device, pad = next(model.parameters()).device, pad_token_id(prepared.tokenizer)
    batch = {name: tensor.to(device) for name, tensor in collate(rows, pad).items()}
    name, dtype = prepared.base.name, prepared.recipe.model.dtype
    near = EXACT if dtype == "float32" else HALF
    with fused_lora(model), autocast(device, dtype):
        with torch.no_grad():
            loss, count = supervised_loss(model, **batch)
            expected = full_logits_loss(model, **batch)
            if not loss.isfinite():
                remedy = " Or float16 does not hold its numbers: try model.dtype: float32." * (dtype == "float16")
                raise UserError(
                    f"model.base: {name}: the loss of two rows is {loss:g} before the first step. Its weights are "
                    f"damaged: fetch the model again.{remedy}"
                )
            if prepared.recipe.data.packing == "on":
                packed = collate_packed([rows], pad, prepared.recipe.model.attention == "flash_attention_2")
                on_device = {name: tensor.to(device) for name, tensor in packed.items()}
                in_a_pack, _ = supervised_loss(model, attention_mask=None, **on_device)
                if not losses_agree(in_a_pack, loss, count, near):
                    raise UserError(
                        f"data.packing: {name} does not keep packed rows apart: two rows have another loss in one pack "
                        "than alone. Write packing: off."
                    )
        if unreached := _unreached(model, batch):
            raise UserError(
                f"adapter.targets: the loss does not reach {len(unreached)} of the chosen modules, the first is "
                f"{unreached[0]}: the model computes without calling them. Leave them out with adapter.exclude."
            )
        if not is_causal(model, batch["input_ids"][:1], near):
            raise UserError(
                f"model.base: {name} lets earlier tokens see later ones: it is not a causal language model, and its "
                "loss would see the answers."
            )
    if not losses_agree(loss, expected, count, near):
        raise LorakitError(
            f"{name}: the loss at supervised positions is not what this architecture's own logits give. lorakit does "
            "not train it wrongly: please report the model."
        )


def _excerpt(row: dict[str, Any]) -> dict[str, Any]:
    """A row, of a long one the tokens around the first that are trained."""
    first = next((at for at, label in enumerate(row["labels"]) if label != IGNORED), 0)
    begin = max(0, min(first - _TRIED // 2, len(row["input_ids"]) - _TRIED))
    return row | {name: row[name][begin : begin + _TRIED] for name in ("input_ids", "labels")}


def _unreached(model: Any, batch: dict[str, Any]) -> list[str]:
    """The modules whose adapter gets no gradient at all; none for a model without an adapter."""
    if not hasattr(model, "peft_config"):
        return []
    supervised_loss(model, **batch)[0].backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    unreached = [name for name, parameter in trained.items() if parameter.grad is None]
    if not any(parameter.grad is not None and parameter.grad.any() for parameter in trained.values()):
        unreached = list(trained)
    model.zero_grad(set_to_none=True)
    return list(dict.fromkeys(name.removeprefix("base_model.model.").partition(".lora_")[0] for name in unreached))
