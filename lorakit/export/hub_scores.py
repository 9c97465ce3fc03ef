"""The newest scores of a run that are of the weights which are exported, for a model card."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit.amounts import percent
from lorakit.atomic_io import read_json_object
from lorakit.run_dir import Run

_DOCUMENT = re.compile(r"\d{8}T\d{6}(-\d+)?\.json")
_FORMAT = 2  # of evaluations, lorakit.evaluate.report
_DIGITS = {"nats": ".4f", "perplexity": ".4g", "points": ".1f", "ratio": ".3f"}


def describe_scores(run: Run, sha256s: set[str]) -> str | None:
    """A table in Markdown of the newest evaluation with a model whose weights have these sha256s; None without one."""
    documents = sorted(path for path in run.evaluations.glob("*.json") if _DOCUMENT.fullmatch(path.name))
    for path in reversed(documents):
        document = read_json_object(path) or {}
        models = document["models"] if document.get("format") == _FORMAT else {}
        if name := next((name for name in models if sha256s <= set(_texts(models[name].get("identity")))), None):
            return _table(document, name)
    return None


def _table(document: dict[str, Any], name: str) -> str:
    models, rows = document["models"], document["rows"]
    base = next((other for other, one in models.items() if one.get("kind") == "base"), None)
    compared = [one["scores"] for one in document["comparisons"] if one["model"] == name and one["against"] == base]
    source = "held-out rows" if str(rows["source"]).startswith("the held-out") else f"rows of {_last(rows['source'])}"
    lines = [
        f"{rows['count']:,} {source}, scored on {str(document['taken'])[:10]} with lorakit "
        f"{document['versions'].get('lorakit', '')}; answers are greedy, at most "
        f"{document['settings']['max_new_tokens']} tokens. In brackets the 95 % interval.",
        "",
        f"| | this model |{' base model |' if base else ''}{' against the base |' if compared else ''}",
        "|---|---|" + "---|" * (bool(base) + bool(compared)),
    ]
    for score, own in models[name]["scores"].items():
        cells = [score, _score(own)]
        if base:
            cells.append(_score(models[base]["scores"].get(score)))
        if compared:
            cells.append(compared[0].get(score, {}).get("verdict", "-"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _score(score: dict[str, Any] | None) -> str:
    if not score or score.get("value") is None:
        return "-"
    value, low, high = score["value"], score.get("low"), score.get("high")
    write = _writer(score.get("unit", "ratio"))
    return write(value) + (f" ({write(low)} to {write(high)})" if low is not None and high is not None else "")


def _writer(unit: str) -> Any:
    return (lambda value: percent(value, 1)) if unit == "share" else (lambda value: format(value, _DIGITS[unit]))


def _last(source: str) -> str:
    return Path(str(source)).name


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
    elif isinstance(value, str):
        yield value
