#!/usr/bin/env python3
"""Build train.jsonl and eval.jsonl from The Devil's Dictionary: a word is asked for, the answer is Bierce's entry.

Standard library only; README.md beside this file says what the task is and how entries are chosen and split.
"""

import argparse
import gzip
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from debian_index import by_hash, stable_hash, write_rows

ENTRY = re.compile(r"^([A-Z][A-Z'-]+(?: [A-Z'-]+)?), (?:n|adj|v|adv|p)[\w.]*\s+", re.MULTILINE)
"""Where an entry begins: its word, and its part of speech, such as `v.t.`"""

LENGTH = range(20, 271)
"""Characters of an entry that is taken: longer ones are essays."""

EVAL_SHARE = 5
"""One group of entries in this many is held out."""

QUESTIONS = (
    "Define {word}.",
    "What does {word} mean?",
    "What is the meaning of the word {word}?",
    "Give me a definition of {word}.",
    "How would you define {word}?",
    "Explain the word {word}.",
)

UNKIND = re.compile(
    r"wom[ae]n|wife|wives|widow|female|maid|lady|ladies|girl|daughter|mother|bride|marri|wed|feminin|negro|black|white"
    r"|race|indian|savage|aborig|jew|hebrew|christian|mussulman|mohammed|moslem|turk|pagan|heathen|infidel|chin[ae]"
    r"|afric|asia|irish|german|french|scot|italian|mormon|catholic|papal|priest|clergy|church|religio|god|idiot|lunatic"
    r"|fool|insan|mad\b|mentally|deform|cripple|suicid|murder|kill|hang|slave|whip|rape|sex|naked|nud|breast|hell\b|damn"
    r"|african|mulatto|octoroon|gypsy|barbar|heretic|bigot|crucif|christ|koran|bible|saint|witch|flog|corpse|cannibal"
    r"|immigra|alien|russia|imbecil|assassin|polygam|bigam|apache|cherok|corset|matrimon|matron|husband|mistress",
    re.IGNORECASE,
)
"""Entries that say one of these are left out: Bierce wrote for the newspapers of 1881 to 1906, and of women, peoples,
faiths and the sick as they did. The net is wide: most of what it catches would be harmless."""


class SourceProblem(Exception):
    """The file is not the dictionary."""


@dataclass(frozen=True)
class Entry:
    """A word and what the dictionary says of it."""

    word: str
    text: str

    def row(self) -> dict[str, Any]:
        """The row, its question one of several by a hash."""
        question = QUESTIONS[stable_hash(f"question {self.word}") % len(QUESTIONS)].format(word=self.word.lower())
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": self.text}]}


def read_dictionary(path: Path) -> str:
    """The text of the dictionary: a dictd file is one that gzip can read."""
    try:
        return gzip.decompress(path.read_bytes()).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        wanted = "Give usr/share/dictd/devil.dict.dz of Debian's package dict-devil."
        raise SourceProblem(f"--dictionary {path} cannot be read ({error}). {wanted}") from error


def entries_of(text: str) -> list[Entry]:
    """Each entry's first paragraph: what follows it is verse, or a tale. Empty where verse stands in it."""
    starts = [*ENTRY.finditer(text)]
    ends = [start.start() for start in starts[1:]] + [len(text)]
    entries = []
    for start, end in zip(starts, ends, strict=True):
        first = text[start.end() : end].split("\n\n")[0]
        paragraph = "" if "\n " in first else " ".join(first.split())
        # Underscores stand for italics; `--` for a dash; words cut at the end of a line.
        paragraph = re.sub(r"(\w)- (?=\w)", r"\1-", paragraph.replace("_", "").replace(" [sic]", ""))
        entries.append(Entry(start[1], paragraph))
    return entries


def reason_to_drop(entry: Entry, count: int) -> str | None:
    """Why this entry becomes no row, or None; `count`: how many entries have its word."""
    if count > 1:
        return "a word with several entries"
    if len(entry.text) not in LENGTH:
        return f"shorter than {LENGTH.start} or longer than {LENGTH.stop - 1} characters"
    if not entry.text.endswith((".", "!", "?")) or not entry.text[0].isupper():
        return "not whole sentences: verse follows"
    if re.match(r"See |A variant|The past|Same as", entry.text):
        return "refers to another entry"
    if UNKIND.search(f"{entry.word} {entry.text}"):
        return "may be unkind to somebody"
    return None


def stem(word: str) -> str:
    """What words of one family begin with: ADMIRAL and ADMIRATION are taken for one too."""
    return word[:5]


def build(text: str, out: Path) -> None:
    """Write both files under `out` and print what was read, kept and dropped."""
    entries = entries_of(text)
    if not entries:
        raise SourceProblem("the dictionary has no entries. Give devil.dict.dz of the package dict-devil.")
    counts = Counter(entry.word for entry in entries)
    reasons = [reason_to_drop(entry, counts[entry.word]) for entry in entries]
    rows = [entry for entry, reason in zip(entries, reasons, strict=True) if reason is None]
    rows = by_hash(rows, lambda entry: entry.word)
    print(f"read {len(entries)} entries, kept {len(rows)}")
    for reason, number in Counter(filter(None, reasons)).most_common():
        print(f"  dropped {number}: {reason}")
    for name, held_out in (("train.jsonl", False), ("eval.jsonl", True)):
        side = [row for row in rows if (stable_hash(f"split {stem(row.word)}") % EVAL_SHARE == 0) is held_out]
        write_rows(out / name, (row.row() for row in side))
        print(f"{name}: {len(side)} rows")


def main() -> int:
    """Build from the command line; 0, or 2 with a message when the dictionary is at fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dictionary", type=Path, required=True, help="devil.dict.dz of the package dict-devil")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: beside this script")
    arguments = parser.parse_args()
    try:
        build(read_dictionary(arguments.dictionary), arguments.out)
    except SourceProblem as problem:
        print(f"build.py: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
