#!/usr/bin/env python3
"""Build train.jsonl and eval.jsonl from Debian's package index: one description in, one JSON object out.

Standard library only; README.md beside this file says what the task is and how the rows are chosen and split.
"""

import argparse
import hashlib
import itertools
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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

NEAR_DUPLICATE = 0.6
"""Share of words (Jaccard) from which two descriptions count as the same one reworded."""


class IndexProblem(Exception):
    """The package index cannot be read, or holds nothing to build from."""


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

    def row(self) -> str:
        """One line of the JSONL files, without its newline."""
        user = {"role": "user", "content": f"{self.name} - {self.description}"}
        assistant = {"role": "assistant", "content": self.answer()}
        return json.dumps({"messages": [user, assistant]}, ensure_ascii=False)


def read_index(path: Path | None) -> str:
    """The text of the index: the saved copy at `path`, or what apt-cache prints when there is none."""
    if path is not None:
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            wanted = "Give the saved output of `apt-cache dumpavail`."
            raise IndexProblem(f"--index {path} cannot be read ({error}). {wanted}") from error
    try:
        command = ["apt-cache", "dumpavail"]
        return subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout
    except FileNotFoundError:
        wanted = "Run on Debian, or save `apt-cache dumpavail > index.txt` there and give --index index.txt."
        raise IndexProblem(f"apt-cache is not on this machine. {wanted}") from None
    except subprocess.CalledProcessError as error:
        message = f"apt-cache dumpavail ended with status {error.returncode}: {error.stderr.strip()}"
        raise IndexProblem(message) from error


def records(index: str) -> Iterator[dict[str, str]]:
    """The index's paragraphs as field to value; a value that runs over several lines keeps its newlines."""
    for paragraph in index.split("\n\n"):
        fields: dict[str, str] = {}
        for field in re.split(r"\n(?![ \t])", paragraph.strip("\n")):
            key, colon, value = field.partition(":")
            if colon:
                fields[key] = value.strip()
        if fields:
            yield fields


def tag_values(tags: str, facet: str) -> list[str]:
    """The values of one debtags facet: `c++` for `implemented-in` in `implemented-in::c++, role::program`."""
    pairs = (tag.strip().partition("::") for tag in tags.split(","))
    return [value for key, _, value in pairs if key == facet]


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
        # Absent when it equals the name; `gcc-defaults (1.203)` when the versions differ (deb-control(5)).
        source=fields.get("Source", fields["Package"]).split()[0],
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


def words(description: str) -> frozenset[str]:
    """The normalised description: its lower-case words, without punctuation, digits and order."""
    return frozenset(re.findall(r"[^\W\d_]+", description.lower()))


def group(packages: list[Package]) -> list[list[Package]]:
    """Packages that must not be parted: of one source package, or of the same or nearly the same description.

    The relations chain: a group is a connected component of the graph of packages, sources and word sets.
    """
    links: list[tuple[object, object]] = []
    for package in packages:
        links += [(package, package.source), (package, words(package.description))]
    for a, b in itertools.combinations({words(package.description) for package in packages}, 2):
        if len(a & b) >= NEAR_DUPLICATE * len(a | b):
            links.append((a, b))
    neighbours: dict[object, set[object]] = defaultdict(set)
    for a, b in links:
        neighbours[a].add(b)
        neighbours[b].add(a)

    groups, placed = [], set()
    for package in packages:
        if package not in placed:
            component = reachable(package, neighbours)
            placed |= component
            groups.append([member for member in component if isinstance(member, Package)])
    return groups


def reachable(start: object, neighbours: dict[object, set[object]]) -> set[object]:
    """Every node that a path of links joins to `start`, itself included."""
    found, todo = {start}, [start]
    while todo:
        new = neighbours[todo.pop()] - found
        found |= new
        todo.extend(new)
    return found


def stable_hash(text: str) -> int:
    """A number that is the same on every machine and in every run, unlike hash()."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split(groups: list[list[Package]]) -> tuple[list[Package], list[Package]]:
    """Train and held-out packages, in hash order; a group's side hangs on its first name and its size."""
    train, held_out = [], []
    for members in groups:
        key = min(package.name for package in members)
        drawn = stable_hash(f"split {key}") % EVAL_SHARE == 0
        (held_out if drawn and len(members) <= EVAL_GROUP_LIMIT else train).extend(members)
    for side in (train, held_out):
        side.sort(key=lambda package: stable_hash(f"order {package.name}"))
    return train, held_out


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
    groups = group(packages)
    train, held_out = split(groups)
    if not train or not held_out:
        raise IndexProblem(
            f"{len(packages)} of the index's {record_count} records have the tags to learn from: "
            "too few to split. Run `apt-get update` where Debian's main archive is listed, then build again."
        )
    out.mkdir(parents=True, exist_ok=True)
    for name, side in (("train.jsonl", train), ("eval.jsonl", held_out)):
        (out / name).write_text("".join(package.row() + "\n" for package in side), encoding="utf-8")
    print(f"read {record_count} records, kept {len(packages)}")
    for reason, count in dropped.most_common():
        print(f"  dropped {count}: {reason}")
    print(f"{len(groups)} groups, the largest of {max(map(len, groups))}")
    print(f"train.jsonl {len(train)} rows, eval.jsonl {len(held_out)} rows, in {out}")
    print_labels(train, held_out)


def main() -> int:
    """Build from the command line; 0, or 2 with a message when the index is at fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--index", type=Path, help="a saved `apt-cache dumpavail`; default: ask apt-cache")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: beside this script")
    arguments = parser.parse_args()
    try:
        build(read_index(arguments.index), arguments.out)
    except IndexProblem as problem:
        print(f"build.py: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
