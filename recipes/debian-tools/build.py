#!/usr/bin/env python3
"""Build train.jsonl and eval.jsonl from Debian's package index: a request in words, and the call of the tool for it.

Standard library only; README.md beside this file says what the task is and how the rows are made and split.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from debian_index import IndexProblem, by_hash, records, run_builder, source_of, stable_hash, write_rows

ROWS = {"train.jsonl": 160, "eval.jsonl": 80}
"""At most; fewer where the index has too few packages."""

EVAL_SHARE = 4
"""One source package in this many is held out."""

NAME = re.compile(r"(?!lib)[a-z][a-z0-9+.-]{1,15}(?<!-data)(?<!-common)(?<!-dev)(?<!-doc)")
"""The packages' names that are used: short ones, of what one would ask for."""

TOPIC = re.compile(r"[a-z][A-Za-z0-9 -]{8,36}[a-z]")
"""The descriptions that are searched for: a few plain words."""

SECTIONS = {"games", "graphics", "mail", "net", "sound", "text", "utils", "video", "web"}


def tool(name: str, description: str, /, **properties: dict[str, Any]) -> dict[str, Any]:
    """A function as the column `tools` has it."""
    parameters = {"type": "object", "properties": properties, "required": [next(iter(properties))]}
    return {"name": name, "description": description, "parameters": parameters}


TEXT = {"type": "string"}
TOOLS = [
    tool("search_packages", "Find packages by what they do.", query=TEXT, section=TEXT),
    tool("show_package", "Describe a package.", name=TEXT),
    tool("list_files", "List the files of a package.", name=TEXT),
    tool("find_dependents", "List what depends on a package.", name=TEXT),
    tool("install_packages", "Install packages.", names={"type": "array", "items": TEXT}),
]

CALLS = {
    "search": (
        "Is there a package for {topic}?",
        "I need a program: {topic}.",
        "Find me something like this: {topic}.",
        "Which packages do this: {topic}?",
        "Search for {topic}.",
        "Look for packages: {topic}.",
        "What is there under {topic}?",
        "Can you search the archive for {topic}?",
    ),
    "search in a section": (
        "Is there something in {section} for {topic}?",
        "Search the section {section} for {topic}.",
        "In the {section} section, find {topic}.",
        "Look in {section}: {topic}.",
        "I want a package from {section}: {topic}.",
        "From the section {section}, what is there for {topic}?",
    ),
    "show": (
        "What is {name}?",
        "Tell me about {name}.",
        "What does the package {name} do?",
        "Describe {name}.",
        "Show me the details of {name}.",
        "Give me some information on {name}.",
        "What is {name} good for?",
        "I came across {name}, what is it?",
    ),
    "files": (
        "Which files does {name} have?",
        "List the files of {name}.",
        "What is inside {name}?",
        "What does {name} put on my disk?",
        "Show the contents of the package {name}.",
        "Where does {name} put its files?",
        "I want to see every file in {name}.",
        "What files come with {name}?",
    ),
    "dependents": (
        "What depends on {name}?",
        "Which packages need {name}?",
        "Who uses {name}?",
        "What would break without {name}?",
        "List everything that requires {name}.",
        "Find the packages that depend on {name}.",
        "Is anything built on {name}?",
        "Does any package need {name}?",
    ),
    "install": (
        "Install {names}.",
        "Please install {names}.",
        "I want {names} on this machine.",
        "Get me {names}.",
        "Put {names} on my computer.",
        "Set up {names} for me.",
        "Can you install {names}?",
        "Add {names} to this system.",
    ),
}
"""The requests that a tool answers, by what is asked for; the last two of each are in eval.jsonl alone."""

WORDS = {
    "Which package do you mean?": (
        "What is it?",
        "Install it.",
        "Which files does it have?",
        "What depends on that one?",
        "Tell me about this package.",
        "Please install the other one.",
        "List its files.",
        "Who needs it?",
        "Can you describe that package?",
        "Show me what is inside.",
        "Put that on my computer.",
        "What does this one do?",
    ),
    "None of my tools can do that.": (
        "Remove {name}.",
        "Delete {name} from this machine.",
        "How many people use {name}?",
        "Compile {name} from source.",
        "Who wrote {name}?",
        "Report a bug in {name}.",
        "Downgrade {name}.",
        "Start {name} now.",
        "Update {name} every night.",
        "Which licence does {name} have?",
        "Uninstall {name}.",
        "Send the author of {name} a mail.",
    ),
}
"""The requests that are answered in words; the last three of each are in eval.jsonl alone."""


@dataclass(frozen=True)
class Package:
    """What a request may be about."""

    name: str
    section: str
    topic: str
    held_out: bool


def packages_of(index: str) -> list[Package]:
    """The packages with a short name and a plain description, in hash order, each name and each topic once."""
    packages: dict[str, Package] = {}
    names: set[str] = set()
    for fields in records(index):
        name, topic = fields["Package"], fields.get("Description", "").partition("\n")[0]
        section = fields.get("Section", "").rpartition("/")[2]
        is_plain = NAME.fullmatch(name) and TOPIC.fullmatch(topic) and "transitional" not in topic
        if is_plain and section in SECTIONS and name not in names:
            names.add(name)
            held_out = stable_hash(f"split {source_of(fields)}") % EVAL_SHARE == 0
            packages.setdefault(topic, Package(name, section, topic, held_out))
    return by_hash(packages.values(), lambda package: package.name)


def call(name: str, /, **arguments: Any) -> dict[str, Any]:
    """An answer that calls a tool."""
    return {"role": "assistant", "tool_calls": [{"name": name, "arguments": arguments}]}


def answer_to(kind: str, package: Package, others: list[Package]) -> dict[str, Any]:
    """The answer to a request of this kind about these packages."""
    if kind == "search":
        return call("search_packages", query=package.topic)
    if kind == "search in a section":
        return call("search_packages", query=package.topic, section=package.section)
    if kind == "install":
        return call("install_packages", names=[package.name, *(other.name for other in others)])
    names = {"show": "show_package", "files": "list_files", "dependents": "find_dependents"}
    return call(names[kind], name=package.name) if kind in names else {"role": "assistant", "content": kind}


def wordings_of(wordings: tuple[str, ...], held_out: bool, last: int) -> tuple[str, ...]:
    """The wordings of train.jsonl, or of eval.jsonl."""
    return wordings[-last:] if held_out else wordings[:-last]


def rows_of(packages: list[Package], held_out: bool, count: int) -> list[dict[str, Any]]:
    """The kinds and their wordings in turn, about packages of which none comes twice."""
    rest = [package for package in packages if package.held_out is held_out]
    kinds = {kind: wordings_of(wordings, held_out, 2) for kind, wordings in CALLS.items()}
    kinds |= {kind: wordings_of(wordings, held_out, 3) for kind, wordings in WORDS.items()}
    rows: dict[str, dict[str, Any]] = {}
    number = 0
    while len(rows) < count and len(rest) >= 3:
        turn, kind = number // len(kinds), [*kinds][number % len(kinds)]
        number += 1
        package = rest.pop()
        others = [rest.pop() for _ in range(turn % 3)] if kind == "install" else []
        names = [package.name, *(other.name for other in others)]
        listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
        wording = kinds[kind][turn % len(kinds[kind])]
        request = wording.format(name=package.name, names=listed, topic=package.topic, section=package.section)
        messages = [{"role": "user", "content": request}, answer_to(kind, package, others)]
        rows.setdefault(request, {"tools": TOOLS, "messages": messages})
    return [rows[request] for request in by_hash(rows, str)]


def build(index: str, out: Path) -> None:
    """Write both files under `out` and print what they hold."""
    packages = packages_of(index)
    sides = {file: rows_of(packages, file == "eval.jsonl", count) for file, count in ROWS.items()}
    if not all(sides.values()):
        raise IndexProblem(
            f"the index has {len(packages)} packages with a short name and a plain description: too few. Run "
            "`apt-get update` where Debian's main archive is listed, then build again."
        )
    for file, rows in sides.items():
        write_rows(out / file, rows)
        calls = sum("tool_calls" in row["messages"][-1] for row in rows)
        print(f"{file}: {len(rows)} rows, {calls} of them with a call")


if __name__ == "__main__":
    sys.exit(run_builder(__doc__.splitlines()[0], Path(__file__).parent, build, descriptions=False))
