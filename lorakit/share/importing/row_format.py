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
_OF_THE_HUB = {
    "messages": """
        trl-lib/Capybara HuggingFaceH4/ultrachat_200k HuggingFaceH4/no_robots HuggingFaceTB/smoltalk
        HuggingFaceTB/everyday-conversations-llama3.1-2k HuggingFaceTB/smol-smoltalk open-r1/OpenR1-Math-220k
        open-r1/Mixture-of-Thoughts open-r1/codeforces-cots allenai/tulu-3-sft-mixture""",
    "prompt-completion": "trl-lib/tldr",
    "text": "imdb stanfordnlp/imdb timdettmers/openassistant-guanaco mlabonne/guanaco-llama2-1k roneneldan/TinyStories",
    "alpaca": "tatsu-lab/alpaca yahma/alpaca-cleaned vicgalle/alpaca-gpt4",
}
"""A recipe's word for rows -> data sets of the hub whose rows are such, by their cards."""
_KNOWN = {name.lower(): word for word, names in _OF_THE_HUB.items() for name in names.split()}


def peek_format(path: str) -> str | None:
    """The word of a recipe for the rows of a JSON or JSON Lines file, or of a well-known hub dataset; None where the
    first row does not tell, or nothing is known."""
    if path.lower() in _KNOWN:
        return _KNOWN[path.lower()]
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
