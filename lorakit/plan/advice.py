"""Advice: short notes on what a recipe's numbers suggest, each with its source. None of it is a refusal."""

import re
import shlex
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lorakit.amounts import counted, duration, gibibytes, percent
from lorakit.data.figures import TO_RETRIEVAL
from lorakit.plan.auto import default_learning_rate, with_values
from lorakit.plan.changes import Change
from lorakit.plan.estimate import Plan, plan_run
from lorakit.plan.model_info import ModelInfo
from lorakit.recipe.adapter_kind import adapter_spec, trains_all

_CAPACITY = "Tinker cookbook, LoRA Primer: a parameter a completion token; LoRA Without Regret on capacity"
# A smaller rank is named only where it still leaves so many parameters a trained token.
_AMPLE = 10
# The default alpha, with which the rates of `auto` are tried.
_ALPHA = 32

# Below so many training rows a prompt may do as well (docs/planning.md, When not to train).
_FEW_ROWS = 500
# Below this share of what so many devices could gain, fewer are named that reach it.
_EFFICIENT = 0.7

# A question whose answer will be another one in a year.
_QUESTION = re.compile(
    r"\b(?:current(?:ly)?|latest|newest|up[- ]to[- ]date|as of (?:now|today)|today'?s?|this (?:week|month|year|quarter)"
    r"|prices?|costs?|fees?|exchange rate|interest rate|discount|in stock|availab(?:le|ility)"
    r"|(?:opening|business|office) hours|phone number|release date|deadline|due date|version number|which version"
    r"|who is (?:the|our) \w*\s?(?:ceo|cto|cfo|president|chancellor|prime minister|chair\w*|head|director|manager))\b",
    re.IGNORECASE,
)
_VALUE = re.compile(
    r"https?://\S+|\b[\w.]+@[\w.]+\b"
    r"|[$€£¥]\s?\d[\d.,]*|\b\d[\d.,]*\s?(?:usd|eur|gbp|dollars?|euros?|pounds?|%)"
    r"|\b(?:19|20)\d\d\b|\b\d{1,2}[./-]\d{1,2}[./-]\d{2,4}\b|\bv?\d+\.\d+(?:\.\d+)*\b"
    r"|\b\d{1,2}:\d\d\b|\b\d{1,2}\s?[ap]\.?m\b|\+?\d[\d ()-]{7,}\d",
    re.IGNORECASE,
)
_NAME = re.compile(r"(?<=\s)[A-Z][\w'-]*|\w*\d\w*")
# From so many prompts on that differ in a name only, they are taken for a table in disguise.
_TABLE_ROWS = 5


@dataclass(frozen=True)
class Advice:
    """A note: the dotted key that it is about, or `data`; what it says, with the user's own number; its source."""

    about: str
    text: str
    source: str


def collect_advice(
    plan: Plan, changes: list[Change], info: ModelInfo, fewer: Sequence[Plan] = (), file: str = "RECIPE"
) -> list[Advice]:
    """Every note that a plan calls for, those on the rows first; `changes`: what would use the memory that is left;
    `fewer`: the same run on one of several devices, on two, on four ...; `file`: the recipe's, as it was given."""
    return [
        *_row_notes(plan, file),
        *_token_notes(plan),
        *_model_notes(plan),
        *_adapter_notes(plan),
        *_training_notes(plan, changes, info),
        *_device_notes(plan, fewer),
    ]


def _row_notes(plan: Plan, file: str) -> Iterator[Advice]:
    rows = plan.rows
    if rows.count and rows.count < _FEW_ROWS:
        text = f"{rows.count:,} rows: enough for a format or a tone, little for a task"
        if plan.recipe.data.eval is not None and any(prompt for prompt, _ in rows.sample):
            command = f"lorakit eval {shlex.quote(file)} --few-shot 5"
            text += f". Measure first what the base does with examples in its prompt: {command}"
        source = "arXiv 2405.00200 (fine-tuning needs more rows than examples in a prompt), 2305.11206 (1,000 rows)"
        yield Advice("data.train", text, source)
    changing = rows_with_changing_facts(rows.sample)
    if rows.figures and rows.figures.is_low:
        source = "arXiv 2312.05934 (retrieval against fine-tuning), 2405.05904 (new knowledge)"
        yield Advice("data", f"{rows.figures}. {TO_RETRIEVAL}", source)
    elif len(changing) >= 10 and len(changing) >= 0.1 * len(rows.sample):
        text = (
            f"{len(changing)} of {len(rows.sample)} rows of a sample teach prices, dates, versions or addresses that "
            "their prompts do not give. Facts that change belong in retrieval: fine-tuning learns new ones slowly, and "
            "makes the model invent others"
        )
        yield Advice("data", text, "arXiv 2312.05934 (retrieval against fine-tuning), 2405.05904 (new knowledge)")
    if plan.recipe.data.eval is None:
        text = "no held-out rows: nothing will show whether the adapter is better than the base. Write data.eval: 0.1"
        yield Advice("data.eval", text, "docs/evaluation.md")
    elif rows.count and rows.held_out < 150:
        few = f"{rows.held_out:,} held-out rows"
        text = f"{few}: to show a difference of 10 points takes 71 to 385, one of 20 points 32 to 91"
        yield Advice("data.eval", text, "docs/evaluation.md, How many rows a claim needs")


def _model_notes(plan: Plan) -> Iterator[Advice]:
    if plan.spec.untraced:
        reason = f"the code of this family cannot be followed ({plan.spec.untraced})"
        text = f"memory is within {percent(plan.error)}: {reason}"
        yield Advice("model.base", text, "docs/planning.md, Families without a formula")


def _token_notes(plan: Plan) -> Iterator[Advice]:
    rows, data = plan.rows, plan.recipe.data
    limit, fates = data.max_length, {"drop": "left out", "truncate": "cut", "split": "split, or left out"}
    if rows.overlong > 0.01:
        fate = fates.get(data.overlong, "an error")
        text = f"{percent(rows.overlong)} of the rows are longer than {limit:,} tokens and are {fate}"
        yield Advice("data.max_length", text, "the rows; lorakit data shows what other limits would do")
    elif rows.lengths and limit >= 8 * rows.longest:
        times = f"{limit // rows.longest} times the longest row ({rows.longest:,} tokens)"
        text = f"{limit:,} is {times}: it cuts nothing, and costs nothing, since memory goes by the rows"
        yield Advice("data.max_length", text, "the rows")
    if plan.padding > 0.25 and data.packing != "on":
        text = (
            f"{percent(plan.padding)} of the tokens computed are padding. With varlen or flash_attention_2 packing "
            "saves nearly all of it; with eager and sdpa a mask eats the gain"
        )
        yield Advice("data.packing", text, "docs/data.md, Batches and packing")


def _adapter_notes(plan: Plan) -> Iterator[Advice]:
    adapter, rows, parameters = plan.recipe.adapter, plan.rows, plan.trainable.trained
    if trains_all(adapter):
        return
    tokens = round((rows.count or 0) * rows.mean * rows.trained) if rows.lengths else 0
    if parameters and tokens:
        counts = f"{parameters:,} trained parameters for {tokens:,} trained tokens"
        enough = max(1, -(-_AMPLE * tokens * adapter.rank // parameters))
        if parameters < tokens:
            text = "LoRA learns as well as full fine-tuning while it has a parameter a token or more. A higher rank, or"
            yield Advice("adapter.rank", f"{counts}: {text} all linear layers, gives more", _CAPACITY)
        elif adapter.rank >= 32 and enough <= adapter.rank // 4:
            text = f"one a token is enough, and rank {enough} has {_AMPLE} a token, in less memory"
            yield Advice("adapter.rank", f"{counts}: {text}", _CAPACITY)
    adapted = [weight for weight in plan.spec.weights if weight.path in plan.trainable.ranks]
    smallest = min((min(weight.outer, weight.inner) for weight in adapted), default=adapter.rank)
    if adapter.rank > smallest:
        side = f"the smaller side of an adapted module ({smallest:,})"
        text = f"{adapter.rank} is more than {side}: its change cannot have a higher rank"
        yield Advice("adapter.rank", text, "LoRA (arXiv 2106.09685), r below both sides")
    if adapter_spec(adapter).name == "lora" and not 1 / 4 <= adapter.alpha / _ALPHA <= 4:
        text = (
            f"the scale is {adapter.alpha:g}/{adapter.rank} = {adapter.alpha / adapter.rank:.3g}. To change alpha is "
            f"about to change the learning rate: the one that auto chooses suits alpha {_ALPHA}"
        )
        yield Advice("adapter.alpha", text, "LoRA (arXiv 2106.09685), section 4.1")
    if adapter.dropout and plan.steps and plan.steps < 500:
        over = f"{adapter.dropout:g} over {plan.steps:,} steps"
        text = f"{over}: dropout regularizes long training, and slows the start of a short one"
        yield Advice("adapter.dropout", text, "ALLoRA (arXiv 2410.09692)")


def _training_notes(plan: Plan, changes: list[Change], info: ModelInfo) -> Iterator[Advice]:
    recipe, rows, steps, train = plan.recipe, plan.rows.count, plan.steps, plan.recipe.train
    passes = steps * train.batch_size / rows if steps and rows else 0
    if passes > 5:
        text = (
            f"each of {rows:,} rows is seen {passes:.1f} times. Up to 4 passes are nearly as good as new rows, "
            "more are worth less and less and are remembered word for word: watch the held-out loss, or set "
            "train.early_stopping"
        )
        key = "train.steps" if train.steps else "train.epochs"
        yield Advice(key, text, "arXiv 2305.16264 (repeated data, in pretraining)")
    if steps and steps < 100:
        text = f"{steps:,} steps of {train.batch_size} rows: aim for 100 at least, by a smaller batch or more passes"
        yield Advice("train.batch_size", text, "Tinker cookbook, Supervised Learning Hyperparameters")
    formula, source = default_learning_rate(recipe, info)
    used, formula = float(train.learning_rate), float(formula)
    if not 0.2 <= used / formula <= 5:
        times, side = (used / formula, "above") if used > formula else (formula / used, "below")
        yield Advice("train.learning_rate", f"{used:g} is {times:,.0f} times {side} {formula:g}", source)
    if train.batch_size > 32 and not trains_all(recipe.adapter):
        loses = "LoRA loses more by large batches than full fine-tuning, whatever the rank"
        text = f"{train.batch_size} rows a step: {loses}: fewer than 32 are recommended"
        yield Advice("train.batch_size", text, "LoRA Without Regret (Schulman and Thinking Machines Lab, 2025)")
    exact = with_values(plan.requested, {"train.optimizer": "adamw"})
    if (
        train.optimizer.endswith("8bit")
        and plan_run(exact, info, plan.rows, plan.machine, devices=plan.devices).fits == "yes"
    ):
        parameters = plan.trainable.trained
        saves = f"saves {gibibytes(6 * parameters)} of states on {parameters:,} parameters"
        text = f"{train.optimizer} {saves}, and adamw fits too, with exact ones"
        yield Advice("train.optimizer", text, "8-bit Optimizers (arXiv 2110.02861): 2 bytes of state a parameter for 8")
    larger = {step.key for change in changes for step in change.steps} if plan.fits == "yes" else set()
    if recipe.model.quantization != "none" and "model.quantization" in larger:
        without = f"the run fits without {recipe.model.quantization}"
        text = f"{without}, which rounds the weights, and dequantizes each at each use"
        yield Advice("model.quantization", text, "docs/adapters.md, what each pair costs")


def rows_with_changing_facts(texts: Sequence[tuple[str, str]]) -> list[int]:
    """Positions of those (prompt, answer) that teach a value which the prompt does not give and which will change.
    Either the prompt asks for something that changes, or five prompts or more differ only in a name and each has
    another value. A heuristic for English; values that are in the prompt (extraction, arithmetic) do not count."""
    values = [{value for value in _VALUE.findall(answer) if value not in prompt} for prompt, answer in texts]
    patterns = [_without_names(prompt) for prompt, _ in texts]
    given: dict[str, list[str]] = defaultdict(list)
    for pattern, own in zip(patterns, values, strict=True):
        if pattern and own:
            given[pattern].append(" ".join(sorted(own)))
    tables = {name for name, every in given.items() if len(every) >= _TABLE_ROWS and 2 * len(set(every)) > len(every)}
    changing = (own and (_QUESTION.search(texts[at][0]) or patterns[at] in tables) for at, own in enumerate(values))
    return [at for at, changes in enumerate(changing) if changes]


def _without_names(prompt: str) -> str:
    """A short prompt with its names taken out; empty where it has none, or has numbers, or is long."""
    if len(prompt) > 300 or re.search(r"\d", prompt):
        return ""
    pattern, names = _NAME.subn("_", prompt)
    return pattern if names else ""


def _device_notes(plan: Plan, fewer: Sequence[Plan]) -> Iterator[Advice]:
    """Where some of several devices have nothing to do, or fewer would do nearly as well."""
    count, batch, source = plan.devices.count, plan.recipe.train.batch_size, "docs/planning.md, Several devices"
    if batch < count:
        text = f"a step of {counted(batch, 'row')} leaves {count - batch} of {count} devices without one"
        yield Advice("train.batch_size", text, source)
    elif batch % count:
        text = f"{batch} rows a step on {count} devices: some have {-(-batch // count)} and the others wait"
        yield Advice("train.batch_size", f"{text}. A multiple of {count} gives each as many", source)
    alone = next((one.time for one in fewer), None)
    if not (alone and plan.time) or alone.likely / plan.time.likely >= _EFFICIENT * count:
        return
    gained = f"{count} devices are {alone.likely / plan.time.likely:.1f} times as fast as one"
    for other in fewer:
        number = other.devices.count
        if other.fits == "yes" and other.time and alone.likely / other.time.likely >= _EFFICIENT * number:
            device_hours = number * other.time.likely / (count * plan.time.likely)
            which = "one device takes" if number == 1 else f"{number} devices take"
            text = f"{which} {duration(other.time.likely)} instead of {duration(plan.time.likely)}, for "
            yield Advice("devices", f"{gained}; {text}{percent(device_hours)} of the device hours", source)
            return
