"""Every `auto` of a recipe, resolved for one machine and one model, each with its reason."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorakit.amounts import counted, gibibytes
from lorakit.data.micro_batches import cut_micro_batches
from lorakit.data.mixture import rows_per_step
from lorakit.errors import UserError
from lorakit.hardware.devices import ONE_DEVICE, Devices
from lorakit.hardware.gpus import slowest_gpu
from lorakit.hardware.machine import Machine, gpu_throughput, has_own_memory
from lorakit.hardware.unsupported import UNSUPPORTED
from lorakit.model.quantization_config import refuse_quantization
from lorakit.plan.attention import check_attention, choose_attention, choose_packing
from lorakit.plan.block_code import check_compile, choose_compile, choose_kernels
from lorakit.plan.memory import SizedRun, memory_budget, size_run
from lorakit.plan.model_info import ModelInfo
from lorakit.plan.runtime import run_workload, training_seconds
from lorakit.recipe.adapter_kind import adapter_folder, adapter_spec, effective_model, initial_adapter, trains_all
from lorakit.recipe.attention import ATTENTIONS
from lorakit.recipe.schema import Recipe
from lorakit.recipe.sharding import sharding_conflicts

# The width of LLaMA-33B, from which on QLoRA halves its rate.
_HIDDEN_33B = 6656
# What `auto` takes of `train.sharding`: DeepSpeed, an extra, only where it is asked for.
_PREFERRED = ("none", "fsdp")
_SHARES_BASE = ("fsdp", "zero-3")
# Steps of 8 rows of 1,000 tokens took a processor as long at 4 rows at once as at 8, at half the memory.
_PROCESSOR_TOKENS = 4096
_BATCH = "train.batch_size"
# Exponents of the Tinker cookbook's formula for LoRA's learning rate, by model family.
_RATE_EXPONENT = {"llama": 0.781, "qwen": 0.0775}


@dataclass(frozen=True)
class Choice:
    """A value that lorakit chose where the recipe says `auto`, or leaves it to another key, and why."""

    path: str
    value: Any
    reason: str

    def __str__(self) -> str:
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return f"{self.path}: {'' if self.path == _BATCH else 'auto is '}{value}: {self.reason}"


def resolve_auto(
    recipe: Recipe,
    machine: Machine,
    info: ModelInfo | None,
    longest: int | None = None,
    attentions: tuple[str, ...] | None = None,
    mean: float | None = None,
    devices: Devices = ONE_DEVICE,
    rows: int | None = None,
) -> tuple[Recipe, tuple[Choice, ...]]:
    """The recipe with every `auto` replaced, and the choices made; a `UserError` where a setting cannot work on this
    machine. An `auto` that depends on a model which is not on this machine yet stays `auto`, with a choice that says
    so.

    `longest` and `mean`: tokens of the longest and of the average row, where they are known; else all rows are as long
    as `data.max_length`. `attentions`: those that the model's family has, by transformers; else as its config tells.
    `devices`: how many like this machine's train together. `rows`: how many are drawn an epoch, where that is known.
    """
    choices: list[Choice] = []
    model = recipe.model
    _refuse_unsupported(recipe, machine)
    check_compile(recipe, machine, devices)

    def choose(path: str, value: Any, reason: str) -> Any:
        choices.append(Choice(path, value, reason))
        return value

    if tokens := recipe.train.batch_tokens:
        rows_a_step = rows_per_step(recipe.train, mean or recipe.data.max_length)
        recipe = with_values(recipe, {_BATCH: rows_a_step})
        if isinstance(recipe.train.micro_batch, int):  # a step may have fewer rows
            recipe = with_values(recipe, {"train.micro_batch": min(recipe.train.micro_batch, rows_a_step)})
        if mean:
            choose(_BATCH, rows_a_step, f"they have {tokens:,} tokens (batch_tokens) at {mean:,.0f} a row on average")
    if info and info.stored:
        refuse_quantization(info.stored, model.base, effective_model(recipe), trains_all(recipe.adapter))
    buffers = info is not None and info.stored is not None and info.stored.quantization in ("gptq", "awq")
    if buffers and devices.count > 1 and recipe.train.sharding in _SHARES_BASE:
        reason = (
            f"the weights of a GPTQ or AWQ checkpoint are buffers, which {recipe.train.sharding} does not share out"
        )
        raise UserError(f"train.sharding: {reason}. Write none or zero-2.")
    dtype, attention = model.dtype, model.attention
    if model.dtype == "auto":
        dtype = choose("model.dtype", *_dtype(machine))
    elif model.dtype == "float16" and not machine.is_gpu:
        raise UserError("model.dtype: float16 needs a GPU; this machine has none. Write auto or float32.")
    family = attentions or (info.attentions if info else tuple(ATTENTIONS))
    if model.attention == "auto":
        word, reason = choose_attention(recipe, machine, dtype, family)
        attention = choose("model.attention", word, reason if attentions or info else f"{reason}, if the family has it")
    else:
        check_attention(model.attention, machine, dtype, family, sure=attentions is not None)
    if recipe.data.packing == "auto":
        choose("data.packing", *choose_packing(attention))
    if recipe.train.optimizer == "auto":
        reason = "an adapter's states are small, and 32 bits keep them exact"
        if trains_all(recipe.adapter):
            reason = "exact states; with adamw-8bit they take a quarter of the memory"
        choose("train.optimizer", "adamw", reason)
    if recipe.train.kernels == "auto":
        choose("train.kernels", *choose_kernels(recipe, dtype, machine, info, devices))
    length = min(longest or recipe.data.max_length, recipe.data.max_length)
    chosen = with_values(recipe, {choice.path: choice.value for choice in choices})
    card = machine.memory if machine.is_gpu else 0
    run = size_run(chosen, info, info.spec, machine.is_gpu, devices, card) if info and info.spec else None
    if chosen.train.sharding == "auto":
        words = [word for word in _PREFERRED if not (buffers and word in _SHARES_BASE)]
        alone = ("none", "one device") if devices.count == 1 else None
        word = choose("train.sharding", *(alone or _choose_sharding(words, chosen, run, machine, length)))
        chosen = with_values(chosen, {"train.sharding": word})
        run = run and replace(run, recipe=chosen)
    for name, value, reason in _choose_micro_batch(chosen, run, machine, length, min(mean or length, length)):
        choose(f"train.{name}", value, reason)
    if recipe.train.compile == "auto":
        chosen = with_values(chosen, {choice.path: choice.value for choice in choices})
        run = run and replace(run, recipe=chosen)
        choose("train.compile", *choose_compile(chosen, machine, run, rows, min(mean or length, length), devices))
    if recipe.train.learning_rate == "auto":
        choose("train.learning_rate", *default_learning_rate(recipe, info))
    values = {choice.path: choice.value for choice in choices}
    values |= {"train.batch_tokens": None} if _BATCH in values else {}
    return with_values(recipe, values), tuple(choices)


def _refuse_unsupported(recipe: Recipe, machine: Machine) -> None:
    """Refuse what torch or bitsandbytes cannot do on this type of GPU."""
    for (device, key, value), unsupported in UNSUPPORTED.items():
        section, name = key.split(".")
        if device == machine.device and getattr(getattr(recipe, section), name) == value:
            reason = f"{value} does not work on {machine.name}: {unsupported.reason}"
            raise UserError(f"{key}: {reason}. Write {unsupported.instead}.")
    if recipe.train.offload_activations and not has_own_memory(machine):
        reason = f"{machine.name} computes in main memory, and there is no other"
        raise UserError(f"train.offload_activations: {reason}. Write false.")


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with other values, by dotted key."""
    for key, value in values.items():
        section, name = key.split(".")
        recipe = recipe.model_copy(update={section: getattr(recipe, section).model_copy(update={name: value})})
    return recipe


def _dtype(machine: Machine) -> tuple[str, str]:
    if machine.device == "mps" and not machine.bfloat16:
        return "float32", "before version 14 macOS has no bfloat16 on the GPU"
    if machine.is_gpu and not machine.bfloat16:
        return "float16", f"{machine.name} is older than bfloat16 arithmetic (compute capability below 8.0)"
    if not machine.bfloat16:
        return "float32", "this processor has no bfloat16 matrix tiles (AMX), without which bfloat16 is slower"
    if machine.is_gpu:
        return "bfloat16", f"{machine.name} computes in it, and its range needs no loss scaling"
    return "bfloat16", "this processor multiplies bfloat16 matrices in tiles (AMX)"


def _choose_micro_batch(
    recipe: Recipe, run: SizedRun | None, machine: Machine, longest: int, mean: float
) -> Iterator[tuple[str, Any, str]]:
    """`gradient_checkpointing` and `micro_batch` where they are `auto`: name, value, and why. The recipe's other
    choices are made; the longest row has to fit, the average one decides the time."""
    checkpointing, micro_batch = recipe.train.gradient_checkpointing, recipe.train.micro_batch
    unknown = "what fits is known when the model is built"
    if checkpointing == "auto":
        checkpointing, reason = _choose_checkpointing(run, machine, longest, mean) if run else (False, unknown)
        yield "gradient_checkpointing", checkpointing, reason
    if micro_batch == "auto" and run:
        yield "micro_batch", *_choose_rows(run, machine, longest, bool(checkpointing))
    elif micro_batch == "auto":
        yield "micro_batch", min(8, recipe.train.batch_size), unknown


def _choose_sharding(
    words: list[str], recipe: Recipe, run: SizedRun | None, machine: Machine, longest: int
) -> tuple[str, str]:
    """The first of the strategies by which the longest row fits, at the least that `auto` may make of the rest: whole
    models come first, which need not be sent about."""
    if run is None:
        return "none", "every device holds the whole base; what fits is known when the model is built"
    train, budget = recipe.train, memory_budget(machine)
    rows = 1 if train.micro_batch == "auto" else min(int(train.micro_batch), run.rows)
    recomputes = train.gradient_checkpointing == "auto" or bool(train.gradient_checkpointing)
    needs: dict[str, int] = {}
    for word in words:
        if not list(sharding_conflicts(recipe, word)):
            sharded = replace(run, recipe=with_values(recipe, {"train.sharding": word}))
            needs[word] = sharded.memory(rows, longest, recomputes).total
            if needs[word] <= budget:
                break
    word = min(needs, key=lambda word: needs[word])
    place, whole = f"{gibibytes(budget)} of {machine.name}", gibibytes(needs["none"])
    if word == "none":
        return word, f"every device holds the whole base: at least {whole}, of {place}"
    parts = gibibytes(needs[word])
    return word, f"with the whole base on every device at least {whole}, of {place}; with a part on each {parts}"


def _choose_checkpointing(run: SizedRun, machine: Machine, longest: int, mean: float) -> tuple[bool, str]:
    """Gradient checkpointing where the rows do not fit without it, or where it is planned to be faster.

    It computes up to half as much again, for which larger micro-batches have to make up. On a GPU the times of both
    decide. A processor recomputes only where not even one row fits without: products take nearly all of its time, and
    a measured speed, another each time, must not decide.
    """
    train, budget = run.recipe.train, memory_budget(machine)
    place = f"{gibibytes(budget)} of {machine.name}"
    least, most = (1, run.rows) if train.micro_batch == "auto" else (int(train.micro_batch),) * 2
    plain = run.largest_micro_batch(longest, False, most, budget)
    if plain < least:
        return True, f"{_takes(run, least, longest, False)} without it, and {place} may be used"
    if plain == most:
        return False, f"{_takes(run, most, longest, False)} without it, which fit into {place}"
    recomputing = run.largest_micro_batch(longest, True, most, budget)
    if recomputing <= plain:
        return False, f"with it no more rows of {longest} tokens would fit into {place} than the {plain} without it"
    if not machine.is_gpu:
        return False, f"{plain} rows fit into {place} without it; more rows give less than computing blocks twice costs"
    # Of a card that is not known, what `lorakit plan --gpu` takes for its memory alone is near enough to compare by.
    card = machine.card or slowest_gpu(machine.memory)
    rates = gpu_throughput(card, run.recipe.model.dtype)
    once, twice = (
        training_seconds(run_workload(run, _micro_batches(run, rows, longest, mean), again, length=mean), rates).likely
        for rows, again in ((plain, False), (recomputing, True))
    )
    source = "" if machine.card else f" at the rates of the {card.name}, for those of this card are not known"
    words = [f"{counted(plain, 'row')} at once without it", f"{counted(recomputing, 'row')} at once with it"]
    faster, slower = reversed(words) if twice < once else words
    factor = min(once, twice) / max(once, twice)
    return twice < once, f"{faster} is planned faster than {slower}: x {factor:.2f}{source}"


def _micro_batches(run: SizedRun, rows: int, longest: int, mean: float) -> float:
    """The micro-batches of a step of rows of average length, with room for so many of the longest."""
    lengths = [round(mean)] * run.rows
    return len(cut_micro_batches(lengths, rows * longest)) * run.devices.count


def _choose_rows(run: SizedRun, machine: Machine, longest: int, checkpointing: bool) -> tuple[int, str]:
    """As many of the longest rows as fit, in even parts of the batch: 16 rows go as 8 + 8, not as 9 + 7. On a processor
    no more than it gains from."""
    budget, most = memory_budget(machine), run.rows
    gains = most if machine.is_gpu else min(most, max(1, _PROCESSOR_TOKENS // longest))
    rows = run.largest_micro_batch(longest, checkpointing, gains, budget)
    even = math.ceil(most / math.ceil(most / rows)) if rows else 1
    place, need = f"{gibibytes(budget)} of {machine.name}", _takes(run, even, longest, checkpointing)
    if rows == 0:
        return even, f"even {need}, more than {place}: lorakit plan says what would fit"
    if rows == most:
        what = "the whole batch" if run.devices.count == 1 else "a device's part of the batch"
        return even, f"{what} fits: {need} of the {place}"
    if rows == gains:
        return even, f"{need}; a processor gains no speed from more than {_PROCESSOR_TOKENS:,} tokens at once"
    return even, f"{need}; at most {rows} rows fit into {place}"


def _takes(run: SizedRun, rows: int, length: int, checkpointing: bool) -> str:
    return f"{rows} x {length} tokens take {gibibytes(run.memory(rows, length, checkpointing).total)}"


def default_learning_rate(recipe: Recipe, info: ModelInfo | None) -> tuple[float | str, str]:
    """The learning rate that suits a recipe on a model, and where it is from; `auto` where the model is not known."""
    if info is None:
        return "auto", "set when the run starts: it depends on the model's size, and the model is not here yet"
    family = next((name for name in _RATE_EXPONENT if info.model_type.startswith(name)), None)
    if family is None:
        large = info.hidden_size >= _HIDDEN_33B
        rate, size = (1e-4, "33B and more") if large else (2e-4, "7B")
        reason = f"QLoRA's rate for {size} (arXiv 2305.14314); no formula is known for {info.model_type}"
    else:
        exponent = _RATE_EXPONENT[family]
        rate = 5e-4 * (2000 / info.hidden_size) ** exponent
        reason = f"5e-4 x (2000 / {info.hidden_size})^{exponent}, the Tinker cookbook's LoRA formula for {family}"
    for share, why in _rate_shares(recipe):
        rate *= share
        reason += f", {why}"
    return float(f"{rate:.2g}"), reason


def _rate_shares(recipe: Recipe) -> Iterator[tuple[float, str]]:
    """What the learning rate is multiplied with for this kind of training, each with its source."""
    source, rated = initial_adapter(recipe.adapter), adapter_spec(recipe.adapter).rate
    if source:
        config = json.loads((adapter_folder(Path(source)) / "adapter_config.json").read_text(encoding="utf-8"))
        if config.get("use_rslora"):
            yield config["r"] ** -0.5, f"over sqrt({config['r']}): it is an rslora adapter"
    elif rated:
        yield rated(recipe.adapter)
    if recipe.train.lora_plus is not None:
        yield 0.5, "halved: LoRA+ teaches the B matrices faster (arXiv 2402.12354)"
