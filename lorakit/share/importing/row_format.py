"""The format of rows that lie here, by the columns of their first row."""

import json
from pathlib import Path

_BY_COLUMNS = (
    ("messages", {"messages"}),
    ("sharegpt", {"conversations"}),
    ("prompt-completion", {"prompt", "completion"}),
    ("alpaca", {"instruction", "output"}),
    ("text", {"text"}),
)
_LONGEST = 10_000_000


def peek_format(path: str) -> str | None:
    """The word of a recipe for the rows of a JSON or JSON Lines file; None where the first row does not tell."""
    file = Path(path)
    if not file.is_file() or file.suffix not in (".jsonl", ".ndjson", ".json"):
        return None
    try:
        with file.open(encoding="utf-8-sig") as lines:
            text = lines.readline(_LONGEST) if file.suffix != ".json" else lines.read(_LONGEST)
        row = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return None
    row = row[0] if isinstance(row, list) and row else row
    columns = set(row) if isinstance(row, dict) else set()
    return next((word for word, needed in _BY_COLUMNS if needed <= columns), None)
