"""One source at a glance: how many examples it gives, and how long they are, from a sample of its rows."""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import NormalDist, fmean, pstdev

from lorakit.data.conversations import Conversation, RowContent, Text, Tokens, content_digest, up_to_last_answer
from lorakit.data.formats import parse_record, refuse_rejected_answer
from lorakit.data.glance import sides
from lorakit.data.glance.spread import Spread, evenly
from lorakit.data.glance.token_counts import Counter, Shape, estimate, trained_answers
from lorakit.data.rows import Row, RowError
from lorakit.data.sources import rename_columns
from lorakit.recipe.schema import Data, Source

# Of a source so many characters are counted in tokens: that takes a quarter of a second. The rows that seem the longest
# are counted besides; where others might be longer, the longest is taken to be so much longer.
_CHARACTERS, _LONGEST, _MARGIN, _MOST = 200_000, 32, 1.03, 100_000
# Rows whose texts are kept.
TEXTS = 400


@dataclass(frozen=True)
class Looked:
    """One source: the `examples` that it gives, and the shapes of the sampled ones that are kept.

    `sampled`: rows whose tokens were counted, of them `overlong` beyond max_length. `whole`: they are all rows. `own`:
    they were counted by the model's tokenizer and chat template, not estimated. `numbered`: every usable row by what it
    says, with its examples; None where that is not known of all.
    """

    found: Spread
    weight: float
    examples: float
    kept: list[Shape]
    longest: int
    sampled: int
    overlong: int
    broken: int
    whole: bool
    own: bool
    texts: list[tuple[str, str]]
    numbered: list[sides.Row] | None

    @property
    def rows(self) -> float:
        """Rows in an epoch."""
        return self.examples * self.weight


def look(found: Spread, source: Source, data: Data, counter: Counter, most: int) -> Looked:
    """The sampled rows of a source in numbers, at most `most`."""
    rows = evenly(found.rows, 5 * most)
    saids = [said for row in rows if (said := _said(row, found)) is not None]
    characters = [_characters(said) for said in saids]
    order = sorted(range(len(saids)), key=characters.__getitem__)  # short and long ones in their proportion
    chosen = evenly(order, min(most, max(50, int(_CHARACTERS / max(fmean(characters or [1]), 1)))))
    left = set(range(len(saids))) - set(chosen)
    more = (said for row in found.longest if (said := _said(row, found)) is not None)
    long = heapq.nlargest(_LONGEST, chain((saids[at] for at in left), more), key=_weight)
    shapes = counter.shapes([(said, source.system) for said in (*(saids[at] for at in chosen), *long)], data.train_on)
    sampled, longest = [row for row in shapes[: len(chosen)] if row], shapes[len(chosen) :]
    fitted = {at: _fitted(row, data.max_length, data.overlong) for at, row in zip(chosen, shapes, strict=False) if row}
    kept = [row for row in fitted.values() if row]
    complete = found.whole and len(rows) == len(found.rows)
    whole = complete and len(chosen) == len(saids)
    readable = found.total * len(saids) / max(len(rows), 1) * len(sampled) / max(len(chosen), 1)
    usable = _taken(readable * len(kept) / max(len(sampled), 1), source.take)
    examples = [shape for row in kept for shape in row]
    return Looked(
        found=found,
        weight=source.weight,
        examples=usable * len(examples) / max(len(kept), 1),
        kept=examples,
        longest=_longest(examples, longest, found, whole, data.max_length),
        sampled=len(sampled),
        overlong=sum(any(shape.length > data.max_length for shape in row) for row in sampled),
        broken=len(rows) - len(saids) + len(chosen) - len(sampled),
        whole=whole,
        own=counter.write is not None or (counter.tokenizer is not None and not _talks(saids)),
        texts=[text for said in evenly(saids, TEXTS) if (text := _asked_and_answered(said))],
        numbered=_numbered(saids, fitted, [*sampled, *longest], data.max_length, whole) if complete else None,
    )


def _numbered(
    saids: Sequence[RowContent], fitted: Mapping[int, list[Shape]], shapes: list[list[Shape]], limit: int, whole: bool
) -> list[sides.Row] | None:
    """Every usable row by what it says; None where rows were left uncounted and not all are one example that fits."""
    if whole:
        return [(content_digest(saids[at]), len(examples)) for at, examples in fitted.items() if examples]
    if all(len(row) == 1 and _MARGIN * row[0].length <= limit for row in shapes):
        return [(content_digest(said), 1) for said in saids]
    return None


def _taken(rows: float, take: float | int | None) -> float:
    """The rows that `take` leaves, as an expected number."""
    if take is None:
        return rows
    return rows * take if isinstance(take, float) else min(rows, take)


def _said(row: Row, found: Spread) -> RowContent | None:
    """What a row says; None where it cannot be read."""
    if isinstance(row.record, RowError) or found.opened.format is None:
        return None
    opened = found.opened
    try:
        record = rename_columns(row.record, opened.source.columns or {})
        refuse_rejected_answer(record, opened.flags)
        return up_to_last_answer(parse_record(str(opened.format), opened.settings, record))
    except RowError:
        return None


def _talks(saids: Sequence[RowContent]) -> bool:
    return any(isinstance(said, Conversation) for said in saids)


def _characters(said: RowContent) -> int:
    if isinstance(said, Conversation):
        return sum(len(message["content"]) for message in said.messages)
    return len(said.text) if isinstance(said, Text) else 4 * len(said.input_ids)


def _weight(said: RowContent) -> float:
    """About how long it is: characters alone would put letters before digits, which take more tokens."""
    if isinstance(said, Conversation):
        return sum(estimate(message["content"][:_MOST]) for message in said.messages)
    return estimate(said.text[:_MOST]) if isinstance(said, Text) else len(said.input_ids)


def _asked_and_answered(said: RowContent) -> tuple[str, str] | None:
    if isinstance(said, Tokens):
        return None
    if isinstance(said, Text):
        return "", said.text
    answers = trained_answers(said.messages, "last")
    asked = (
        [message["content"] for message in said.messages[: answers[-1]] if message["role"] == "user"] if answers else []
    )
    return (asked[-1], said.messages[answers[-1]]["content"]) if asked else None


def _fitted(row: Sequence[Shape], limit: int, overlong: str) -> list[Shape]:
    """A row's examples as `data.overlong` leaves them; `error` would stop the run, and leaves none here."""
    within = [shape for shape in row if shape.length <= limit]
    if len(within) == len(row) or overlong in ("drop", "error"):
        return within
    if overlong == "truncate":
        return [cut for shape in row if (cut := _cut(shape, limit))]
    pieces = [piece for shape in row if not shape.ends for piece in _pieces(shape, limit)]
    return pieces or within


def _cut(shape: Shape, limit: int) -> Shape | None:
    if shape.length <= limit:
        return shape
    if not shape.ends:
        return Shape(limit, min(limit, shape.trained))
    turns = [at for at, end in enumerate(shape.ends) if end <= limit]
    return Shape(shape.ends[turns[-1]], shape.trained_by_end[turns[-1]]) if turns else None


def _pieces(shape: Shape, limit: int) -> list[Shape]:
    count = -(-shape.length // limit)
    return [Shape(-(-shape.length // count), shape.trained // count)] * count


def _longest(kept: list[Shape], long: list[list[Shape]], found: Spread, whole: bool, limit: int) -> int:
    """The longest example of all rows: counted where all were, else estimated.

    Of rows that nobody looked at the logarithms of the lengths are taken to be normal, and the longest of so many to
    lie where one set in ten goes beyond.
    """
    most = max((shape.length for shape in kept), default=0)
    if whole:
        return most
    longest = _MARGIN * max([most, *(shape.length for row in long for shape in row)])
    if not found.searched and kept and found.total > 1:
        logs = [math.log(max(shape.length, 1)) for shape in kept]
        longest = max(longest, math.exp(fmean(logs) + pstdev(logs) * NormalDist().inv_cdf(1 - 0.1 / found.total)))
    return max(most, min(math.ceil(longest), limit))
