"""`tokens`: examples that were made elsewhere."""

from collections.abc import Mapping
from typing import Any

from lorakit.data.formats.columns import expect, filled_column, is_empty
from lorakit.data.rows import IGNORED, RowError, Tokens
from lorakit.recipe.problem import one_line
from lorakit.registry import FORMATS

_MASKS = ("completion_mask", "assistant_masks")


@FORMATS.register("tokens", columns=("input_ids",), optional=("labels", "attention_mask", *_MASKS), conversations=False)
def tokens(record: Mapping[str, Any]) -> Tokens:
    """`input_ids` of this model's tokenizer, and `labels`: -100 where not trained (without labels all are trained)."""
    ids = _numbers(record, "input_ids")
    if ids and min(ids) < 0:
        raise RowError("a token id is below 0", f"it is {min(ids)}")
    labels = _labels(record, ids)
    if not is_empty(record.get("attention_mask")):
        mask = _mask(record, "attention_mask", ids)
        if 1 not in mask:
            raise RowError("the column 'attention_mask' hides every token")
        start, end = mask.index(1), len(mask) - mask[::-1].index(1)
        if 0 in mask[start:end]:
            raise RowError("the column 'attention_mask' hides tokens in the middle", f"token {mask.index(0, start)}")
        if labels is not None and any(label != IGNORED for label in (*labels[:start], *labels[end:])):
            raise RowError("the column 'attention_mask' hides tokens that are trained")
        ids, labels = ids[start:end], labels and labels[start:end]
    labels = list(ids) if labels is None else labels
    # The first token has nothing before it that would predict it.
    if all(label == IGNORED for label in labels[1:]):
        raise RowError("no token after the first is trained")
    return Tokens(ids, labels)


def _labels(record: Mapping[str, Any], ids: list[int]) -> list[int] | None:
    """The labels, from `labels` or from a mask; None where there is neither."""
    mask, has_labels = filled_column(record, _MASKS), not is_empty(record.get("labels"))
    if not is_empty(record.get(mask)):
        if has_labels:
            raise RowError(f"the row says in two columns what is trained, 'labels' and {mask!r}")
        trained = _mask(record, mask, ids)
        return [token if bit else IGNORED for token, bit in zip(ids, trained, strict=True)]
    if not has_labels:
        return None
    labels = _numbers(record, "labels", like=ids)
    wrong = [at for at, label in enumerate(labels) if label != IGNORED and label != ids[at]]
    if wrong:
        reason = "a label is neither -100 nor the token at its place: something else would be trained"
        raise RowError(reason, f"token {wrong[0]} is {ids[wrong[0]]}, its label {labels[wrong[0]]}")
    return labels


def _mask(record: Mapping[str, Any], column: str, ids: list[int]) -> list[int]:
    values = _numbers(record, column, like=ids)
    if not {0, 1}.issuperset(values):
        raise RowError(f"the column {column!r} has other numbers than 0 and 1")
    return values


def _numbers(record: Mapping[str, Any], column: str, like: list[int] | None = None) -> list[int]:
    values = record.get(column)
    if values is None:
        raise RowError(f"the column {column!r} is missing or null")
    reason = f"the column {column!r} is not a list of whole numbers"
    if {*map(type, expect(values, list, reason, "it is"))} - {int}:
        position = next(position for position, value in enumerate(values) if type(value) is not int)
        raise RowError(reason, f"number {position} is {one_line(repr(values[position]))}")
    if like is not None and len(values) != len(like):
        reason = f"the column {column!r} does not have as many numbers as 'input_ids'"
        raise RowError(reason, f"{len(values)}, {len(like)}")
    return values
