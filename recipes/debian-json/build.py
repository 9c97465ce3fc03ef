#!/usr/bin/env python3
"""Build train.jsonl and eval.jsonl from Debian's package index: one description in, one JSON object out.

Standard library only; README.md beside this file says what the task is and how the rows are chosen and split.
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from debian_index import (
    IndexProblem,
    by_hash,
    group,
    records,
    run_builder,
    source_of,
    stable_hash,
    tag_values,
    write_rows,
)

INTERFACE_OF_TAG = {
    "x11": "x11",
    "graphical": "x11",
    "3d": "x11",
    "daemon": "daemon",
    "commandline": "commandline",
    "text-mode": "text-mode",
    "web": "web",
}
"""Tag to label, strongest first: a package with several tags gets the label of the first one here.

`graphical` and `3d` come with `x11` in the index. Left out: `TODO`, `framebuffer` and `svga`, which few
packages carry, and `shell`, which means something else on each.
"""

SECTION_COUNT = 12
"""How many sections stay: the most common ones among the packages that have both other labels."""

EVAL_SHARE = 10
"""One group in this many is held out."""

EVAL_GROUP_LIMIT = 5
"""A group of more packages than this stays in train, so that no one project weighs on the score."""


@dataclass(frozen=True)
class Package:
    """One row to be: where the package comes from, what the model sees, and the three labels."""

    name: str
    source: str
    description: str
    section: str
    interface: str
    language: str

    def answer(self) -> str:
        """The JSON object the model learns to write, its keys always in this order."""
        return json.dumps({"section": self.section, "interface": self.interface, "language": self.language})

    def row(self) -> dict[str, Any]:
        """One line of the JSONL files."""
        user = {"role": "user", "content": f"{self.name} - {self.description}"}
        assistant = {"role": "assistant", "content": self.answer()}
        return {"messages": [user, assistant]}


def interface_of(tags: str) -> str | None:
    """The one interface label, by the order of INTERFACE_OF_TAG; None when no tag is in it."""
    offered = tag_values(tags, "interface")
    return next((label for tag, label in INTERFACE_OF_TAG.items() if tag in offered), None)


def reason_to_drop(fields: dict[str, str], seen: set[str]) -> str | None:
    """Why this record becomes no row, or None. The common-section rule comes later: it needs all the rest."""
    tags = fields.get("Tag", "")
    languages = tag_values(tags, "implemented-in")
    if fields["Package"] in seen:
        return "another version or architecture of a package already read"
    if not tag_values(tags, "interface"):
        return "no interface tag"
    if interface_of(tags) is None:
        return "only interface tags outside the five labels"
    if not languages:
        return "no implemented-in tag"
    if "TODO" in languages:
        return "implemented-in::TODO"
    if len(languages) > 1:
        return "several implemented-in tags"
    if "transitional" in fields["Description"].splitlines()[0]:
        return "transitional package, its description says nothing of the program"
    return None


def to_package(fields: dict[str, str]) -> Package:
    """The labels of a record that has them all."""
    return Package(
        name=fields["Package"],
        source=source_of(fields),
        description=fields["Description"].splitlines()[0],
        section=fields["Section"].rpartition("/")[2],
        interface=interface_of(fields["Tag"]),
        language=tag_values(fields["Tag"], "implemented-in")[0],
    )


def select(index: str) -> tuple[list[Package], Counter[str]]:
    """The packages that become rows, and how many records were dropped for each reason."""
    seen: set[str] = set()
    dropped: Counter[str] = Counter()
    labelled = []
    for fields in records(index):
        reason = reason_to_drop(fields, seen)
        if reason is None:
            labelled.append(to_package(fields))
        else:
            dropped[reason] += 1
        seen.add(fields["Package"])
    sections = Counter(package.section for package in labelled)
    common = sorted(sections, key=lambda section: (-sections[section], section))[:SECTION_COUNT]
    kept = [package for package in labelled if package.section in common]
    dropped[f"section outside the {SECTION_COUNT} most common"] = len(labelled) - len(kept)
    return kept, dropped


def split(groups: list[list[Package]]) -> tuple[list[Package], list[Package]]:
    """Train and held-out packages, in hash order; a group's side hangs on its first name and its size."""
    train, held_out = [], []
    for members in groups:
        key = min(package.name for package in members)
        drawn = stable_hash(f"split {key}") % EVAL_SHARE == 0
        (held_out if drawn and len(members) <= EVAL_GROUP_LIMIT else train).extend(members)
    return by_hash(train, lambda package: package.name), by_hash(held_out, lambda package: package.name)


def print_labels(train: list[Package], held_out: list[Package]) -> None:
    """Label counts over all rows, and how often train's most common answer is right on the held-out rows."""
    for field in ("section", "interface", "language"):
        counts = Counter(getattr(package, field) for package in train + held_out)
        print(f"{field}: " + ", ".join(f"{label} {count}" for label, count in counts.most_common()))
    for field in ("section", "interface", "language", "answer"):
        in_train, in_eval = (
            Counter(package.answer() if field == "answer" else getattr(package, field) for package in side)
            for side in (train, held_out)
        )
        guess = in_train.most_common(1)[0][0]
        right = in_eval[guess]
        print(f"always {guess}: {right} of {len(held_out)} right ({right / len(held_out):.1%})")


def build(index: str, out: Path) -> None:
    """Write both files under `out` and print what was read, kept and dropped."""
    packages, dropped = select(index)
    record_count = len(packages) + dropped.total()
    groups = group(packages, lambda package: package.source, lambda package: package.description)
    train, held_out = split(groups)
    if not train or not held_out:
        raise IndexProblem(
            f"{len(packages)} of the index's {record_count} records have the tags to learn from: "
            "too few to split. Run `apt-get update` where Debian's main archive is listed, then build again."
        )
    for name, side in (("train.jsonl", train), ("eval.jsonl", held_out)):
        write_rows(out / name, (package.row() for package in side))
    print(f"read {record_count} records, kept {len(packages)}")
    for reason, count in dropped.most_common():
        print(f"  dropped {count}: {reason}")
    print(f"{len(groups)} groups, the largest of {max(map(len, groups))}")
    print(f"train.jsonl {len(train)} rows, eval.jsonl {len(held_out)} rows, in {out}")
    print_labels(train, held_out)


if __name__ == "__main__":
    sys.exit(run_builder(__doc__.splitlines()[0], Path(__file__).parent, build, descriptions=False))
