"""The format of rows that lie here, by the columns of their first row."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
        trl-lib/Capybara trl-lib/OpenMathReasoning HuggingFaceH4/ultrachat_200k HuggingFaceH4/no_robots
        HuggingFaceH4/deita-10k-v0-sft HuggingFaceH4/grok-conversation-harmless HuggingFaceH4/cai-conversation-harmless
        HuggingFaceH4/Multilingual-Thinking HuggingFaceH4/Bespoke-Stratos-17k HuggingFaceTB/smoltalk
        HuggingFaceTB/smoltalk2
        HuggingFaceTB/everyday-conversations-llama3.1-2k HuggingFaceTB/smol-smoltalk open-r1/OpenR1-Math-220k
        open-r1/Mixture-of-Thoughts open-r1/codeforces-cots open-r1/OpenThoughts-114k-math
        allenai/tulu-3-sft-mixture allenai/tulu-v2-sft-mixture allenai/tulu-3-sft-olmo-2-mixture
        philschmid/dolly-15k-oai-style""",
    "sharegpt": """
        mlabonne/FineTome-100k teknium/OpenHermes-2.5 Open-Orca/SlimOrca Open-Orca/SlimOrca-Dedup
        open-thoughts/OpenThoughts-114k bespokelabs/Bespoke-Stratos-17k
        anon8231489123/ShareGPT_Vicuna_unfiltered""",
    "prompt-completion": "trl-lib/tldr",
    "text": """
        imdb stanfordnlp/imdb timdettmers/openassistant-guanaco mlabonne/guanaco-llama2 mlabonne/guanaco-llama2-1k
        roneneldan/TinyStories""",
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
    return format_of_columns(row) if isinstance(row, dict) else None


def format_of_columns(names: Iterable[Any]) -> str | None:
    """The word of a recipe for rows with these columns; None where they do not tell."""
    columns = set(map(str, names))
    return next((word for word, needed in _BY_COLUMNS if needed <= columns), None)
