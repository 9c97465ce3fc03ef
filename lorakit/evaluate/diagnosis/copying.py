"""Copies of training rows: answers that parrot training answers, and leaks, rows to score on that were trained on.

Copied answers are found by the hashes of all their runs of eight words. Words are runs of letters and digits,
case aside. In a script without spaces a character stands for a word, and runs are of sixteen, about as much text.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorakit.data.answers import reference_of
from lorakit.data.cleaning.row_stats import RowStats, compute_row_stats
from lorakit.data.filter_and_split import find_leaks
from lorakit.data.rows import Conversation, RowContent, Text
from lorakit.evaluate.diagnosis.finding import Finding
from lorakit.evaluate.metric import compare, mean, wilson
from lorakit.evaluate.rendering import Row
from lorakit.prepare import Prepared
from lorakit.progress import Progress

# Words, or characters of a script without spaces, that have to be the same in a row.
_SPAN, _SPAN_UNSPACED = 8, 16
# A run in more answers than these, and in more than this share of them, belongs to the task and not to a row.
_SHARED, _SHARED_SHARE = 3, 0.01
# An answer is copied where spans cover half of it; or one is this long: 50 tokens, by which Carlini and others (2023,
# "Quantifying Memorization Across Neural Language Models") call a text memorized, are about 40 English words.
_COVERED, _LONG = 0.5, 40
_CASES = 5

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")
_FACTOR = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, which spreads sums over all bits

PARROTING = Finding(
    "parroting",
    unit="share of answers copied from training answers, beyond what is natural",
    threshold=0.05,
    why=f"An answer is copied where spans of {_SPAN} words or more that stand in a few training answers, and neither "
    f"in its prompt nor in its reference, cover half of it, or one span has {_LONG} words. Natural is the share of "
    "the references or of the base model's answers that is copied in the same sense, whichever is larger: it is no "
    "fault if the right answers to a task resemble each other. Flagged where the 95 % interval of the difference "
    "lies above 5 %: one answer in twenty, more than a few stock phrases would give.",
    remedy="Train for fewer steps or epochs (train.early_stopping), with a lower learning rate or rank, or with more "
    "varied rows; look for rows that are repeated many times (lorakit data RECIPE).",
)

LEAK = Finding(
    "leak",
    unit="share of evaluation rows that are training rows too",
    threshold=0.0,
    why="A row leaks where a training row has the same text, or gives the same answer to the same prompt, white "
    "space and case aside. One is enough to be flagged: it is counted, not estimated, and its score means nothing.",
    remedy="Remove these rows from the evaluation data, or from the training rows and train again (data.clean: "
    "{leakage: fix}).",
)


@dataclass(frozen=True, eq=False)
class SpanIndex:
    """Every run of words that some, but not many, of the training answers have. `hashes` uint64 [n], sorted; `answer`
    int32 [n]: the first training answer that has it; `answers`: how many there are."""

    hashes: np.ndarray
    answer: np.ndarray
    answers: int


@dataclass(frozen=True)
class CopiedText:
    """How much of a text is copied: of its `words` those in copied spans (`covered`), and the longest span: how many
    words, its text, and a training answer that has its beginning (-1: nothing is copied)."""

    words: int
    covered: int
    longest: int
    text: str
    answer: int

    @property
    def share(self) -> float:
        return self.covered / self.words if self.words else 0.0

    @property
    def is_copied(self) -> bool:
        return self.longest >= _LONG or (self.covered > 0 and self.share >= _COVERED)


def measure_parroting(
    answers: Sequence[str],
    prompts: Sequence[str],
    references: Sequence[str],
    index: SpanIndex,
    base_answers: Sequence[str] | None = None,
    seed: int = 0,
) -> Finding:
    """How many more answers are copied from the training answers than is natural on the same prompts. `index`:
    `index_spans` of the training answers. Without `base_answers` the references alone say what is natural."""
    if not answers:
        return PARROTING.unmeasured("there are no answers")
    known = [*zip(prompts, references, strict=True)]
    spans = {"references": [find_copied(reference, index, (prompt,)) for prompt, reference in known]}
    for name, texts in (("base", base_answers), ("answers", answers)):
        if texts is not None:
            spans[name] = [find_copied(text, index, of_row) for text, of_row in zip(texts, known, strict=True)]
    shares = {name: mean(np.array([one.is_copied for one in of], float), higher=False) for name, of in spans.items()}
    copies, ours = spans["answers"], shares.pop("answers")
    longest = sorted(((at, one) for at, one in enumerate(copies) if one.covered), key=lambda case: -case[1].longest)
    cases = [
        {"answer": at, "words": one.longest, "share": round(one.share, 3)}  # rows count from 0
        | {"span": one.text, "training answer": one.answer}
        for at, one in longest[:_CASES]
    ]
    details: dict[str, Any] = {
        "rows": len(copies),
        "training answers": index.answers,
        "copied": ours.value,
        "copied words": sum(one.covered for one in copies) / max(1, sum(one.words for one in copies)),
        **{f"copied by {name}": share.value for name, share in shares.items()},
        "cases": cases,
    }
    expected = max(shares.values(), key=lambda measure: measure.value)
    return PARROTING.difference(compare({"": expected}, {"": ours}, seed)[""], details)


def index_spans(answers: Sequence[str]) -> SpanIndex:
    """The index of the training answers. Of 50,000 answers of 100 words it takes about ten seconds and 100 MB."""
    known: dict[str, int] = {}
    every = (split_words(text) for text in answers)
    runs = [np.unique(_hash_runs(words, known, _run_width(words))) for words in every]
    hashes = np.concatenate([*runs, np.empty(0, np.uint64)])
    owner = np.repeat(np.arange(len(answers), dtype=np.int32), [len(run) for run in runs])
    unique, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    rare = counts <= max(_SHARED, _SHARED_SHARE * len(answers))
    return SpanIndex(unique[rare], owner[first[rare]], len(answers))


def find_copied(text: str, index: SpanIndex, known_texts: Sequence[str] = ()) -> CopiedText:
    """What of a text stands in the training answers and not in `known_texts`."""
    words, places = split_words(text), [match.span() for match in _WORD.finditer(text)]
    width = _run_width(words)
    known: dict[str, int] = {}
    runs = _hash_runs(words, known, width)
    nearest = np.minimum(np.searchsorted(index.hashes, runs), max(len(index.hashes) - 1, 0))
    copied = index.hashes[nearest] == runs if len(index.hashes) else np.zeros(len(runs), bool)
    for other in known_texts:
        copied &= ~np.isin(runs, _hash_runs(split_words(other), known, width))
    covered = np.zeros(len(words), bool)
    for start in np.flatnonzero(copied):
        covered[start : start + width] = True
    edges = np.flatnonzero(np.diff(np.concatenate([[0], covered.astype(np.int8), [0]])))
    spans = edges.reshape(-1, 2)
    if not len(spans):
        return CopiedText(len(words), 0, 0, "", -1)
    begin, end = (int(edge) for edge in spans[np.argmax(spans[:, 1] - spans[:, 0])])
    shown = text[places[begin][0] : places[end - 1][1]]
    return CopiedText(len(words), int(covered.sum()), end - begin, shown, int(index.answer[nearest[begin]]))


def split_words(text: str) -> list[str]:
    """The words of a text in lower case, characters of scripts without spaces one by one."""
    return [word.lower() for word in _WORD.findall(text)]


def _run_width(words: Sequence[str]) -> int:
    """How long a run has to be: longer where most words are single characters of a script without spaces."""
    single = sum(len(word) == 1 and word > "\u0dff" for word in words)
    return _SPAN_UNSPACED if 2 * single > len(words) else _SPAN


def _hash_runs(words: Sequence[str], known: dict[str, int], width: int) -> np.ndarray:
    """A hash (uint64) for each run of as many words; `known` keeps the hashes of words seen before."""
    for word in set(words) - known.keys():
        known[word] = zlib.crc32(word.encode("utf-8", "surrogatepass"))
    hashes = np.array([known[word] for word in words], np.uint64)
    last = max(len(hashes) - width + 1, 0)
    rolled = np.full(last, width, np.uint64)
    for place in range(width):
        rolled = (rolled ^ hashes[place : last + place]) * np.uint64(_FACTOR)
        rolled ^= rolled >> np.uint64(29)
    return rolled


def measure_leak(train: RowStats, held_out: RowStats) -> Finding:
    """Which evaluation rows are training rows. Near-duplicates (where both have signatures), and rows whose prompt was
    trained on with another answer, are in the details only: rows of one form may resemble each other."""
    rows = len(held_out.content)
    if not rows:
        return LEAK.unmeasured("there are no rows")
    # find_leaks names the training rows that are held out; with the sides exchanged it names the rows to score.
    leaks, near = (find_leaks(held_out, train, nearly) for nearly in (False, True))
    prompt_trained = (held_out.prompt != 0) & np.isin(held_out.prompt, train.prompt)
    prompt_trained[[leak.row for leak in leaks]] = False
    cases, near_cases = (
        [{"row": one.row, "training row": one.held_out} for one in of[:_CASES]] for of in (leaks, near)
    )
    details: dict[str, Any] = {"rows": rows, "training rows": len(train.content), "leaked": len(leaks), "cases": cases}
    details |= {"same prompt, other answer": int(prompt_trained.sum())}
    details |= {"nearly the same": len(near), "near cases": near_cases}
    return LEAK.measured(len(leaks) / rows, bool(leaks), wilson(len(leaks), rows), details)


def rendered_row_stats(rows: Sequence[Row], prepared: Prepared, progress: Progress, near: bool = True) -> RowStats:
    """The stats of rendered rows, to compare them: the tokens before the answer are the prompt. `near`: whether near
    likeness is compared too."""
    tokenizer, contents = prepared.tokenizer, list[RowContent]()
    with progress.bar("looking for leaks", total=len(rows)) as bar:
        for row in rows:
            bar.advance()
            if row["answer"] < 0:
                contents.append(Text(str(tokenizer.decode(row["input_ids"]))))
                continue
            prompt = str(tokenizer.decode(row["input_ids"][: row["answer"]]))
            answer = reference_of(row, tokenizer, prepared.stop_ids)
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            contents.append(Conversation(turns))
    return compute_row_stats(contents, near, style=False)
