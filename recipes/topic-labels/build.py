#!/usr/bin/env python3
"""Build train.jsonl and eval.jsonl from Debian's package index: how a description begins in, one of eight areas out.

Standard library only; README.md beside this file says what the task is and how the rows are chosen and split.
"""

import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from debian_index import (
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

AREAS = ("admin", "database", "games", "graphics", "mail", "science", "sound", "web")
"""The labels: sections of the archive that are about a subject rather than a programming language."""

TRAIN_SIZE, EVAL_SIZE = 75, 25
"""Rows of each area."""

SHORTEST, LONGEST = 60, 260
"""Characters of a text."""

PARTS = re.compile(r"^lib|-(bin|common|data|dbg|dev|doc|docs|examples|extra|plugins?)$|^(python3?|ruby|node|golang|r)-")
"""Names of packages that are a part of another, which say little of an area."""


@dataclass(frozen=True)
class Package:
    """One row to be: where it comes from, what the model reads, and the label."""

    name: str
    source: str
    text: str
    area: str


def select(index: str, descriptions: str) -> list[Package]:
    """One package of each source and area: the first of its name that is no part of another."""
    prose = paragraphs(descriptions)
    chosen: dict[tuple[str, str], Package] = {}
    for fields in records(index):
        name, area = fields["Package"], fields["Section"].rpartition("/")[2]
        first, *_ = prose.get(fields.get("Description-md5", ""), []) or [""]
        text = beginning(first, SHORTEST, LONGEST)
        if area in AREAS and text and not PARTS.search(name):
            chosen.setdefault((source_of(fields), area), Package(name, source_of(fields), text, area))
    return list(chosen.values())


def split(packages: list[Package]) -> tuple[list[Package], list[Package]]:
    """Train and held-out packages, as many of each area on a side. Of a group one package stays, so that neither side
    has anything twice; packages of one source or wording in two areas are left out."""
    groups = group(packages, lambda package: package.source, lambda package: package.text)
    single = [members[0] for members in groups if len({member.area for member in members}) == 1]
    train, held_out = [], []
    for area in AREAS:
        drawn = by_hash((package for package in single if package.area == area), lambda package: package.name, "split")
        held_out += drawn[:EVAL_SIZE]
        train += drawn[EVAL_SIZE:][:TRAIN_SIZE]
    return by_hash(train, lambda package: package.name), by_hash(held_out, lambda package: package.name)


def build(index: str, descriptions: str, out: Path) -> None:
    """Write both files under `out` and print what was read and drawn."""
    packages = select(index, descriptions)
    train, held_out = split(packages)
    if not train or not held_out:
        raise IndexProblem(
            f"{len(packages)} packages have an area and a description: too few to split. Build where Debian's main "
            "archive is listed, with its English descriptions."
        )
    for name, side in (("train.jsonl", train), ("eval.jsonl", held_out)):
        rows = ({"text": package.text, "label": package.area, "package": package.name} for package in side)
        write_rows(out / name, rows)
    counts = Counter(package.area for package in packages)
    print("candidates: " + ", ".join(f"{area} {counts[area]}" for area in AREAS))
    print(f"train.jsonl {len(train)} rows, eval.jsonl {len(held_out)} rows, in {out}")
    print(f"always one area: {1 / len(AREAS):.1%}" if len(held_out) == EVAL_SIZE * len(AREAS) else "areas are uneven")


if __name__ == "__main__":
    sys.exit(run_builder(__doc__.splitlines()[0], Path(__file__).parent, build, descriptions=True))
