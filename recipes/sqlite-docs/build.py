#!/usr/bin/env python3
"""Build train.jsonl and eval.jsonl from SQLite's documentation: one row a piece of a page, whole pages held out.

Standard library only; README.md beside this file says what the task is and how the rows are cut and split.
"""

import argparse
import sys
import tarfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from debian_index import stable_hash, words, write_rows

FOLDER = "./usr/share/doc/sqlite3"

PAGES = {
    name
    for names in (
        "about affcase1 amalgamation appfileformat arch assert asyncvfs atomiccommit autoinc backup cintro",
        "compile cpu datatype3 deterministic different eqp errlog expridx faq fasterthanfs features fileformat",
        "flextypegood floatingpoint footprint foreignkeys formatchng gencol howitworks howtocompile howtocorrupt",
        "imposter inmemorydb intern-v-extern-blob invalidutf isolation limits loadext lockingv3 locrsf lts malloc",
        "memstat mmap np1queryprob nulinstr omitted onefile optoverview partialindex privatebranch psow qmplan",
        "queryplanner queryplanner-ng quirks rbu recovery rowidtable rowvalue security selfcontained serverless",
        "session sessionintro sharedcache shortnames stricttables swarmvtab tempfiles testing th3 threadsafe",
        "transactional unionvtab unlock_notify uri useovernet vdbe version3 versionnumbers vfs vtab wal walformat",
        "whentouse whyc windowfunctions withoutrowid zeroconf",
    )
    for name in names.split()
}
"""The articles. Left out: lists (functions, pragmas, opcodes, error codes), syntax diagrams, news."""

EVAL_SHARE = 6
"""One page in this many is held out."""

LONGEST = 700
"""Characters of a row. A paragraph that is longer makes a row of its own, or is left out from twice that on."""

SHORTEST = 200
"""A row of fewer characters is left out: the end of a section, which says little without its beginning."""

PAGE_LIMIT = 6
"""How many rows of one page are taken, spread evenly, so that no long page makes up the file."""

NEAR_DUPLICATE = 0.5
"""Share of words (Jaccard) with a held-out row from which a row of another page is left out of train."""

BLOCKS = {"p", "li", "dd", "dt", "blockquote", "h1", "h2", "h3", "h4", "div", "ul", "ol", "dl"}
HEADINGS = {"h1", "h2", "h3", "h4"}
SKIPPED = {"script", "style", "head", "pre", "svg", "table", "s"}
"""Not prose, or (s) what the page itself says is no longer true."""


class SourceProblem(Exception):
    """The archive does not hold the pages."""


class Paragraphs(HTMLParser):
    """The paragraphs of a page in order, each with whether it is a heading; white space as single spaces."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[tuple[bool, str]] = []
        self.text = ""
        self.is_heading = False
        self.skipping: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        classes = (dict(attrs).get("class") or "").split()
        if self.skipping or tag in SKIPPED or (tag == "div" and {"menu", "nosearch", "fancy_toc"} & {*classes}):
            self.skipping += [tag] if not self.skipping or tag == self.skipping[0] else []
            return
        if tag in BLOCKS:
            self.end_paragraph()
            self.is_heading = tag in HEADINGS

    def handle_endtag(self, tag: str) -> None:
        if self.skipping:
            if tag == self.skipping[0]:
                self.skipping.pop()
        elif tag in BLOCKS:
            self.end_paragraph()

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.text += data

    def end_paragraph(self) -> None:
        text = " ".join(self.text.split())
        if text:
            self.paragraphs.append((self.is_heading, text))
        self.text, self.is_heading = "", False


def sections_of(page: str) -> Iterator[list[str]]:
    """The paragraphs below each heading, the heading first, without its number."""
    parser = Paragraphs()
    parser.feed(page)
    parser.end_paragraph()
    section: list[str] = []
    for is_heading, text in parser.paragraphs:
        if is_heading:
            yield section
            section = [text.lstrip("0123456789. ")]
        elif section:
            section.append(text)
    yield section


def rows_of(page: str) -> Iterator[str]:
    """Texts of up to LONGEST characters: the paragraphs of a section until the next one would be too many."""
    for section in sections_of(page):
        piece = ""
        for paragraph in section[1:]:
            if piece and len(piece) + len(paragraph) > LONGEST:
                yield piece
                piece = ""
            piece += ("\n\n" if piece else f"{section[0]}\n\n") + paragraph
        if piece:
            yield piece


def spread(rows: list[str], limit: int) -> list[str]:
    """At most `limit` of the rows, evenly over all of them."""
    return [rows[len(rows) * number // limit] for number in range(limit)] if len(rows) > limit else rows


def read_pages(archive: Path) -> dict[str, str]:
    """The HTML of each article that the archive has."""
    wanted = "Give what `dpkg-deb --fsys-tarfile sqlite3-doc_*.deb > sqlite3-doc.tar` writes."
    pages = {}
    try:
        with tarfile.open(archive) as tar:
            for name in sorted(PAGES & {Path(path).stem for path in tar.getnames() if path.startswith(FOLDER)}):
                file = tar.extractfile(f"{FOLDER}/{name}.html")
                pages[name] = file.read().decode("utf-8") if file else ""
    except (OSError, EOFError, KeyError, tarfile.TarError, UnicodeDecodeError) as error:
        raise SourceProblem(f"--package {archive} cannot be read ({error}). {wanted}") from error
    if not pages:
        raise SourceProblem(f"--package {archive} has none of the articles in {FOLDER}. {wanted}")
    print(f"{len(pages)} of {len(PAGES)} articles")
    return pages


def rows_of_pages(pages: dict[str, str]) -> dict[str, list[str]]:
    """The rows of each page; a text that an earlier page has too is left out."""
    seen: set[str] = set()
    rows_by_page = {}
    for name, page in pages.items():
        rows = [row for row in rows_of(page) if SHORTEST <= len(row) <= 2 * LONGEST and row not in seen]
        seen.update(rows)
        # `sqlite>` is the prompt of a session in a terminal, which is no prose.
        rows_by_page[name] = [row for row in spread(rows, PAGE_LIMIT) if "sqlite>" not in row]
    return rows_by_page


def repeats(row: str, held_out: list[str]) -> bool:
    """Whether a row says much of what a held-out row says."""
    own = words(row)
    return any(len(own & other) >= NEAR_DUPLICATE * len(own | other) for other in map(words, held_out))


def build(archive: Path, out: Path) -> None:
    """Write both files under `out` and print what they hold."""
    pages = rows_of_pages(read_pages(archive))
    held_out = [name for name in pages if stable_hash(f"split {name}") % EVAL_SHARE == 0]
    texts = [row for name in held_out for row in pages[name]]
    for name in pages.keys() - set(held_out):
        pages[name] = [row for row in pages[name] if not repeats(row, texts)]
    for file, names in (("train.jsonl", [name for name in pages if name not in held_out]), ("eval.jsonl", held_out)):
        rows = [{"page": name, "text": row} for name in names for row in pages[name]]
        rows.sort(key=lambda row: stable_hash(f"order {row['text']}"))
        write_rows(out / file, rows)
        characters = sum(len(row["text"]) for row in rows)
        print(f"{file}: {len(rows)} rows of {len(names)} pages, {characters:,} characters")
    print(f"held out: {', '.join(held_out)}")


def main() -> int:
    """Build from the command line; 0, or 2 with a message when the pages are at fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--package", type=Path, required=True, help="the files of Debian's sqlite3-doc, as a tar")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: beside this script")
    arguments = parser.parse_args()
    try:
        build(arguments.package, arguments.out)
    except SourceProblem as problem:
        print(f"build.py: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
