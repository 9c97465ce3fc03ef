"""The rows that two recipes read, compared by what they say: whatever files and formats they come from, and in whatever
order. Without torch."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorakit.data.readers import files_in
from lorakit.data.rows import Conversation, RowContent, RowError, Text
from lorakit.data.sources import is_file, open_source, source_hashes, source_name
from lorakit.errors import UserError
from lorakit.progress import Progress
from lorakit.recipe.problem import one_line
from lorakit.recipe.schema import Source
from lorakit.run_dir import Run

_SHOWN = 3
_LONGEST_TEXT = 70


@dataclass(frozen=True)
class ShownRow:
    """A row as a message shows it: its place, and the beginning of what it says."""

    where: str
    text: str


@dataclass(frozen=True)
class RowDifference:
    """`rows_a` and `rows_b` are all rows of the two, `both` those that both have; a row that one has twice and the
    other once differs once. The first ones that only one has are shown. `unreadable` rows say nothing and are
    left out."""

    rows_a: int
    rows_b: int
    both: int
    removed: int
    added: int
    first_removed: tuple[ShownRow, ...]
    first_added: tuple[ShownRow, ...]
    unreadable: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_rows(first: Sequence[Source], second: Sequence[Source], progress: Progress) -> RowDifference:
    """The rows of two lists of sources, all that their files have: `take` and the checks of `data.clean` come later.
    UserError where a source cannot be read."""
    counts_a, counts_b = _count(first, progress), _count(second, progress)
    unreadable = counts_a.pop("", 0) + counts_b.pop("", 0)
    removed, added = counts_a - counts_b, counts_b - counts_a
    return RowDifference(
        counts_a.total(),
        counts_b.total(),
        (counts_a & counts_b).total(),
        removed.total(),
        added.total(),
        _show(first, removed),
        _show(second, added),
        unreadable,
    )


def hash_files(sources: Sequence[Source]) -> dict[str, str]:
    """The sha256 of each file of some sources by its path. UserError where one is not here, or lies on a hub."""
    for source in sources:
        _refuse_hub(source)
    return {path: sha256 for source in sources for path, sha256 in source_hashes(source).items()}


def locate_rows(sources: Sequence[Source], run: Run, recorded: Mapping[str, str]) -> list[Source]:
    """The sources of a run with the paths where their files are now. `recorded`: the sha256 of each file by the path
    that it had. UserError where they are gone, have changed, or lie on a hub."""
    from lorakit.run_inputs import locate_sources, recorded_path  # loads transformers

    for source in sources:
        _refuse_hub(source)
    located: list[Source] = [locate_sources(source, run.folder, recorded) for source in sources]
    for source in located:
        hashes = set(source_hashes(source).values())
        paths = {recorded_path(name, run.folder): sha256 for name, sha256 in recorded.items()}
        there = {sha256 for path, sha256 in paths.items() if Path(path).is_relative_to(source.path)}
        if hashes != (there or hashes & set(recorded.values())):
            raise UserError(f"{source_name(source)}: not what the run read: its sha256 is another")
    return located


def _refuse_hub(source: Source) -> None:
    if not is_file(source):
        raise UserError(f"{source_name(source)}: a data set of the hub, which is not read here")


def _count(sources: Sequence[Source], progress: Progress) -> Counter[str]:
    """How often each row occurs, by its hash; unreadable ones under the empty name."""
    size = sum(path.stat().st_size for source in sources for path in files_in(Path(source.path)))
    counts: Counter[str] = Counter()
    with progress.bar("comparing rows", size, unit="bytes") as bar:
        for source in sources:
            opened = open_source(source)
            for block in opened.blocks:
                counts.update(key for key, _, _ in _keys(opened.parse, block.rows()))
                bar.advance(block.size)
    return counts


def _show(sources: Sequence[Source], wanted: Counter[str]) -> tuple[ShownRow, ...]:
    shown: list[ShownRow] = []
    for source in sources if wanted else ():
        opened = open_source(source)
        for block in opened.blocks:
            for key, where, content in _keys(opened.parse, block.rows()):
                if wanted[key] and len(shown) < min(_SHOWN, wanted.total()):
                    shown.append(ShownRow(where, _describe(content)))
            if len(shown) == _SHOWN:
                return tuple(shown)
    return tuple(shown)


def _keys(parse: Any, rows: Iterator[Any]) -> Iterator[tuple[str, str, Any]]:
    """Of each row its hash, its place and its content: the record itself where that says nothing that is trained."""
    for row in rows:
        if isinstance(row.record, RowError):
            yield "", row.where, row.record
            continue
        try:
            content: RowContent | dict[str, Any] = parse(row.record)
            value: Any = [type(content).__name__, vars(content)]
        except RowError:
            content = value = row.record
        text = json.dumps(value, sort_keys=True, default=str)
        yield hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(), row.where, content


def _describe(content: Any) -> str:
    if isinstance(content, Conversation):
        texts = [f"{message['role']}: {message.get('content') or '...'}" for message in content.messages[-2:]]
        return " / ".join(one_line(text, _LONGEST_TEXT) for text in texts)
    if isinstance(content, Text):
        return one_line(content.text, _LONGEST_TEXT)
    if isinstance(content, dict):
        return one_line(json.dumps(content, ensure_ascii=False, default=str), _LONGEST_TEXT)
    return f"{len(content.input_ids):,} tokens"
