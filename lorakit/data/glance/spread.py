"""Some rows of a source from its whole length, and how many it has, without reading all of a large one."""

import heapq
import mmap
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, TypeVar

from lorakit.data.glance.windows import readable, rows_between
from lorakit.data.readers import files_in, json_rows, read_blocks
from lorakit.data.rows import Row, RowError
from lorakit.data.sources import OpenSource, is_file, open_source
from lorakit.recipe.data_files import COLUMN_SUFFIXES, COMPRESSIONS, data_suffix
from lorakit.recipe.problem import show_path
from lorakit.recipe.schema import Source

# Bytes up to which a source is read whole, plain and packed.
_WHOLE, _WHOLE_PACKED = 1 << 20, 1 << 18
# A larger one is read in so many stretches of so many bytes; of compressed files only what the first blocks hold.
_STRETCHES, _STRETCH = 32, 1 << 15
_BLOCKS = 8
# Up to here the lines of JSON Lines are counted, and the longest of them found.
_COUNTED = 1 << 27
_LONGEST = 8
# Rows of a columnar file, from so many places; a Parquet row group above the size is read from its beginning only.
_PLACES, _ROWS, _GROUP = 8, 256, 1 << 25

Item = TypeVar("Item")


@dataclass(frozen=True)
class Spread:
    """Rows of one source.

    `total`: how many it has, an estimate unless `counted`. `whole`: `rows` are all of them. `longest`: rows that take
    the most bytes, where all were looked at for it (`searched`).
    """

    opened: OpenSource
    rows: list[Row]
    total: float
    whole: bool = True
    counted: bool = True
    searched: bool = True
    longest: list[Row] = field(default_factory=list)


def spread(source: Source) -> Spread | None:
    """Some rows of a source, all of a small one; None where it is a hub dataset that is not on this machine.

    Raises:
        UserError: the source cannot be read, or its format cannot be told.
    """
    here = source if is_file(source) else _cached_dataset(source)
    if here is None:
        return None
    opened = open_source(here)
    files = files_in(Path(here.path))
    packed = any(data_suffix(path.name).endswith((*COMPRESSIONS, *COLUMN_SUFFIXES)) for path in files)
    if opened.size <= (_WHOLE_PACKED if packed else _WHOLE):
        rows = [row for block in opened.blocks for row in block.rows()]
        return Spread(opened, rows, len(rows))
    kinds = [_columnar, _plain, _beginnings]
    parts = [kind(opened, some) for kind, some in zip(kinds, _by_kind(files), strict=True) if some]
    found = parts[0]
    for other in parts[1:]:
        found = replace(
            found,
            rows=found.rows + other.rows,
            total=found.total + other.total,
            counted=found.counted and other.counted,
            searched=found.searched and other.searched,
            longest=found.longest + other.longest,
        )
    if not found.rows:  # rows longer than any stretch
        blocks = list(islice(opened.blocks, _BLOCKS))
        rows = [row for block in blocks for row in block.rows()]
        share = sum(block.size for block in blocks) / opened.size
        return replace(found, rows=rows, total=found.total if found.counted else len(rows) / share)
    return found


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """`count` items from the whole length; all where there are no more."""
    if len(items) <= count:
        return list(items)
    return [items[int((number + 0.5) * len(items) / count)] for number in range(count)]


def _by_kind(files: list[Path]) -> tuple[list[Path], list[Path], list[Path]]:
    """Columnar files, those that can be read from the middle, and those that cannot."""
    suffixes = {path: data_suffix(path.name) for path in files}
    columnar = [path for path in files if suffixes[path] in COLUMN_SUFFIXES]
    plain = [path for path in files if readable(suffixes[path])]
    return columnar, plain, [path for path in files if path not in {*columnar, *plain}]


def _plain(opened: OpenSource, files: list[Path]) -> Spread:
    """Stretches at equal distances over all files together."""
    sizes = [path.stat().st_size for path in files]
    ends = list(accumulate(sizes))
    columns = frozenset(_columns(opened))
    rows: list[Row] = []
    seen = 0
    for number in range(_STRETCHES):
        begin = (2 * number + 1) * ends[-1] // (2 * _STRETCHES) - _STRETCH // 2
        stop = begin + _STRETCH
        for index in range(bisect_right(ends, begin), len(files)):
            first = ends[index] - sizes[index]
            if first >= stop:
                break
            start, end = max(begin - first, 0), min(stop - first, sizes[index])
            rows += rows_between(files[index], data_suffix(files[index].name), start, end, columns)
            seen += end - start
    lines = all(data_suffix(path.name) in (".jsonl", ".ndjson") for path in files) and ends[-1] <= _COUNTED
    if not lines:
        return Spread(opened, rows, len(rows) * ends[-1] / max(seen, 1), whole=False, counted=False, searched=False)
    return Spread(opened, rows, sum(map(_line_count, files)), whole=False, longest=_longest_rows(files))


def _columns(opened: OpenSource) -> set[str]:
    """The columns of the first rows, with the names that the file gives them."""
    head = next(opened.blocks, None)
    records = [row.record for row in islice(head.rows(), 100)] if head else []
    return {column for record in records if isinstance(record, dict) for column in record}


def _line_count(path: Path) -> int:
    count, last = 0, b"\n"
    with path.open("rb", buffering=0) as file:
        while data := file.read(1 << 20):
            count, last = count + data.count(b"\n"), data[-1:]
    return count + (last != b"\n")


def _longest_rows(files: list[Path]) -> list[Row]:
    found: list[tuple[int, Path, int]] = []
    for path in files:
        if path.stat().st_size:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                found += [(length, path, start) for length, start in longest_lines(data, _LONGEST)]
    rows: list[Row] = []
    for length, path, start in heapq.nlargest(_LONGEST, found):
        with path.open("rb") as file:
            file.seek(start)
            rows += json_rows.parse_lines(show_path(path), 1, file.read(length))
    return rows


def longest_lines(data: Any, many: int) -> list[tuple[int, int]]:
    """The length and start of the `many` longest lines of bytes that can be searched.

    Most are never looked at: from a line's start a step of the least length that counts is made, and back to the line
    break before it, behind which the next line begins.
    """
    longest: list[tuple[int, int]] = []
    at = 0
    while at < len(data):
        least = longest[0][0] if len(longest) == many else 0
        end = data.rfind(b"\n", at, at + least + 1)
        if end < 0:
            end = data.find(b"\n", at + least)
            end = len(data) if end < 0 else end
            if len(longest) < many:
                heapq.heappush(longest, (end - at, at))
            elif end - at > least:  # what stands behind the last line break may be shorter
                heapq.heapreplace(longest, (end - at, at))
        at = end + 1
    return longest


def _beginnings(opened: OpenSource, files: list[Path]) -> Spread:
    """Compressed files: what the first of them begin with."""
    rows: list[Row] = []
    seen, share = 0, max(1, _BLOCKS // len(files))
    for path in evenly(files, _BLOCKS):
        for block in islice(read_blocks(path), share):
            rows += list(block.rows())
            seen += block.size
    total = sum(path.stat().st_size for path in files)
    return Spread(opened, rows, len(rows) * total / max(seen, 1), whole=False, counted=False, searched=False)


def _columnar(opened: OpenSource, files: list[Path]) -> Spread:
    """Rows from several places of Parquet and Arrow files, which say how many they have."""
    rows: list[Row] = []
    total, chosen = 0, set(evenly(files, _PLACES))
    for path in files:
        places = max(1, _PLACES // len(chosen)) if path in chosen else 0
        try:
            read = _parquet if data_suffix(path.name) == ".parquet" else _arrow
            count, records = read(path, places)
        except (OSError, ValueError, OverflowError, KeyError) as error:  # pyarrow's own are kinds of these
            count, records = 1, [RowError("no readable file", str(error))]
        total += count
        rows += [Row(show_path(path), record) for record in records]
    return Spread(opened, rows, total, whole=False, searched=False)


def _parquet(path: Path, places: int) -> tuple[int, list[Any]]:
    import pyarrow.parquet

    records = []
    with pyarrow.parquet.ParquetFile(path) as file:
        for group in evenly(range(file.num_row_groups), places) if places else []:
            if file.metadata.row_group(group).total_byte_size <= _GROUP:
                table = file.read_row_group(group)
                records += table.take(evenly(range(len(table)), _ROWS)).to_pylist()
            else:
                records += next(file.iter_batches(batch_size=_ROWS, row_groups=[group])).to_pylist()
        return file.metadata.num_rows, records


def _arrow(path: Path, places: int) -> tuple[int, list[Any]]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        magic = source.read(6)
        source.seek(0)
        batches: Iterable[Any]
        if magic == b"ARROW1":
            file = pyarrow.ipc.open_file(source)
            batches = [file.get_batch(index) for index in range(file.num_record_batches)]
        else:
            batches = list(pyarrow.ipc.open_stream(source))
        records = []
        for batch in evenly(batches, places) if places else []:
            part = batch.slice(max(0, (batch.num_rows - _ROWS) // 2), _ROWS)
            part.validate(full=True)  # Arrow trusts the offsets that a file holds
            records += part.to_pylist()
        return sum(batch.num_rows for batch in batches), records


def _cached_dataset(source: Source) -> Source | None:
    """A hub dataset's split as the Arrow files in the cache of `datasets`, told without that library."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets")
    folders = [folder for folder in _folders(cache) if _letters(folder.name) == _letters(source.path)]
    wanted = re.compile(rf"-{re.escape(source.split)}(-\d+-of-\d+)?\.arrow$")
    found = [path for folder in folders for path in folder.rglob("*.arrow") if wanted.search(path.name)]
    if not found:
        return None
    newest = max(found, key=lambda path: path.stat().st_mtime)
    pattern = re.sub(r"-\d+-of-\d+\.arrow$", "-*-of-*.arrow", str(newest))
    return source.model_copy(update={"path": pattern})


def _folders(parent: Path) -> Iterator[Path]:
    return (path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else iter(())


def _letters(name: str) -> str:
    """A dataset's name as its folder and its id have it in common: the folder is written in small letters."""
    return re.sub(r"[^a-z0-9.]", "", name.lower())
