"""Every `auto` of a recipe, settled for one machine and one model, each with its reason."""

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import UserError
from lorakit.plan.facts import ModelFacts
from lorakit.plan.machine import Machine
from lorakit.recipe.kinds import adapter_folder, begins_from, kind_of, trains_all
from lorakit.recipe.schema import Recipe, Spectrum

# The share of a device's memory that saved activations may take; the rest holds weights, buffers and the system.
_ACTIVATION_SHARE = 0.4
# The width of LLaMA-33B, from which on QLoRA halves its rate.
_HIDDEN_33B = 6656
# Exponents of the Tinker cookbook's formula for LoRA's learning rate, by model family.
_RATE_EXPONENT = {"llama": 0.781, "qwen": 0.0775}


@dataclass(frozen=True)
class Choice:
    """A value that lorakit chose where the recipe says `auto`, and why."""

    path: str
    value: Any
    reason: str

    def __str__(self) -> str:
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return f"{self.path}: auto is {value}: {self.reason}"


def settle(
    recipe: Recipe, machine: Machine, facts: ModelFacts | None, longest: int | None = None, sdpa: bool = True
) -> "Settled":
    """The recipe with every `auto` replaced, and the choices made.

    `longest` is the longest example in tokens, where the data has been read; else `data.max_length` stands in.
    `sdpa`: whether the model's family has torch's fused attention. An
    `auto` that hangs on a model which is not on this machine yet stays `auto`, with a choice that says so.

    Raises:
        UserError: a setting cannot work on this machine.
    """
    choices: list[Choice] = []
    model = recipe.model
    _check_layers(recipe.adapter.layers, facts)
    if model.dtype == "auto":
        choices.append(Choice("model.dtype", *_dtype(machine)))
    elif model.dtype == "float16" and not machine.is_gpu:
        raise UserError("model.dtype: float16 needs a GPU; this machine has none. Write auto or float32.")
    if model.attention == "auto":
        if sdpa:
            choices.append(Choice("model.attention", "sdpa", "runs on every device, as fast as any on unpacked rows"))
        else:
            choices.append(Choice("model.attention", "eager", "this family has no sdpa"))
    elif model.attention == "flex_attention" and not machine.is_gpu:
        raise UserError("model.attention: flex_attention trains on a GPU only; this machine has none. Write sdpa.")
    elif model.attention == "flash_attention_2" and not importlib.util.find_spec("flash_attn"):
        raise UserError("model.attention: flash_attention_2 needs the package flash-attn. Install it, or write sdpa.")
    if recipe.data.packing == "auto":
        attention = next((choice.value for choice in choices if choice.path == "model.attention"), model.attention)
        choices.append(Choice("data.packing", *_packing(str(attention))))
    dtype = model.dtype if model.dtype != "auto" else choices[0].value
    choices += _memory_choices(recipe, machine, facts, longest or recipe.data.max_length, dtype)
    if recipe.train.optimizer == "auto":
        choices.append(Choice("train.optimizer", *_optimizer(recipe)))
    elif recipe.train.optimizer.startswith("paged") and not machine.is_gpu:
        raise UserError(
            f"train.optimizer: {recipe.train.optimizer} moves states between a GPU and main memory; this machine has "
            f"no GPU. Write {recipe.train.optimizer.removeprefix('paged-')}."
        )
    if recipe.train.learning_rate == "auto":
        choices.append(Choice("train.learning_rate", *_learning_rate(recipe, facts)))
    return Settled(_replaced(recipe, choices), tuple(choices))


def _check_layers(layers: Any, facts: ModelFacts | None) -> None:
    """Refuse a layer that the model's config does not have, before anything is loaded."""
    if facts is None or facts.layers is None or isinstance(layers, Spectrum) or layers == "all":
        return
    numbers = [int(part) for item in ([layers] if isinstance(layers, str) else layers) for part in str(item).split("-")]
    if max(numbers) >= facts.layers:
        raise UserError(
            f"adapter.layers: {max(numbers)} is no layer of the model: this model has layers 0 to {facts.layers - 1}."
        )


@dataclass(frozen=True)
class Settled:
    """A recipe without `auto`, and what was chosen."""

    recipe: Recipe
    choices: tuple[Choice, ...]


def _replaced(recipe: Recipe, choices: list[Choice]) -> Recipe:
    changed: dict[str, dict[str, Any]] = {}
    for choice in choices:
        section, field = choice.path.split(".")
        changed.setdefault(section, {})[field] = choice.value
    sections = {name: getattr(recipe, name).model_copy(update=values) for name, values in changed.items()}
    return recipe.model_copy(update=sections)


def _dtype(machine: Machine) -> tuple[str, str]:
    if machine.is_gpu:
        if machine.bfloat16:
            return "bfloat16", f"{machine.name} computes in it, and its range needs no loss scaling"
        return "float16", f"{machine.name} is older than bfloat16 arithmetic (compute capability below 8.0)"
    if machine.bfloat16:
        return "bfloat16", "this processor multiplies bfloat16 matrices in tiles (AMX)"
    return "float32", "this processor has no bfloat16 matrix tiles (AMX), without which bfloat16 is slower"


def _packing(attention: str) -> tuple[str, str]:
    if attention == "flash_attention_2":
        return (
            "on",
            "variable-length attention takes rows end to end, without padding and without a mask",
        )
    return "off", f"with {attention} a pack pays a dense mask, and rows batched by length have little padding to save"


def _activation_bytes(facts: ModelFacts, dtype: str) -> int | None:
    """Bytes that one token's saved activations take over all layers, LoRA on all linear layers (Llama, measured)."""
    if facts.layers is None or facts.intermediate_size is None or facts.query_size is None:
        return None
    hidden, ffn, query, kv = facts.hidden_size, facts.intermediate_size, facts.query_size, facts.key_value_size or 0
    if dtype == "float32":
        layer = 16 * hidden + 8 * query + 8 * kv + 16 * ffn
    else:
        layer = 18 * hidden + 6 * query + 4 * kv + 8 * ffn
    return layer * facts.layers


def _memory_choices(
    recipe: Recipe, machine: Machine, facts: ModelFacts | None, longest: int, dtype: str
) -> list[Choice]:
    """micro_batch and gradient_checkpointing: as much as fits without checkpointing, checkpointing when little does."""
    train, choices = recipe.train, []
    token = _activation_bytes(facts, dtype) if facts else None
    budget = machine.memory * _ACTIVATION_SHARE
    where = f"{_ACTIVATION_SHARE:.0%} of {machine.memory / 2**30:.1f} GiB {'on the GPU' if machine.is_gpu else 'free'}"
    checkpoint = train.gradient_checkpointing
    rows = int(budget // (token * longest)) if token else 8
    if checkpoint == "auto":
        checkpoint = token is not None and rows < min(train.batch_size, 4)
        if token is None:
            reason = "the model's sizes are not known here yet"
        else:
            needed = min(train.batch_size, 4) * longest * token / 2**30
            reason = (
                f"the activations of {min(train.batch_size, 4)} rows of {longest} tokens take {needed:.1f} GiB, "
                f"{'over' if checkpoint else 'within'} {where}"
            )
        choices.append(Choice("train.gradient_checkpointing", checkpoint, reason))
    if train.micro_batch == "auto":
        if checkpoint and token and facts and facts.layers:
            token = 2 * facts.hidden_size * facts.layers + token // facts.layers
            rows = int(budget // (token * longest))
        micro = max(1, min(train.batch_size, rows))
        if not token:
            reason = "the model's sizes are not known here yet"
        elif micro == train.batch_size:
            reason = f"the whole batch's activations fit: {micro} x {longest} tokens in {where}"
        else:
            reason = f"{micro} rows of {longest} tokens fill {where}"
        choices.append(Choice("train.micro_batch", micro, reason))
    return choices


def _optimizer(recipe: Recipe) -> tuple[str, str]:
    if trains_all(recipe.adapter):
        return "adamw", "exact states; with adamw-8bit they take a quarter of the memory"
    return "adamw", "an adapter's states are small, and 32 bits keep them exact"


def _learning_rate(recipe: Recipe, facts: ModelFacts | None) -> tuple[float | str, str]:
    if facts is None:
        return "auto", "set when the run starts: it depends on the model's size, and the model is not here yet"
    family = next((name for name in _RATE_EXPONENT if facts.model_type.startswith(name)), None)
    if family is None:
        large = facts.hidden_size >= _HIDDEN_33B
        rate, size = (1e-4, "33B and more") if large else (2e-4, "7B")
        reason = f"QLoRA's rate for {size} (arXiv 2305.14314); no formula is known for {facts.model_type}"
    else:
        exponent = _RATE_EXPONENT[family]
        rate = 5e-4 * (2000 / facts.hidden_size) ** exponent
        reason = f"5e-4 x (2000 / {facts.hidden_size})^{exponent}, the Tinker cookbook's LoRA formula for {family}"
    for share, why in _rate_shares(recipe):
        rate *= share
        reason += f", {why}"
    return float(f"{rate:.2g}"), reason


def _rate_shares(recipe: Recipe) -> Iterator[tuple[float, str]]:
    """What the learning rate is multiplied with for this kind of training, each with its source."""
    source, rated = begins_from(recipe.adapter), kind_of(recipe.adapter).facts.get("rate")
    if source:
        config = json.loads((adapter_folder(Path(source)) / "adapter_config.json").read_text(encoding="utf-8"))
        if config.get("use_rslora"):
            yield config["r"] ** -0.5, f"over sqrt({config['r']}): it is an rslora adapter"
    elif rated:
        yield rated(recipe.adapter)
    if recipe.train.lora_plus is not None:
        yield 0.5, "halved: LoRA+ teaches the B matrices faster (arXiv 2402.12354)"
