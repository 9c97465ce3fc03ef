"""What models are asked: the held-out rows, as a tokenizer and its chat template render them."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lorakit.data.dataset import Examples
from lorakit.data.encoded import IGNORED
from lorakit.data.examples import examples_of
from lorakit.data.rendering import ChatTemplate
from lorakit.data.report import SourceReport
from lorakit.errors import UserError
from lorakit.evaluate.generate import decode_answer, until_stop
from lorakit.model.base import Base
from lorakit.model.load import pad_token_id, stop_token_ids, stop_words
from lorakit.progress import Progress
from lorakit.recipe.data_files import is_pattern
from lorakit.recipe.schema import Data

Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class RenderedRows:
    """Rows as one tokenizer renders them.

    A row has input_ids, labels, `answer` (the token index at which its last answer begins, -1 where a text has none),
    `where` and `source` (its number among `sources`). Generated is only an answer to the rows that have one.
    """

    tokenizer: Any
    stop_ids: tuple[int, ...]
    rows: list[Row]
    sources: list[SourceReport]

    @property
    def pad(self) -> int:
        """The token that fills short rows up."""
        return pad_token_id(self.tokenizer)

    @cached_property
    def with_answer(self) -> list[int]:
        """The rows that have an answer, by number."""
        return [number for number, row in enumerate(self.rows) if row["answer"] >= 0]

    @cached_property
    def prompts(self) -> list[list[int]]:
        """What stands before the answer, of each row `with_answer`."""
        return [self.rows[number]["input_ids"][: self.rows[number]["answer"]] for number in self.with_answer]

    @cached_property
    def references(self) -> list[str]:
        """The answer that each row `with_answer` has."""
        return [reference_of(self.rows[number], self.tokenizer, self.stop_ids) for number in self.with_answer]

    @cached_property
    def characters(self) -> list[int]:
        """How many characters of each row are trained."""
        trained = ([token for token in row["labels"][1:] if token != IGNORED] for row in self.rows)
        return [len(self.tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in trained]

    def of(self, rows: Sequence[int]) -> "RenderedRows":
        """The same of some rows alone, in this order."""
        return replace(self, rows=[self.rows[number] for number in rows])

    def same_tokens_as(self, other: "RenderedRows") -> bool:
        """Whether both render every row to the same tokens, of which the same are trained."""
        return [(row["input_ids"], row["labels"]) for row in self.rows] == [
            (row["input_ids"], row["labels"]) for row in other.rows
        ]


def reference_of(row: Row, tokenizer: Any, stop_ids: Sequence[int]) -> str:
    """The text of a row's last answer."""
    return decode_answer(until_stop(row["input_ids"][row["answer"] :], stop_ids), tokenizer)


def rows_of_examples(examples: Examples, tokenizer: Any, stop_ids: Sequence[int]) -> RenderedRows:
    """The rows of prepared examples."""
    return RenderedRows(tokenizer, tuple(stop_ids), list(examples.rows), examples.report.sources)


def render_rows(data: Data, base: Base, template: ChatTemplate, progress: Progress) -> RenderedRows:
    """The held-out rows of a recipe's data section, rendered with a model's own tokenizer and template.

    A section without held-out rows is one whose training rows are meant.

    Raises:
        UserError: they cannot be read or rendered.
    """
    tokenizer = template.tokenizer
    ends = stop_words(base, tokenizer)
    template = replace(template, train_on=data.train_on, system=data.system, stop_words=ends)
    if data.eval is not None and not isinstance(data.eval, float):
        data = data.model_copy(update={"train": data.eval, "eval": None})
    train, held_out = examples_of(data, template, progress)
    examples = held_out or train
    for reason, count in examples.report.dropped.counts.items():
        progress.warn(f"{count:,} rows are left out: {reason} (first: {examples.report.dropped.first[reason][0]})")
    warn_of_problems(examples, progress)
    for note, count in examples.report.notes.items():
        progress.say(f"{count:,} rows: {note}")
    words = examples.report.stop_tokens
    stops = {*stop_token_ids(base, tokenizer), *tokenizer.convert_tokens_to_ids(words)}
    return rows_of_examples(examples, tokenizer, sorted(stops))


def warn_of_problems(examples: Examples, progress: Progress) -> None:
    """Say what the checks of `data.clean` found in the rows."""
    for reason, count in examples.report.findings.counts.items():
        progress.warn(f"held-out: {count:,} x {reason} (first: {examples.report.findings.first[reason][0]})")


def data_section(file: Path, like: Data | None, longest: int) -> Data:
    """The data section for the rows of a file: read as a recipe reads its own, or by what the rows look like.

    `longest`: how many tokens a row may have where no recipe says it.

    Raises:
        UserError: there is no such file.
    """
    if not file.exists() and not is_pattern(file):
        raise UserError(f"--data: {file}: there is no such file.")
    if like is None:
        return Data(train=str(file.absolute()), max_length=longest)
    return like.model_copy(update={"train": str(file.absolute()), "eval": None})


def align_rows(several: Sequence[RenderedRows]) -> tuple[list[RenderedRows], int]:
    """The rows that all of several renderings have, in the order of the first; how many of the first are left out.

    A row is known by its place. One that becomes another number of examples with another template is left out.
    """
    counts = [Counter(row["where"] for row in rendered.rows) for rendered in several]
    places = {place for place, count in counts[0].items() if all(other[place] == count for other in counts)}
    found = []
    order = {place: number for number, place in enumerate(counts[0])}
    for rendered in several:
        by_place: dict[str, list[int]] = defaultdict(list)
        for number, row in enumerate(rendered.rows):
            if row["where"] in places:
                by_place[row["where"]].append(number)
        found.append(
            rendered.of([number for place in sorted(by_place, key=order.__getitem__) for number in by_place[place]])
        )
    return found, len(several[0].rows) - len(found[0].rows)
