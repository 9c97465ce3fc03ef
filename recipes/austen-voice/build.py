#!/usr/bin/env python3
"""Build train.jsonl and eval.jsonl from Jane Austen's novels: notes in, the sentence that they were taken from out.

Standard library only; README.md beside this file says what the task is and how the rows are chosen and split.
"""

import argparse
import re
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from debian_index import by_hash, write_rows

HELD_OUT = "Persuasion"

TRAIN_ROWS, EVAL_ROWS = 120, 100
"""Rows of each novel that is trained on, and of the one that is held out."""

LENGTH = range(60, 151)
"""Characters of a sentence."""

NOTES = range(3, 11)

COMMON_WORDS = 70
"""As many of the commonest words in small letters are no notes."""

CARRY_CONTENT = frozenset(
    (
        *("he", "him", "his", "himself", "she", "her", "herself", "they", "them", "their"),
        *("no", "not", "never", "nothing", "and", "but", "or", "if", "though", "when"),
    )
)
"""Common words that stay in the notes: without them nobody could tell what is to be said."""

SENTENCE_END = re.compile(r"(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)(?<=[.!?]) (?=[A-Z])")
PLAIN = re.compile(r"[A-Z][A-Za-z ,;:.'-]*[.!?]")
"""A sentence without brackets, digits and quotation marks."""

WORD = r"[A-Za-z]+(?:['-][A-Za-z]+)*"

UNKIND = re.compile(r"gips|slave|negro|creole|jew\b|savage|heathen|fat\b|seduc|adulter|mistress", re.IGNORECASE)
"""Sentences that say one of these are left out."""

STRING_VECTOR, STRING = 16, 9
"""Types in R's serialization (R Internals, 1.8): STRSXP, CHARSXP."""


class SourceProblem(Exception):
    """The file does not hold the novels."""


def read_novels(path: Path) -> dict[str, list[str]]:
    """Title -> lines. R keeps a package's data as objects one after the other: four bytes of length, a zlib stream."""
    wanted = "Give usr/lib/R/site-library/janeaustenr/data/Rdata.rdb of Debian's package r-cran-janeaustenr."
    novels = {}
    try:
        data = path.read_bytes()
        while data:
            stream = zlib.decompressobj()
            lines = list(strings(stream.decompress(data[4:])))
            novels[lines[0].title().replace(" And ", " and ")], data = lines, stream.unused_data
    except (OSError, ValueError, IndexError, struct.error, zlib.error) as error:
        raise SourceProblem(f"--novels {path} cannot be read ({error}). {wanted}") from error
    if HELD_OUT not in novels or len(novels) == 1:
        raise SourceProblem(f"--novels {path} has not {HELD_OUT} and other novels. {wanted}")
    return novels


def strings(serialized: bytes) -> Iterator[str]:
    """The elements of a character vector in R's XDR format, version 3."""
    (encoding,) = struct.unpack_from(">14xi", serialized)
    kind, length = struct.unpack_from(">ii", serialized, 18 + encoding)
    if kind & 0xFF != STRING_VECTOR:
        raise ValueError("an object is not a vector of strings")
    place = 26 + encoding
    for _ in range(length):
        kind, size = struct.unpack_from(">ii", serialized, place)
        if kind & 0xFF != STRING:
            raise ValueError("an element is not a string")
        yield serialized[place + 8 : place + 8 + size].decode("utf-8")
        place += 8 + size


def sentences(lines: list[str]) -> list[str]:
    """What the narrator says, each once: of paragraphs without speech; underscores stand for italics."""
    paragraphs = [" ".join(text.split()) for text in "\n".join(lines).replace("_", "").split("\n\n")]
    narrated = (text for paragraph in paragraphs if '"' not in paragraph for text in SENTENCE_END.split(paragraph))
    return [text for text in dict.fromkeys(narrated) if PLAIN.fullmatch(text) and not UNKIND.search(text)]


def notes_of(sentence: str, common: set[str]) -> list[str]:
    """The sentence without its common words: each run of words between two commas or common words is a note."""
    notes, last = [""], ""
    for between, word in re.findall(rf"([^A-Za-z]*)({WORD})", sentence):
        if between.strip(" .") or last in common:
            notes.append("")
        if word.lower() not in common:
            notes[-1] += f" {word}"
        last = word.lower()
    return [note.strip() for note in notes if note]


def build(novels: dict[str, list[str]], out: Path) -> None:
    """Write both files under `out` and print how many sentences each novel has, and gives."""
    narrated = {title: sentences(lines) for title, lines in novels.items()}
    trained_on = " ".join(text for title, texts in narrated.items() if title != HELD_OUT for text in texts)
    counts = Counter(word for word in re.findall(WORD, trained_on) if word.islower() and word not in CARRY_CONTENT)
    common = {word for word, _ in counts.most_common(COMMON_WORDS)}
    sides: dict[str, list[tuple[str, str, str]]] = {"train.jsonl": [], "eval.jsonl": []}
    for title, texts in narrated.items():
        fit = [
            (title, ", ".join(notes), text)
            for text in texts
            if len(text) in LENGTH and len(notes := notes_of(text, common)) in NOTES
        ]
        name, number = ("eval.jsonl", EVAL_ROWS) if title == HELD_OUT else ("train.jsonl", TRAIN_ROWS)
        sides[name] += by_hash(fit, lambda row: row[-1])[:number]
        print(f"{title}: {len(texts)} sentences, {len(fit)} fit, {min(number, len(fit))} rows")
    for name, side in sides.items():
        rows = by_hash(side, lambda row: row[-1])
        write_rows(out / name, ({"prompt": notes, "completion": text, "novel": title} for title, notes, text in rows))


def main() -> int:
    """Build from the command line; 0, or 2 with a message when the file is at fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--novels", type=Path, required=True, help="data/Rdata.rdb of the package r-cran-janeaustenr")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: beside this script")
    arguments = parser.parse_args()
    try:
        build(read_novels(arguments.novels), arguments.out)
    except SourceProblem as problem:
        print(f"build.py: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
