"""Text files that are not documents: rows under the wrong name, and files that lie beside rows."""

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import PurePath

from lorakit.data.formats import columns_read
from lorakit.data.readers.content_type import detect_rows_in_document
from lorakit.data.rows import Block
from lorakit.errors import UserError
from lorakit.recipe.data_files import data_suffix
from lorakit.recipe.problem import one_line
from lorakit.registry import FORMATS


def refuse_wrong_documents(source: str, head: Iterable[Block], files: Sequence[str]) -> None:
    """Refuse to train on rows as if they were documents, and on documents that only lie beside rows.

    `source`: as messages name it; `head`: its first blocks; `files`: the names of its files.

    Raises:
        UserError: it says what to do.
    """
    documents = [file for file in files if data_suffix(file).startswith((".txt", ".md"))]
    if not documents:
        return
    others = [file for file in files if file not in documents]
    columns = frozenset(chain.from_iterable(columns_read(entry.name) for entry in FORMATS))
    for block in head:
        record = next((row.record for row in block.rows() if isinstance(row.record, dict)), None)
        if record is None:
            continue
        kind = detect_rows_in_document(str(record["text"]), columns) if block.name in documents else None
        if kind:
            what, ending = kind
            example = PurePath(block.name).name.partition(".")[0] + ending
            raise UserError(
                f"{block.name}: the file seems to hold {what}, not a document. Give it a name that ends in {ending}, "
                f"such as {example}, or write data.format: text to train on it as it stands."
            )
        if block.name in others and "text" not in record:
            kinds = ", ".join(sorted({f"'{source}/*{data_suffix(file)}'" for file in others}))
            raise UserError(
                f"{source}: text documents ({one_line(', '.join(documents), 200)}) lie beside files of rows "
                f"({one_line(', '.join(others), 200)}). Name the files to train on by a pattern, such as {kinds}."
            )
