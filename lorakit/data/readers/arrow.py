"""Parquet and Arrow: batches of rows as columns. pyarrow is imported where a file is read."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from lorakit.data.readers.text_stream import BLOCK
from lorakit.data.rows import Block, Row, RowError, normalize_line_ends
from lorakit.errors import UserError
from lorakit.recipe.problem import one_line

_MOST_ROWS, _SAMPLE_ROWS = 8192, 16


def read_columns(path: Path, name: str, kind: str) -> Iterator[Block]:
    """Blocks of rows as Arrow's stream format, some MiB each at most. `kind`: Parquet or Arrow."""
    import pyarrow

    number = 0
    try:
        for batch, size in (_parquet_batches if kind == "Parquet" else _arrow_batches)(path, name):
            sink, bare = pyarrow.BufferOutputStream(), batch.replace_schema_metadata(None)
            with pyarrow.ipc.new_stream(sink, bare.schema) as writer:
                writer.write_batch(bare)  # pickle would take the whole of the columns of which it is a part
            yield Block(name, number + 1, bytes(sink.getvalue()), _parse_rows, size)
            number += batch.num_rows
    except _damage() as error:
        after = f" after row {number}" if number else ""
        reason = one_line(str(error), 200).rstrip(".")
        raise UserError(f"{name}: not a readable {kind} file{after}: {reason}.") from error


def _parquet_batches(path: Path, name: str) -> Iterator[tuple[Any, int]]:
    """Batches of about a MiB, and how many bytes of the file each takes."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, buffer_size=BLOCK) as file:
        _refuse_equal_names(name, file.schema_arrow.names)
        file_size, total = path.stat().st_size, file.metadata.num_rows
        content_size = sum(file.metadata.row_group(index).total_byte_size for index in range(file.num_row_groups))
        for first in islice(file.iter_batches(batch_size=_SAMPLE_ROWS), 1):
            # Values that many rows share are stored once: a file of a MB may hold rows of TBs.
            content_size = max(content_size, first.nbytes * total // max(first.num_rows, 1))
        number = 0
        for batch in file.iter_batches(batch_size=_rows_of_a_block(total, content_size)):
            yield batch, _share(file_size, number, batch.num_rows, total)
            number += batch.num_rows


def _arrow_batches(path: Path, name: str) -> Iterator[tuple[Any, int]]:
    """As `_parquet_batches`, of a file in Arrow's file or stream format."""
    import pyarrow

    # Mapped: a batch may hold the whole file, and only the part that is read takes memory.
    with pyarrow.memory_map(str(path)) as source:
        # Arrow trusts the offsets that a file holds, and wrong ones end the process: before `validate`, nothing
        # reads them, as `nbytes` would.
        for batch, size in _stored_batches(source, name):
            step = _rows_of_a_block(batch.num_rows, batch.get_total_buffer_size())
            for start in range(0, batch.num_rows, step):
                part = batch.slice(start, step)
                part.validate(full=True)
                yield part, _share(size, start, part.num_rows, batch.num_rows)


def _stored_batches(source: Any, name: str) -> Iterator[tuple[Any, int]]:
    import pyarrow

    magic = source.read(6)
    source.seek(0)
    stored = (pyarrow.ipc.open_file if magic == b"ARROW1" else pyarrow.ipc.open_stream)(source)
    _refuse_equal_names(name, stored.schema.names)
    if magic == b"ARROW1":
        for index in range(stored.num_record_batches):
            yield stored.get_batch(index), _share(source.size(), index, 1, stored.num_record_batches)
        return
    position = 0
    for batch in stored:
        yield batch, source.tell() - position
        position = source.tell()


def _parse_rows(name: str, first: int, serialized: bytes) -> Iterator[Row]:
    """The rows of a block; where one value cannot be read, its row says so."""
    import pyarrow

    table = pyarrow.ipc.open_stream(serialized).read_all()
    records: list[dict[str, Any] | RowError] = []
    try:
        records = table.to_pylist()
    except _damage():
        for index in range(table.num_rows):
            try:
                records += table.slice(index, 1).to_pylist()
            except _damage() as error:
                records.append(RowError("a value cannot be read", one_line(str(error), 200)))
    has_returns = b"\r\n" in serialized
    for number, record in enumerate(records, start=first):
        yield Row(f"{name} row {number}", normalize_line_ends(record) if has_returns else record)


def _rows_of_a_block(rows: int, size: int) -> int:
    return max(1, min(_MOST_ROWS, rows * BLOCK // max(size, 1)))


def _share(size: int, start: int, count: int, total: int) -> int:
    """What `count` of `total` items take of a size; the shares of all add up to it."""
    return size * (start + count) // total - size * start // total


def _refuse_equal_names(name: str, columns: list[str]) -> None:
    if len(set(columns)) != len(columns):
        raise UserError(f"{name}: two columns have the same name: {one_line(', '.join(columns), 200)}.")


def _damage() -> tuple[type[Exception], ...]:
    """What pyarrow raises for damaged files and for values that Python does not have, as a date of the year 20000."""
    from pyarrow.lib import ArrowException

    return ArrowException, OSError, ValueError, OverflowError, KeyError
