"""Advice: short notes on what a recipe's numbers suggest, each with its source. None of it is a refusal."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lorakit.amounts import gibibytes, percent
from lorakit.plan.changing import changing
from lorakit.recipe.adapter_kind import adapter_spec, trains_all
from lorakit.recipe.schema import Recipe

_REGRET = "LoRA Without Regret (Schulman and Thinking Machines Lab, 2025)"
_CAPACITY = "Tinker cookbook, LoRA Primer: a parameter a completion token; LoRA Without Regret on capacity"
# Parameters a trained token that a smaller rank has to leave, before it is named.
_AMPLE = 10
# The default, on which the rates of `auto` are tried.
_ALPHA = 32


@dataclass(frozen=True)
class RunFigures:
    """What is known of a run besides its recipe; None where it is not.

    `rows` and `held_out` rows; tokens of the `longest` row, and the share of `overlong` ones; `trained_tokens` of an
    epoch; `parameters` that are trained; `steps` of the run; the `learning_rate` used and the
    `formula_rate` with its reason; `padding`: the share of computed tokens that is padding; `smallest_side` of the
    adapted modules; whether the model `fits_unquantized`, and the run with 32-bit optimizer states (`fits_adamw`).
    `texts`: prompt and answer of a sample of the rows.
    """

    rows: int | None = None
    held_out: int | None = None
    longest: int | None = None
    overlong: float | None = None
    trained_tokens: int | None = None
    parameters: int | None = None
    steps: int | None = None
    learning_rate: float | None = None
    formula_rate: float | None = None
    formula: str = ""
    padding: float | None = None
    smallest_side: int | None = None
    fits_unquantized: bool | None = None
    fits_adamw: bool | None = None
    texts: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Advice:
    """A note: the dotted key that it is about, or `data`; what it says, with the user's own number; who says so."""

    about: str
    text: str
    source: str


def collect_advice(recipe: Recipe, given: RunFigures) -> list[Advice]:
    """Every note that the numbers of a run give rise to, those on the rows first."""
    return [note for find in _NOTES for note in find(recipe, given)]


def _few_rows(recipe: Recipe, given: RunFigures) -> Iterator[Advice]:
    if given.rows and given.rows < 500:
        yield Advice(
            "data.train",
            f"{given.rows:,} rows: enough for a format or a tone, little for a task. 1,000 chosen ones made an "
            "assistant of a 65B model",
            "LIMA (arXiv 2305.11206)",
        )


def _changing(recipe: Recipe, given: RunFigures) -> Iterator[Advice]:
    found = changing(given.texts)
    if len(found) >= 10 and len(found) >= 0.1 * len(given.texts):
        yield Advice(
            "data",
            f"{len(found)} of {len(given.texts)} rows looked at teach prices, dates, versions or addresses that their "
            "prompts do not give. Facts that change belong in retrieval: fine-tuning learns new ones slowly, and makes "
            "the model invent others",
            "arXiv 2312.05934 (retrieval against fine-tuning), 2405.05904 (new knowledge)",
        )


def _held_out(recipe: Recipe, given: RunFigures) -> Iterator[Advice]:
    if recipe.data.eval is None:
        yield Advice(
            "data.eval",
            "no held-out rows: nothing will show whether the adapter is better than the base. Write for example "
            "data.eval: 0.1",
            "docs/evaluation.md",
        )
    elif given.held_out is not None and given.held_out < 150:
        yield Advice(
            "data.eval",
            f"{given.held_out:,} held-out rows: to show a difference of 10 points takes 71 to 385, one of 20 points 32 "
            "to 91",
            "docs/evaluation.md, How many rows a claim needs",
        )


def _lengths(recipe: Recipe, given: RunFigures) -> Iterator[Advice]:
    limit, what = recipe.data.max_length, {"drop": "left out", "truncate": "cut", "split": "split, or left out"}
    if given.overlong and given.overlong > 0.01:
        yield Advice(
            "data.max_length",
            f"{percent(given.overlong)} of the rows are longer than {limit:,} tokens and are "
            f"{what.get(recipe.data.overlong, 'an error')}",
            "the rows; lorakit data shows what other limits would do",
        )
    elif given.longest and limit >= 8 * given.longest:
        yield Advice(
            "data.max_length",
            f"{limit:,} is {limit // given.longest} times the longest row ({given.longest:,} tokens): it cuts nothing, "
            "and costs nothing, since memory goes by the rows",
            "the rows",
        )


def _padding(recipe: Recipe, given: RunFigures) -> Iterator[Advice]:
    if given.padding and given.padding > 0.25 and recipe.data.packing != "on":
        yield Advice(
            "data.packing",
            f"{percent(given.padding)} of the tokens computed are padding. With flash_attention_2 packing saves "
            "nearly all of it; with other attention a mask eats the gain",
            "docs/data.md, Batches and packing",
        )


def _passes(recipe: Recipe, given: RunFigures) -> Iterator[Advice]:
    if not given.steps:
        return
    passes = given.steps * recipe.train.batch_size / given.rows if given.rows else 0
    if passes > 5:
        yield Advice(
            "train.steps" if recipe.train.steps else "train.epochs",
            f"each of {given.rows:,} rows is seen {passes:.1f} times. Up to 4 passes are nearly as good as new rows, "
            "more are worth less and less and are remembered word for word: watch the held-out loss, or set "
            "train.early_stopping",
            "arXiv 2305.16264 (repeated data, in pretraining)",
        )
    if given.steps < 100:
        yield Advice(
            "train.batch_size",
            f"{given.steps:,} steps of {recipe.train.batch_size} rows: aim for 100 at least, by a smaller batch or "
            "more passes",
            "Tinker cookbook, Supervised Learning Hyperparameters",
        )


def _capacity(recipe: Recipe, given: RunFigures) -> Iterator[Advice]:
    if not given.parameters or not given.trained_tokens or trains_all(recipe.adapter):
        return
    rank, tokens = recipe.adapter.rank, given.trained_tokens
    counts = f"{given.parameters:,} trained parameters for {tokens:,} trained tokens"
    enough = max(1, -(-_AMPLE * tokens * rank // given.parameters))
    if given.parameters < tokens:
        yield Advice(
            "adapter.rank",
            f"{counts}: LoRA learns as well as full fine-tuning while it has a parameter a token or more. A higher "
            "rank, or all linear layers, gives more",
            _CAPACITY,
        )
    elif rank >= 32 and enough <= rank // 4:
        yield Advice(
            "adapter.rank",
            f"{counts}: one a token is enough, and rank {enough} has {_AMPLE} a token, in less memory",
            _CAPACITY,
        )


def _rank(recipe: Recipe, given: RunFigures) -> Iterator[Advice]:
    if given.smallest_side and recipe.adapter.rank > given.smallest_side and not trains_all(recipe.adapter):
        yield Advice(
            "adapter.rank",
            f"{recipe.adapter.rank} is more than the smaller side of an adapted module ({given.smallest_side:,}): its "
            "change cannot have a higher rank",
            "LoRA (arXiv 2106.09685), r below both sides",
        )


def _rate(recipe: Recipe, given: RunFigures) -> Iterator[Advice]:
    used, formula = given.learning_rate, given.formula_rate
    if used and formula and not 0.2 <= used / formula <= 5:
        times, side = (used / formula, "above") if used > formula else (formula / used, "below")
        yield Advice("train.learning_rate", f"{used:g} is {times:,.0f} times {side} {formula:g}", given.formula)


def _batch(recipe: Recipe, given: RunFigures) -> Iterator[Advice]:
    if recipe.train.batch_size > 32 and not trains_all(recipe.adapter):
        yield Advice(
            "train.batch_size",
            f"{recipe.train.batch_size} rows a step: LoRA loses more by large batches than full fine-tuning, whatever "
            "the rank: fewer than 32 are recommended",
            _REGRET,
        )


def _alpha(recipe: Recipe, given: RunFigures) -> Iterator[Advice]:
    adapter = recipe.adapter
    if adapter_spec(adapter).name == "lora" and not 1 / 4 <= adapter.alpha / _ALPHA <= 4:
        scale = f"{adapter.alpha:g}/{adapter.rank} = {adapter.alpha / adapter.rank:.3g}"
        yield Advice(
            "adapter.alpha",
            f"the scale is {scale}. To change alpha is about to change the learning rate: the one that auto chooses "
            f"suits alpha {_ALPHA}",
            "LoRA (arXiv 2106.09685), section 4.1",
        )


def _dropout(recipe: Recipe, given: RunFigures) -> Iterator[Advice]:
    if recipe.adapter.dropout and given.steps and given.steps < 500:
        yield Advice(
            "adapter.dropout",
            f"{recipe.adapter.dropout:g} over {given.steps:,} steps: dropout regularizes long training, and slows the "
            "start of a short one",
            "ALLoRA (arXiv 2410.09692)",
        )


def _optimizer(recipe: Recipe, given: RunFigures) -> Iterator[Advice]:
    if recipe.train.optimizer.endswith("8bit") and given.fits_adamw and given.parameters:
        yield Advice(
            "train.optimizer",
            f"{recipe.train.optimizer} saves {gibibytes(6 * given.parameters)} of states on {given.parameters:,} "
            "parameters, and adamw fits too, with exact ones",
            "8-bit Optimizers (arXiv 2110.02861): 2 bytes of state a parameter for 8",
        )


def _quantization(recipe: Recipe, given: RunFigures) -> Iterator[Advice]:
    if recipe.model.quantization != "none" and given.fits_unquantized:
        yield Advice(
            "model.quantization",
            f"the run fits without {recipe.model.quantization}, which rounds the weights, and dequantizes each at each "
            "use",
            "docs/adapters.md, what each pair costs",
        )


_NOTES: tuple[Callable[[Recipe, RunFigures], Iterator[Advice]], ...] = (
    _few_rows,
    _changing,
    _held_out,
    _lengths,
    _padding,
    _passes,
    _capacity,
    _rank,
    _rate,
    _batch,
    _alpha,
    _dropout,
    _optimizer,
    _quantization,
)
