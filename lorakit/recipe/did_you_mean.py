"""Did you mean: the nearest word, and the nearest file name in a folder."""

import itertools
import os
from collections.abc import Iterable
from pathlib import Path

_MOST_NAMES = 2000


def nearest(word: str, words: Iterable[str], parts: bool = False) -> str | None:
    """The word most like `word`, letter case and `-` against `_` aside; None when none is near.

    Near is what one slip of the fingers in three or four letters makes of a word. With `parts` also a word of which
    this one is the beginning or the end, or the other way round: `rouge` and `rouge-l`, `torch.float16` and `float16`.
    """
    by_folded = {_folded(known): known for known in words}
    mine = _folded(word[:100])
    most = (len(mine) + 1) // 4 if len(mine) > 2 else 0
    slips = {known: count for known in by_folded if (count := _slips(mine, known, most)) is not None}
    if slips:
        return by_folded[min(slips, key=slips.__getitem__)]
    if parts:
        return next((by_folded[known] for known in by_folded if _is_part(mine, known) or _is_part(known, mine)), None)
    return None


def nearest_file(path: Path) -> str | None:
    """The name in `path`'s folder that is most like its last part; of files the name before the first dot."""
    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry in itertools.islice(entries, _MOST_NAMES)]
    except (OSError, ValueError):
        return None  # no such folder, or none that may be read: there is nothing to suggest
    return nearest_name(path.name, names)


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """The file name that is most like another one; of several that begin alike the one with the same ending."""
    stems = {other: other.partition(".")[0] or other for other in sorted(names)}
    near = nearest(name.partition(".")[0] or name, stems.values())
    alike = [other for other, stem in stems.items() if stem == near]
    return next((other for other in alike if other.endswith(f".{name.rpartition('.')[2]}")), next(iter(alike), None))


def _folded(word: str) -> str:
    return word.lower().replace("-", "_")


def _is_part(part: str, whole: str) -> bool:
    return len(part) > 1 and any(whole.startswith(part + sign) or whole.endswith(sign + part) for sign in "_.")


def _slips(word: str, other: str, most: int) -> int | None:
    """How many letters are to be put in, left out, changed or swapped with their neighbour; None for more than `most`
    (the optimal string alignment distance)."""
    if abs(len(word) - len(other)) > most:
        return None
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(word, start=1):
        new = [i]
        for j, wanted in enumerate(other, start=1):
            cost = min(row[j] + 1, new[j - 1] + 1, row[j - 1] + (letter != wanted))
            if i > 1 and j > 1 and letter == other[j - 2] and word[i - 2] == wanted:
                cost = min(cost, before[j - 2] + 1)
            new.append(cost)
        before, row = row, new
        if min(row) > most:
            return None
    return row[-1] if row[-1] <= most else None
