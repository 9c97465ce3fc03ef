#!/usr/bin/env python3
"""Build train.jsonl and eval.jsonl from Debian's package index: facts on two packages and a question in, an answer out.

Standard library only; README.md beside this file says what the task is and how the rows are made and split.
"""

import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

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

LACKING = "I don't have that information."

LANGUAGES = {"c": "C", "c++": "C++", "perl": "Perl", "python": "Python", "java": "Java", "ruby": "Ruby", "php": "PHP"}
INTERFACES = {
    "x11": "windows on a desktop",
    "commandline": "the command line",
    "text-mode": "full-screen text",
    "daemon": "a background service",
    "web": "a web browser",
}
"""debtags in words."""

TEAM = re.compile(r"^Debian .*(Team|Maintainers|Group|Task Force|Project|Packagers)$", re.IGNORECASE)
"""Maintainers that are a team: a person's name is no fact here."""

STATEMENTS = {
    "version": ("{it} is at version {value}.", "{it} comes in version {value}."),
    "section": ("{it} is in the section {value}.", "{it} belongs to the section {value}."),
    "homepage": ("{it} has its homepage at {value}.", "{it} has a page at {value}."),
    "size": ("{it} takes {value} on disk.", "{it} needs {value} once installed."),
    "team": ("{it} is maintained by the {value}.", "{it} is packaged by the {value}."),
    "recommends": ("{it} recommends {value}.", "{it} is best installed with {value}."),
    "language": ("{it} is written in {value}.", "{it} is implemented in {value}."),
    "interface": ("{it} is used through {value}.", "{it} is operated through {value}."),
}
"""How a context states a fact, by kind."""

QUESTIONS = {
    "version": ("Which version of {name} is there?", "What version does {name} have?", "What is {name}'s version?"),
    "section": ("Which section is {name} in?", "To which section does {name} belong?", "What is {name}'s section?"),
    "homepage": ("Where is the homepage of {name}?", "What is {name}'s homepage?", "Which page does {name} have?"),
    "size": ("How much disk does {name} take?", "How large is {name} on disk?", "What is the size of {name}?"),
    "team": ("Who maintains {name}?", "Which team packages {name}?", "Who is {name}'s maintainer?"),
    "recommends": (
        "What does {name} recommend?",
        "What is best installed with {name}?",
        "Which package goes with {name}?",
    ),
    "language": ("What is {name} written in?", "Which language implements {name}?", "What is {name}'s language?"),
    "interface": ("How is {name} used?", "Through what is {name} operated?", "What is {name}'s interface?"),
}
NEW_QUESTIONS = {
    "version": "I have an old {name}. Which version would I get?",
    "section": "In which part of the archive would I look for {name}?",
    "homepage": "I want to read about {name} on the web. Where?",
    "size": "My disk is nearly full. How much would {name} need?",
    "team": "To whom do I report a bug in {name}?",
    "recommends": "I am about to install {name}. What should I add?",
    "language": "I want to change the code of {name}. Which language do I need?",
    "interface": "Once {name} is installed, how do I work with it?",
}
"""How a question is put: the first are in both files, the second in eval.jsonl alone."""

TRAIN_ROWS, EVAL_ROWS = 800, 180
EVAL_SHARE = 4
"""One group of packages in this many is held out."""

Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Package:
    """A package and what is known of it: pairs of kind and value."""

    name: str
    source: str
    description: str
    facts: tuple[tuple[str, str], ...]


def facts_of(fields: dict[str, str]) -> dict[str, str]:
    """What a record says, by kind, in the words of an answer; without what is long or names a person."""
    tags = fields.get("Tag", "")
    languages = [LANGUAGES[tag] for tag in tag_values(tags, "implemented-in") if tag in LANGUAGES]
    interfaces = [INTERFACES[tag] for tag in tag_values(tags, "interface") if tag in INTERFACES]
    team = fields.get("Maintainer", "").partition("<")[0].strip(' "')
    recommended = re.split(r"[ ,|:(]", fields.get("Recommends", ""))[0]
    homepage = re.sub(r"^https?://(www\.)?|/$", "", fields.get("Homepage", ""))
    facts = {
        # Without the epoch and Debian's revision: 1:2.2.12+ds-3 is 2.2.12.
        "version": re.sub(r"^\d+:|[-+~].*$", "", fields["Version"]),
        "section": fields["Section"].rpartition("/")[2],
        "homepage": "" if "/" in homepage else homepage,  # a path often has the name of an account
        "size": f"{fields['Installed-Size']} kB",
        "team": team if TEAM.match(team) else "",
        "recommends": recommended,
        "language": languages[0] if len(languages) == 1 else "",
        "interface": interfaces[0] if len(interfaces) == 1 else "",
    }
    limits = {"version": 10, "homepage": 24, "team": 32, "recommends": 20}
    return {kind: value for kind, value in facts.items() if value and len(value) <= limits.get(kind, 99)}


def select(index: str) -> list[Package]:
    """Programs with a short name of which nearly everything is known."""
    packages = {}
    for fields in records(index):
        name = fields["Package"]
        if name in packages or len(name) > 14 or "interface::" not in fields.get("Tag", ""):
            continue
        facts = facts_of(fields)
        if len(facts) >= len(STATEMENTS) - 2:
            description = fields["Description"].splitlines()[0]
            packages[name] = Package(name, source_of(fields), description, tuple(facts.items()))
    return list(packages.values())


def pick(choices: Sequence[Choice], draw: str) -> Choice:
    """One of them, by a hash: the same on every machine and in every version of Python."""
    return choices[stable_hash(draw) % len(choices)]


def state(package: Package, kinds: Sequence[str], draw: str) -> str:
    """Sentences with these facts on a package, which has its name in the first and is `It` in the others."""
    facts, sentences = dict(package.facts), []
    for kind in by_hash(kinds, str, f"{draw} order"):
        statement = pick(STATEMENTS[kind], f"{draw} {kind}")
        sentences.append(statement.format(it="It" if sentences else package.name, value=facts[kind]))
    return " ".join(sentences)


def make_row(number: int, packages: list[Package], side: str) -> dict[str, str]:
    """A context on two packages, and a question on one of them whose answer it has or lacks: every third one lacks it.
    What is asked of is then stated of the other package, or of neither, or the question is on a third package."""
    draw = f"{side} {number}"
    kind = pick(list(STATEMENTS), f"{draw} kind")
    with_kind = [package for package in packages if kind in dict(package.facts)]
    subject = pick(with_kind, f"{draw} subject")
    others = [package for package in with_kind if package.source != subject.source]
    other = pick(others, f"{draw} other")
    third = pick([package for package in others if package != other], f"{draw} third")
    lacking = number % 3 == 0
    how = pick(("other", "other", "neither", "third"), f"{draw} how") if lacking else ""
    of_other = how in ("other", "third") or (not lacking and pick((True, False), f"{draw} of other"))
    contents = [
        (third if how == "third" else subject, [kind] * (how in ("", "third"))),
        (other, [kind] * of_other),
    ]
    texts = []
    for package, stated in contents:
        rest = by_hash((name for name, _ in package.facts if name != kind), str, f"{draw} {package.name}")
        texts.append(state(package, [*stated, *rest][:2], f"{draw} {package.name}"))
    wordings = QUESTIONS[kind]
    new = side == "eval" and number % 2 == 0
    question = NEW_QUESTIONS[kind] if new else pick(wordings, f"{draw} wording")
    return {
        "context": " ".join(by_hash(texts, str, f"{draw} texts")),
        "question": question.format(name=subject.name),
        "answer": LACKING if lacking else dict(subject.facts)[kind],
        "task": "lacking" if lacking else "answerable",
        "kind": kind,
        "wording": "new" if new else "known",
    }


def split(packages: list[Package]) -> tuple[list[Package], list[Package]]:
    """Packages of the training contexts, and of the held-out ones: a group is on one side only."""
    train: list[Package] = []
    held_out: list[Package] = []
    for members in group(packages, lambda package: package.source, lambda package: package.description):
        key = min(package.name for package in members)
        (held_out if stable_hash(f"split {key}") % EVAL_SHARE == 0 else train).extend(members)
    return train, held_out


def build(index: str, out: Path) -> None:
    """Write both files under `out` and print what was read and made."""
    packages = select(index)
    sides = split(packages)
    counts = [Counter(kind for package in side for kind, _ in package.facts) for side in sides]
    if any(count[kind] < 3 for count in counts for kind in STATEMENTS):
        raise IndexProblem(
            f"{len(packages)} of the index's packages are known well enough: too few to ask about. Run "
            "`apt-get update` where Debian's main archive is listed, then build again."
        )
    for name, side, rows in (("train", sides[0], TRAIN_ROWS), ("eval", sides[1], EVAL_ROWS)):
        write_rows(out / f"{name}.jsonl", (make_row(number, side, name) for number in range(rows)))
        print(f"{name}.jsonl: {rows} rows on {len(side)} packages, in {out}")
    print("packages by fact: " + ", ".join(f"{kind} {(counts[0] + counts[1])[kind]}" for kind in STATEMENTS))


if __name__ == "__main__":
    sys.exit(run_builder(__doc__.splitlines()[0], Path(__file__).parent, build, descriptions=False))
