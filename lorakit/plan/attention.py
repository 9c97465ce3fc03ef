"""Which attention a run takes, and whether it packs rows, by the machine and the family of its model."""

import re

from lorakit.errors import UserError
from lorakit.hardware.machine import Machine
from lorakit.recipe.attention import ATTENTIONS, is_installed
from lorakit.recipe.schema import Recipe

# Attentions that take packs end to end, in the order in which `auto` prefers them, and the cards for the first.
_FLAT = ("flash_attention_3", "flash_attention_2", "varlen")
_HOPPER = ("H100", "H200", "H800", "H20", "GH200")


def check_attention(attention: str, machine: Machine, dtype: str, family: tuple[str, ...], sure: bool) -> None:
    """Refuse an attention that this machine or the model's family does not have. `sure`: whether all of the family's
    are known."""
    other, spec = "sdpa" if "sdpa" in family else "eager", ATTENTIONS[attention]
    if attention == "sdpa" and attention not in family:
        raise UserError("model.attention: transformers has no sdpa for this family. Write auto or eager.")
    if attention == "flex_attention" and not machine.is_gpu:
        raise UserError(f"model.attention: {attention} trains on a GPU only; this machine has none. Write {other}.")
    if attention == "varlen" and sure and attention not in family:
        reason = "varlen is plain softmax attention without dropout, of heads of at most 256, which this family has not"
        raise UserError(f"model.attention: {reason}. Write {other}.")
    if (spec.package and not machine.is_gpu) or (spec.half and machine.is_gpu and not machine.bfloat16):
        missing = f"{attention} needs a GPU with bfloat16, which {machine.name} is not"
        raise UserError(f"model.attention: {missing}. Write {other}.")
    if spec.half and machine.is_gpu and dtype == "float32":
        raise UserError(f"model.attention: {attention} computes in half precision on a GPU. Write {other}.")
    if machine.here and not is_installed(attention):
        needs = f"the package {spec.package}" if spec.package else "torch 2.13 or newer"
        raise UserError(f"model.attention: {attention} needs {needs}. Install it, or write {other}.")


def choose_attention(recipe: Recipe, machine: Machine, dtype: str, attentions: tuple[str, ...]) -> tuple[str, str]:
    """The attention that `auto` is, and why. `attentions`: those of the model's family."""
    # FlashAttention computes in half precision, on cards that have bfloat16 (its README).
    possible = machine.device == "cuda" and machine.bfloat16 and dtype != "float32" and recipe.data.packing != "off"
    for word in _FLAT if possible else ():
        package = ATTENTIONS[word].package
        if word in attentions and _is_for(word, machine) and (is_installed(word) if machine.here else not package):
            whose = f"{package} is installed" if package else "torch has FlashAttention"
            return word, f"{whose}: rows are packed end to end, without padding and without a mask"
    if "sdpa" in attentions:
        return "sdpa", "runs on every device, as fast as any on unpacked rows"
    return "eager", "this family has no sdpa"


def _is_for(attention: str, machine: Machine) -> bool:
    """Whether `auto` takes a flat attention on this GPU: FlashAttention 3 is for Hopper (its README), and torch's own
    is not tried on AMD's."""
    if attention == "flash_attention_3":
        return any(name in machine.name for name in _HOPPER)
    return attention != "varlen" or not re.search(r"AMD|Radeon|Instinct|gfx|\bMI\d|\bRX ", machine.name)


def choose_packing(attention: str) -> tuple[str, str]:
    """Whether `auto` packs rows with an attention, and why."""
    if ATTENTIONS[attention].flat:
        return "on", "variable-length attention takes rows end to end, without padding and without a mask"
    if not ATTENTIONS[attention].dense_mask:
        return "on", f"{attention} leaves out the blocks of tokens that do not see each other"
    return "off", f"with {attention} a pack pays a dense mask, and rows batched by length have little padding to save"
