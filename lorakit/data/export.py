"""Cleaned rows -> a JSON Lines file that lorakit reads again, each with what was done to it."""

import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from lorakit.atomic_io import atomic_file
from lorakit.data.cleaning.clean import clean
from lorakit.data.rows import Block, Conversation
from lorakit.data.sources import OpenSource, open_source
from lorakit.data.worker_pool import map_in_order
from lorakit.errors import UserError
from lorakit.hardware.threads import usable_processors
from lorakit.progress import Progress
from lorakit.recipe.problem import show_path
from lorakit.recipe.schema import Source


@dataclass(frozen=True)
class _Writer:
    """Makes lines of a block's rows that stand at some places."""

    sources: Sequence[OpenSource]
    checks: Mapping[str, str]
    places: Collection[str]

    def __call__(self, number: int, block: Block) -> tuple[bytes, int, int]:
        """The lines, their number, and the bytes of the block."""
        lines = []
        for row in block.rows():
            if row.where not in self.places or not isinstance(row.record, dict):
                continue
            cleaned, findings = clean(self.sources[number].parse(row.record), self.checks)
            if cleaned is None:
                continue
            done = [f"{finding.check}: {finding.what}, {finding.field}" for finding in findings if finding.fixed]
            record = asdict(cleaned)
            if isinstance(cleaned, Conversation):
                del record["fixed"]
                if not cleaned.tools:
                    del record["tools"]
            lines.append(json.dumps({**record, "lorakit": {"where": row.where, "done": done}}))
        return "".join(f"{line}\n" for line in lines).encode(), len(lines), block.size


def check_target(target: Path) -> None:
    """A `UserError` where the file exists, since nothing is overwritten, or has a name that is read as another kind."""
    if target.exists():
        raise UserError(f"{show_path(target)}: already exists. Write another name, or remove it first.")
    if target.suffix.lower() not in (".jsonl", ".ndjson", ".json"):
        remedy = f"Write {show_path(target.with_name(target.name.partition('.')[0] + '.jsonl'))}."
        reason = "rows are written as JSON Lines, and a file of this name is not read as such"
        raise UserError(f"{show_path(target)}: {reason}. {remedy}")


def write_rows(
    target: Path, sources: Sequence[Source], checks: Mapping[str, str], places: Collection[str], progress: Progress
) -> int:
    """Write the rows that stand at `places`, cleaned by `checks`; gives their number. A `UserError` where the file is
    there already or cannot be written, or a source cannot be read."""
    check_target(target)
    opened = [open_source(source) for source in sources]
    worker = _Writer([one.without_blocks() for one in opened], checks, places)
    pieces = ((number, block) for number, one in enumerate(opened) for block in one.blocks)
    count, size = 0, sum(one.size for one in opened)
    try:
        with (
            atomic_file(target) as file,
            progress.bar(f"writing {show_path(target)}", total=size, unit="bytes") as bar,
            closing(map_in_order(worker, pieces, usable_processors())) as results,
        ):
            for lines, rows, done in results:
                file.write(lines)
                count += rows
                bar.advance(done, f"{count:,} rows")
    except OSError as error:
        raise UserError(f"{show_path(target)}: cannot be written: {error.strerror or error}.") from error
    return count
