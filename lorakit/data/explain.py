"""One row of a recipe's sources, followed all the way: its examples, or why it is left out."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from lorakit.data.chat_template import ChatTemplate
from lorakit.data.conversations import IGNORED
from lorakit.data.rows import Block, Row
from lorakit.data.sources import open_source
from lorakit.data.worker import Rules, Worker, task_of
from lorakit.errors import UserError
from lorakit.recipe.problem import show_path
from lorakit.recipe.schema import Source


@dataclass(frozen=True)
class RowExplanation:
    """A row's place, each of its examples as (input_ids, labels), and why it has none."""

    where: str
    examples: list[tuple[list[int], list[int]]]
    reasons: list[str]


def explain_row(where: str, sources: Sequence[Source], template: ChatTemplate, rules: Rules) -> RowExplanation:
    """The row at `where`, written as messages write it: `train.jsonl:12`, or `train.parquet row 7`. A UserError where
    there is no such row, or a source cannot be read."""
    place = re.fullmatch(r"(.+?)(:\d+| row \d+)", where)
    wanted = {where, show_path(Path(place[1]).absolute()) + place[2]} if place else {where}
    last = ""
    for source in sources:
        opened = open_source(source)
        for block in opened.blocks:
            for row in block.rows():
                last = row.where
                if row.where in wanted or row.where.endswith(f"/{where}"):
                    return _follow(row, Worker([task_of(opened, template)], replace(rules, broken="drop", share=None)))
    raise UserError(f"--row: no source has a row {where}. Rows are named as in messages: the last one is {last}.")


def _follow(row: Row, worker: Worker) -> RowExplanation:
    result = worker(0, Block("", 0, row, lambda name, first, payload: iter([payload]), 0))
    examples = result.examples.to_pylist() if result.examples is not None else []
    reasons = []
    for reason, (place, *_) in result.reports[0].dropped.first.items():
        case = place.removeprefix(row.where).lstrip(": ")
        reasons.append(f"{reason}: {case}" if case else reason)
    reasons += [f"found: {reason}" for reason in result.reports[0].findings.counts]
    return RowExplanation(row.where, [(example["input_ids"], example["labels"]) for example in examples], reasons)


def decode_by_trained(tokenizer: Any, input_ids: Sequence[int], labels: Sequence[int]) -> list[tuple[str, bool]]:
    """The text of a row in stretches that are trained, or not."""
    pairs = zip(input_ids, labels, strict=True)
    return [
        (tokenizer.decode([token for token, _ in group]), trained)
        for trained, group in groupby(pairs, lambda pair: pair[1] != IGNORED)
    ]
