"""What the gallery's builders share: Debian's package index, groups of packages that stay on one side, a split by hash.

Standard library only, like the builders themselves.
"""

import argparse
import hashlib
import itertools
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

NEAR_DUPLICATE = 0.6
"""Share of words (Jaccard) from which two texts count as the same one reworded."""

Item = TypeVar("Item", bound=Hashable)


class IndexProblem(Exception):
    """The package index cannot be read, or holds nothing to build from."""


def read_index(path: Path | None) -> str:
    """The text of a saved index, or what apt-cache prints here."""
    if path:
        return _read_text(path, "--index", "the saved output of `apt-cache dumpavail`")
    return _apt(["apt-cache", "dumpavail"], "save `apt-cache dumpavail > index.txt` there and give --index index.txt")


def read_descriptions(path: Path | None) -> str:
    """The text of a saved file of English descriptions, or of those that apt has here."""
    if path:
        return _read_text(path, "--descriptions", "a `Translation-en` of Debian's archive, unpacked")
    save = "save the file of descriptions there and give --descriptions FILE"
    query = ["apt-get", "-o", "Acquire::Languages=en", "indextargets", "--format", "$(FILENAME)"]
    files = _apt([*query, "Created-By: Translations"], save).split()
    if not files:
        raise IndexProblem("apt has no English descriptions here. Run `apt-get -o Acquire::Languages=en update` first.")
    return "\n\n".join(_apt(["/usr/lib/apt/apt-helper", "cat-file", file], save) for file in files)


def _read_text(path: Path, option: str, wanted: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise IndexProblem(f"{option} {path} cannot be read ({error}). Give {wanted}.") from error


def _apt(command: list[str], instead: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout
    except FileNotFoundError:
        raise IndexProblem(f"{command[0]} is not on this machine. Run on Debian, or {instead}.") from None
    except subprocess.CalledProcessError as error:
        message = f"{' '.join(command)} ended with status {error.returncode}: {error.stderr.strip()}"
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


def source_of(fields: dict[str, str]) -> str:
    """The source package: absent when it equals the name; `gcc-defaults (1.203)` when the versions differ
    (deb-control(5))."""
    return fields.get("Source", fields["Package"]).split()[0]


def paragraphs(descriptions: str) -> dict[str, list[str]]:
    """Description-md5 -> the paragraphs of the long description, each on one line, without lists and examples, which
    Debian indents (policy 5.6.13)."""
    texts = {}
    for fields in records(descriptions):
        _, _, long = fields.get("Description-en", "").partition("\n")
        blocks = re.split(r"^ \.\s*$", long, flags=re.MULTILINE)
        prose = [block for block in blocks if block.strip() and not re.search(r"^(  | [-*+o•] )", block, re.MULTILINE)]
        texts[fields["Description-md5"]] = [" ".join(block.split()) for block in prose]
    return texts


NAMES_SOMEONE = re.compile(
    r"@|\b(by|from|of|author|authors|maintainer) [A-Z][a-z]+ [A-Z]|[A-Z]\w+ [A-Z]\w+'s|\b[A-Z]\. [A-Z][a-z]|"
    r"\b(Dr|Mr|Prof)\b|\b[Aa]uthors?\b|\bwritten by\b"
)
"""What a text about people looks like: such a text becomes no row."""


def beginning(paragraph: str, shortest: int, longest: int) -> str:
    """The whole sentences that fit; empty where that is too little, or the text names someone."""
    text = ""
    for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph):
        if len(text) + 1 + len(sentence) > longest:
            break
        text = f"{text} {sentence}".strip()
    return text if len(text) >= shortest and not NAMES_SOMEONE.search(text) else ""


def words(text: str) -> frozenset[str]:
    """The lower-case words of a text, without punctuation, digits and order."""
    return frozenset(re.findall(r"[^\W\d_]+", text.lower()))


def group(items: list[Item], source: Callable[[Item], str], text: Callable[[Item], str]) -> list[list[Item]]:
    """Items that must not be parted: of one source package, or of the same or nearly the same text.

    The relations chain: a group is a connected component of the graph of items, sources and word sets.
    """
    links: list[tuple[object, object]] = []
    for item in items:
        links += [(item, source(item)), (item, words(text(item)))]
    for a, b in itertools.combinations({words(text(item)) for item in items}, 2):
        if len(a & b) >= NEAR_DUPLICATE * len(a | b):
            links.append((a, b))
    neighbours: dict[object, set[object]] = defaultdict(set)
    for a, b in links:
        neighbours[a].add(b)
        neighbours[b].add(a)

    groups, placed = [], set[object]()
    for item in items:
        if item not in placed:
            component = _reachable(item, neighbours)
            placed |= component
            groups.append([other for other in items if other in component])
    return groups


def _reachable(start: object, neighbours: dict[object, set[object]]) -> set[object]:
    """Every node that a path of links joins to `start`, itself included."""
    reached, todo = {start}, [start]
    while todo:
        new = neighbours[todo.pop()] - reached
        reached |= new
        todo.extend(new)
    return reached


def stable_hash(text: str) -> int:
    """A number that is the same on every machine and in every run, unlike hash()."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def by_hash(items: Iterable[Item], name: Callable[[Item], str], salt: str = "order") -> list[Item]:
    """In the order of a hash of their names."""
    return sorted(items, key=lambda item: stable_hash(f"{salt} {name(item)}"))


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON Lines; the folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def run_builder(purpose: str, folder: Path, build: Callable[..., None], *, descriptions: bool) -> int:
    """Build from the command line; 0, or 2 with a message when the index is at fault. `build` takes the index, the
    long descriptions where the builder reads them, and the folder to write to."""
    parser = argparse.ArgumentParser(description=purpose)
    parser.add_argument("--index", type=Path, help="a saved `apt-cache dumpavail`; default: ask apt-cache")
    if descriptions:
        parser.add_argument("--descriptions", type=Path, help="an unpacked `Translation-en`; default: ask apt")
    parser.add_argument("--out", type=Path, default=folder, help="default: beside the script")
    options = parser.parse_args()
    try:
        texts = [read_descriptions(options.descriptions)] if descriptions else []
        build(read_index(options.index), *texts, options.out)
    except IndexProblem as problem:
        print(f"build.py: {problem}", file=sys.stderr)
        return 2
    return 0
