"""A leak: rows to score on that the model was trained on."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lorakit.data.cleaning.row_stats import RowStats, compute_row_stats
from lorakit.data.conversations import Conversation, RowContent, Text
from lorakit.data.filter_and_split import find_leaks
from lorakit.evaluate.diagnosis.finding import Check, Finding
from lorakit.evaluate.intervals import wilson
from lorakit.evaluate.rendering import Row, reference_of
from lorakit.prepare import Prepared
from lorakit.progress import Progress

_CASES = 5
LEAK = Check(
    "leak",
    "share of evaluation rows that are training rows too",
    0.0,
    "A row leaks where a training row has the same text, or gives the same answer to the same prompt, white space and "
    "case aside. One is enough to be flagged: it is counted, not estimated, and its score means nothing.",
    "Remove these rows from the evaluation data, or from the training rows and train again "
    "(data.clean: {leakage: fix}).",
)


def measure_leak(train: RowStats, held_out: RowStats) -> Finding:
    """Which evaluation rows are training rows; near-duplicates are found where both have signatures.

    Near-duplicates, and rows whose prompt alone was trained on with another answer, are in the details only: in data of
    one form, rows that resemble each other may be different rows.
    """
    rows = len(held_out.content)
    if not rows:
        return LEAK.unmeasured("there are no rows")
    # find_leaks names the training rows that are held out; with the sides exchanged it names the rows to score.
    leaks = find_leaks(held_out, train, nearly=False)
    prompt_trained = (held_out.prompt != 0) & np.isin(held_out.prompt, train.prompt)
    prompt_trained[[leak.row for leak in leaks]] = False

    def first_cases(leaks: Sequence[Any]) -> list[dict[str, int]]:
        return [{"row": leak.row, "training row": leak.held_out} for leak in leaks[:_CASES]]

    details: dict[str, Any] = {
        "rows": rows,
        "training rows": len(train.content),
        "leaked": len(leaks),
        "cases": first_cases(leaks),
        "same prompt, other answer": int(prompt_trained.sum()),
    }
    if train.signature is not None and held_out.signature is not None:
        near = find_leaks(held_out, train, nearly=True)
        details |= {"nearly the same": len(near), "near cases": first_cases(near)}
    return LEAK.measured(len(leaks) / rows, bool(leaks), wilson(len(leaks), rows), details)


def rendered_row_stats(rows: Sequence[Row], prepared: Prepared, progress: Progress) -> RowStats:
    """The stats of rendered rows, to compare them: the tokens before the answer are the prompt."""
    tokenizer, contents = prepared.tokenizer, list[RowContent]()
    with progress.bar("looking for leaks", total=len(rows)) as bar:
        for row in rows:
            if row["answer"] < 0:
                contents.append(Text(str(tokenizer.decode(row["input_ids"]))))
            else:
                prompt = str(tokenizer.decode(row["input_ids"][: row["answer"]]))
                answer = reference_of(row, tokenizer, prepared.stop_ids)
                turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
                contents.append(Conversation(turns))
            bar.advance()
    return compute_row_stats(contents, near=True, style=False)
