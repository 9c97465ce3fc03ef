"""The rows of a recipe at a glance, of all its sources together."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from lorakit.data.glance.looked import TEXTS, Looked, look
from lorakit.data.glance.sides import keeps_rows, keeps_what_is_said, refuse_empty, sides_of
from lorakit.data.glance.spread import evenly, spread
from lorakit.data.glance.token_counts import Counter, estimate
from lorakit.data.glance.tokenizer_files import counter_of
from lorakit.data.mixture import Mixture
from lorakit.data.sources import sources_of
from lorakit.recipe.schema import Data, Source

# Rows of a source whose tokens are counted. Of held-out rows it is asked only how many there are.
_ROWS, _HELD_OUT_ROWS = 1200, 100
# Lengths that stand for all where there are several sources.
_LENGTHS = 2000


@dataclass(frozen=True)
class Glance:
    """What the rows of a recipe are like.

    `mixture`: the training rows of each source, with `take` and split as expected numbers; `held_out`: the others.
    `lengths`: the tokens of a sample of the training rows, sorted, as `max_length` and `overlong` leave them;
    `longest` of all rows, an estimate where not all were looked at. `overlong`: the share of the sampled rows
    beyond `max_length`. `trained`: the share of the tokens that are trained. `broken`: sampled rows that could not be
    read. `counted`: how tokens were counted, in words; `exact`: all rows were read, by the model's own tokenizer.
    `split_exactly`: `rows` and `held_out` are those of the run. `texts`: prompt and last answer of some rows.
    """

    mixture: Mixture
    held_out: int
    lengths: tuple[int, ...] = field(repr=False)
    longest: int
    overlong: float
    trained: float
    broken: int
    counted: str
    exact: bool
    split_exactly: bool
    texts: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @property
    def rows(self) -> int:
        """Training rows in an epoch on average."""
        return round(self.mixture.per_epoch)

    @property
    def mean(self) -> float:
        """Tokens of a row on average; 0 where no row is left."""
        return fmean(self.lengths) if self.lengths else 0.0


def glance(
    data: Data,
    tokenizer_file: Path | None,
    chat_template: Path | None = None,
    variables: Mapping[str, Any] | None = None,
) -> Glance | None:
    """What the rows of a recipe are like; None where a source is a hub dataset that is not on this machine.

    `tokenizer_file`: the base model's tokenizer.json, where it is here. `chat_template`: the recipe's own.
    `variables`: values of the template's variables.

    Raises:
        UserError: a source cannot be read, or its format cannot be told.
    """
    train = sources_of(data, data.train)
    held_out = [] if data.eval is None or isinstance(data.eval, float) else sources_of(data, data.eval)
    with ThreadPoolExecutor(1) as pool:  # a large tokenizer takes as long to read as the rows
        loading = pool.submit(counter_of, tokenizer_file, chat_template, variables) if tokenizer_file else None
        found = [spread(source) for source in (*train, *held_out)]
        if not all(found):
            return None
        try:
            counter, trouble = (loading.result() if loading else Counter()), ""
        except ValueError:
            counter, trouble = Counter(), "its tokenizer.json cannot be read"
    spreads = [one for one in found if one]
    looked = [look(one, source, data, counter, _ROWS) for one, source in zip(spreads, train, strict=False)]
    others = [
        look(one, source, data, counter, _HELD_OUT_ROWS)
        for one, source in zip(spreads[len(train) :], held_out, strict=True)
    ]
    found_together = _together(looked, others, data, _words(looked, counter, trouble))
    return _split(found_together, looked, others, train, held_out, data)


def _split(
    found: Glance, looked: list[Looked], others: list[Looked], train: list[Source], held_out: list[Source], data: Data
) -> Glance:
    """The same with rows counted as the run counts them, where every row is known.

    Raises:
        UserError: the split or `take` leaves no row.
    """
    every = [one.numbered for one in (*looked, *others)]
    numbered = [rows for rows in every if rows is not None]
    share = data.eval if isinstance(data.eval, float) else None
    if not found.lengths or len(numbered) < len(every) or not keeps_what_is_said(data.clean):
        return found
    sides = sides_of(numbered[: len(train)], train, share)
    refuse_empty(sides, share)
    if held_out:
        sides = replace(sides, held_out=sum(sides_of(numbered[len(train) :], held_out, None).train))
    certain = keeps_rows(data) and not found.broken and (found.exact or 2 * found.longest <= data.max_length)
    mixture = Mixture(sides.train, found.mixture.weights)
    mixture.refuse_extremes()
    return replace(found, mixture=mixture, held_out=sides.held_out, split_exactly=certain)


def _together(looked: list[Looked], others: list[Looked], data: Data, counted: str) -> Glance:
    """The sources as one, each with the weight of its rows."""
    share = data.eval if isinstance(data.eval, float) else 0.0
    rows = sum(one.rows for one in looked)
    lengths: list[int] = []
    for one in looked:
        ordered = sorted(shape.length for shape in one.kept)
        lengths += evenly(ordered, round(_LENGTHS * one.rows / rows)) if len(looked) > 1 and rows else ordered
    tokens = sum(one.rows * fmean([shape.length for shape in one.kept]) for one in looked if one.kept)
    trained = sum(one.rows * fmean([shape.trained for shape in one.kept]) for one in looked if one.kept)
    sampled = sum(one.sampled for one in looked)
    return Glance(
        mixture=Mixture(
            tuple(round(one.examples * (1 - share)) for one in looked), tuple(one.weight for one in looked)
        ),
        held_out=round(sum(one.examples for one in looked) * share + sum(one.examples for one in others)),
        lengths=tuple(sorted(lengths)),
        longest=max((one.longest for one in looked), default=0),
        overlong=sum(one.overlong for one in looked) / max(sampled, 1),
        trained=trained / tokens if tokens else 0.0,
        broken=sum(one.broken for one in looked),
        counted=counted,
        exact=all(one.whole and one.own for one in looked),
        split_exactly=False,
        texts=tuple(evenly([text for one in looked for text in one.texts], TEXTS)),
    )


def _words(looked: list[Looked], counter: Counter, trouble: str) -> str:
    """How the tokens were counted."""
    sampled, total = sum(one.sampled for one in looked), sum(one.found.total for one in looked)
    whole, counted = all(one.whole for one in looked), all(one.found.counted for one in looked)
    about = "" if counted else "about "
    rows = f"all {sampled:,} rows" if whole else f"{sampled:,} of {about}{total:,.0f} rows"
    if all(one.own for one in looked):
        return f"the model's own tokenizer on {rows}"
    if counter.tokenizer is not None:
        trouble = "the model's tokenizer has no chat template"
    characters = sum(len(prompt) + len(answer) for one in looked for prompt, answer in one.texts)
    tokens = sum(estimate(prompt) + estimate(answer) for one in looked for prompt, answer in one.texts)
    ratio = f"at {characters / tokens:.1f} characters a token, " if tokens else ""
    return (
        f"estimated {ratio}±30 %, on {rows}, without a system prompt that the chat template may add: "
        f"{trouble or 'no tokenizer.json of the model is here'}"
    )
