"""Spans of words that texts share with training answers, found by the hashes of all their runs of eight words.

Words are runs of letters and digits, case aside. In a script without spaces a character stands for a word, and runs are
of sixteen, which is about as much text.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SPAN, SPAN_UNSPACED = 8, 16
"""Words, or characters of a script without spaces, that have to be the same in a row."""

# A run in more answers than these, and in more than this share of them, belongs to the task and not to a row.
_SHARED, _SHARED_SHARE = 3, 0.01

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_PIECE = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")
_FACTOR = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, which spreads sums over all bits


@dataclass(frozen=True, eq=False)
class SpanIndex:
    """Every run of words that some, but not many, of the training answers have.

    `hashes` uint64 [n], sorted; `answer` int32 [n]: the first training answer that has it. `answers`: how many answers
    there are; `boilerplate`: runs left out since many answers share them.
    """

    hashes: np.ndarray
    answer: np.ndarray
    answers: int
    boilerplate: int


@dataclass(frozen=True)
class CopiedText:
    """What of a text is copied: its `words`, those of them in copied spans (`covered`), and the longest span: how many
    words, its text, and a training answer that has its beginning (-1: nothing is copied)."""

    words: int
    covered: int
    longest: int
    text: str
    answer: int

    @property
    def share(self) -> float:
        """The share of the words that is copied."""
        return self.covered / self.words if self.words else 0.0


def index_spans(answers: Sequence[str]) -> SpanIndex:
    """The index of the training answers. Of 50,000 answers of 100 words it takes about ten seconds and 100 MB."""
    known: dict[str, int] = {}
    runs = [np.unique(_runs(split_words(text)[0], known)) for text in answers]
    hashes = np.concatenate([*runs, np.empty(0, np.uint64)])
    owner = np.repeat(np.arange(len(answers), dtype=np.int32), [len(run) for run in runs])
    unique, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    rare = counts <= max(_SHARED, _SHARED_SHARE * len(answers))
    return SpanIndex(unique[rare], owner[first[rare]], len(answers), int((~rare).sum()))


def find_copied(text: str, index: SpanIndex, known_texts: Sequence[str] = ()) -> CopiedText:
    """What of a text stands in the training answers, apart from what stands in `known_texts`."""
    words, places = split_words(text)
    width = _width(words)
    known: dict[str, int] = {}
    runs = _runs(words, known)
    found = np.minimum(np.searchsorted(index.hashes, runs), max(len(index.hashes) - 1, 0))
    taken = index.hashes[found] == runs if len(index.hashes) else np.zeros(len(runs), bool)
    for other in known_texts:
        taken &= ~np.isin(runs, _runs(split_words(other)[0], known, width))
    covered = np.zeros(len(words) + 1, np.int64)
    starts = np.flatnonzero(taken)
    np.add.at(covered, starts, 1)
    np.add.at(covered, starts + width, -1)
    inside = np.cumsum(covered)[:-1] > 0
    edges = np.flatnonzero(np.diff(np.concatenate([[0], inside.astype(np.int8), [0]])))
    spans = edges.reshape(-1, 2)
    if not len(spans):
        return CopiedText(len(words), 0, 0, "", -1)
    begin, end = (int(edge) for edge in spans[np.argmax(spans[:, 1] - spans[:, 0])])
    shown = text[places[begin][0] : places[end - 1][1]]
    return CopiedText(len(words), int(inside.sum()), end - begin, shown, int(index.answer[found[begin]]))


def split_words(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The words of a text, in lower case, and where in it each stands."""
    matches = [*_PIECE.finditer(text)]
    return [match.group().lower() for match in matches], [match.span() for match in matches]


def _width(words: Sequence[str]) -> int:
    """How long a run has to be: where most words are single characters of a script without spaces, longer."""
    single = sum(len(word) == 1 and word > "\u0dff" for word in words)
    return SPAN_UNSPACED if 2 * single > len(words) else SPAN


def _runs(words: Sequence[str], known: dict[str, int], width: int | None = None) -> np.ndarray:
    """A hash (uint64) for each run of as many words; `known` keeps the hashes of words seen before."""
    width = width or _width(words)
    for word in set(words) - known.keys():
        known[word] = zlib.crc32(word.encode("utf-8", "surrogatepass"))
    hashes = np.array([known[word] for word in words], np.uint64)
    last = max(len(hashes) - width + 1, 0)
    rolled = np.full(last, width, np.uint64)
    for place in range(width):
        rolled = (rolled ^ hashes[place : last + place]) * np.uint64(_FACTOR)
        rolled ^= rolled >> np.uint64(29)
    return rolled
