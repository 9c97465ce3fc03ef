#!/usr/bin/env python3
"""Build train.jsonl and eval.jsonl from Debian's package index: how a description begins in, the synopsis out.

Standard library only; README.md beside this file says what the task is and how the rows are chosen and split.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from debian_index import (
    NAMES_SOMEONE,
    IndexProblem,
    beginning,
    by_hash,
    group,
    paragraphs,
    records,
    run_builder,
    source_of,
    write_rows,
)

TRAIN_ROWS, EVAL_ROWS = 600, 120
SHORTEST, LONGEST = 100, 260
"""Characters of a description."""

LONGEST_SYNOPSIS = 48

PLAIN = re.compile(r"[a-z][a-z0-9,' -]+ [a-z0-9,' -]+")
"""A synopsis of several words without names, brackets or versions, as Debian recommends (policy 5.6.13, 3.4.1)."""

SHARED_WORDS = 3
"""Words that description and synopsis have in common at the least: else the one cannot be told from the other."""


@dataclass(frozen=True)
class Package:
    """One row to be: where it comes from, what the model reads, and what it writes."""

    name: str
    source: str
    description: str
    synopsis: str


def select(index: str, descriptions: str) -> list[Package]:
    """The packages whose description and synopsis are short, plain prose; the first of each source."""
    prose = paragraphs(descriptions)
    packages: dict[str, Package] = {}
    for fields in records(index):
        first, *_ = prose.get(fields.get("Description-md5", ""), []) or [""]
        text, synopsis = beginning(first, SHORTEST, LONGEST), fields["Description"].splitlines()[0].strip()
        plain = PLAIN.fullmatch(synopsis) and len(synopsis) <= LONGEST_SYNOPSIS and not NAMES_SOMEONE.search(synopsis)
        shared = {word for word in synopsis.split() if len(word) > 3} & set(re.findall(r"[a-z]+", text.lower()))
        if text and plain and len(shared) >= SHARED_WORDS:
            source = source_of(fields)
            packages.setdefault(source, Package(fields["Package"], source, text, synopsis))
    return list(packages.values())


def build(index: str, descriptions: str, out: Path) -> None:
    """Write both files under `out` and print what was read and drawn. Of a group one package stays, so that neither
    side has anything twice."""
    packages = select(index, descriptions)
    groups = group(packages, lambda package: package.source, lambda package: package.description)
    drawn = by_hash((members[0] for members in groups), lambda package: package.name, "split")
    held_out, train = drawn[:EVAL_ROWS], drawn[EVAL_ROWS:][:TRAIN_ROWS]
    if not train:
        raise IndexProblem(
            f"{len(packages)} packages have a short description and a plain synopsis: too few to split. Build where "
            "Debian's main archive is listed, with its English descriptions."
        )
    for name, side in (("train.jsonl", train), ("eval.jsonl", held_out)):
        rows = (
            {"description": package.description, "synopsis": package.synopsis, "package": package.name}
            for package in side
        )
        write_rows(out / name, rows)
    print(f"{len(packages)} candidates in {len(groups)} groups")
    print(f"train.jsonl {len(train)} rows, eval.jsonl {len(held_out)} rows, in {out}")


if __name__ == "__main__":
    sys.exit(run_builder(__doc__.splitlines()[0], Path(__file__).parent, build, descriptions=True))
