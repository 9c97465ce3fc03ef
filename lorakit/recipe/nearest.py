"""Did you mean: the nearest word, and the nearest file name in a folder."""

import difflib
import itertools
import os
from collections.abc import Iterable
from pathlib import Path

_MOST_NAMES = 2000


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The word most like `word`, letter case and `-` against `_` aside; None when none is near."""
    by_folded = {_folded(known): known for known in words}
    found = difflib.get_close_matches(_folded(word[:100]), by_folded, n=1, cutoff=0.6)
    return by_folded[found[0]] if found else None


def nearest_file(path: Path) -> str | None:
    """The name in `path`'s folder that is most like its last part."""
    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry in itertools.islice(entries, _MOST_NAMES)]
    except (OSError, ValueError):
        return None  # no such folder, or none that may be read: there is nothing to suggest
    return nearest(path.name, sorted(names))


def _folded(word: str) -> str:
    return word.lower().replace("-", "_")
