"""Rows of the format `classification`: the labels that may answer them, to be scored by likelihood."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from lorakit.data.dataset import Examples
from lorakit.evaluate.generate import until_stop
from lorakit.evaluate.rendering import RenderedRows, Row, reference_of

FORMAT = "classification"

# With more different answers than this, rows are no classification but texts.
_MOST_LABELS = 256


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels of one task, as texts and as token ids; the rows that one of them answers.

    `rows` are numbers of the asked rows, `truth` the position of each one's label.
    """

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    rows: list[int]
    truth: list[int]


def labels_of(rendered: RenderedRows, train: Examples | None = None) -> dict[str, Labels]:
    """The labels of each task, by its tag ("" where it has none): all answers that its rows have.

    `train`: training rows, whose answers are labels too. A label's tokens end before the stop token, as lm-eval's do;
    where those of one label begin another's, all have it, else the shorter one could not be told from its beginning.
    """
    found: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    numbers: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rendered.rows):
        source = rendered.sources[row["source"]]
        if source.format == FORMAT and row["answer"] >= 0:
            numbers[source.task or ""].append(number)
    for task, rows in numbers.items():
        found[task] |= _answers((rendered.rows[number] for number in rows), rendered)
        if train is not None:
            found[task] = _answers(_trained(train, task), rendered) | found[task]
    return {
        task: _labels(labels, numbers[task], rendered)
        for task, labels in found.items()
        if 2 <= len(labels) <= _MOST_LABELS and all(labels.values())
    }


def _trained(train: Examples, task: str) -> Iterable[Row]:
    sources = train.report.sources
    wanted = {number for number, one in enumerate(sources) if one.format == FORMAT and (one.task or "") == task}
    return (row for row in train.rows if row["source"] in wanted) if wanted else ()


def _answers(rows: Iterable[Row], rendered: RenderedRows) -> dict[str, tuple[int, ...]]:
    """Each different answer's text and the tokens from its beginning on, those that end it among them."""
    texts: dict[tuple[int, ...], str] = {}
    for row in rows:
        said = tuple(row["input_ids"][row["answer"] :])
        if said not in texts:
            texts[said] = reference_of(row, rendered.tokenizer, rendered.stop_ids)
    return {text: said for said, text in reversed(texts.items())}


def _labels(labels: dict[str, tuple[int, ...]], rows: list[int], rendered: RenderedRows) -> Labels:
    texts = tuple(sorted(labels))
    bare = [tuple(until_stop(list(labels[text]), rendered.stop_ids)) for text in texts]
    begins = any(one != other and other[: len(one)] == one for one in bare for other in bare)
    ended = [labels[text][: len(said) + 1] for text, said in zip(texts, bare, strict=True)]
    truth = [texts.index(reference_of(rendered.rows[row], rendered.tokenizer, rendered.stop_ids)) for row in rows]
    return Labels(texts, tuple(ended if begins else bare), rows, truth)
