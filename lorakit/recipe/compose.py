"""One recipe from several writings: the file, the files it extends, and `--set`; later wins, places survive."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lorakit.recipe.problem import Location, PathParts, Problem, one_line, quote, show_path
from lorakit.recipe.schema import Recipe
from lorakit.recipe.schema_introspection import alternatives_of, annotation_at
from lorakit.recipe.yaml_reader import MAX_DEPTH, Node, plain, read_file, read_text

LONGEST_CHAIN = 20

# Two ways to say one thing: whoever writes one of them over another file or with `--set` means it instead of the other.
_INSTEAD_OF = {"steps": "epochs", "epochs": "steps"}

_EXAMPLE = "Write for example extends: base.yaml, or remove the line."
_FORM = "Write for example --set train.learning_rate=1e-4."


@dataclass(frozen=True)
class Composed:
    """The merged recipe. `complete` is False when something could not be read, so that keys may be lacking."""

    root: Node | None
    problems: tuple[Problem, ...]
    complete: bool
    files: tuple[Path, ...] = ()
    """The recipe's file and those that it extends, by their real paths."""


@dataclass
class _Reading:
    """The files read so far, by their real path: a file that several others extend is read once."""

    known: dict[str, Node | None] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    complete: bool = True


def compose(path: Path, overrides: Sequence[str] = ()) -> Composed:
    """Read `path` with everything that it extends, and put each `key=value` of `overrides` over it."""
    reading = _Reading()
    root = _file(reading, path, (), Location(path), "")
    for override in overrides:
        layer = _setting(reading, override)
        if root is None or layer is None:
            reading.complete = False
        else:
            root = merge(root, layer)
    files = tuple(Path(name) for name in reading.known)
    return Composed(root, tuple(reading.problems), reading.complete, files)


def merge(below: Node, above: Node, path: PathParts = ()) -> Node:
    """`above` over `below`: mappings merge key by key, everything else replaces.

    null over a key that takes no null takes away what `below` says: the default holds again. `path`: where both stand.
    """
    if not (isinstance(below.value, dict) and isinstance(above.value, dict)):
        return above
    merged = dict(below.value)
    for key, node in above.value.items():
        if key in merged and node.value is None and not _takes_null((*path, key)):
            del merged[key]
            continue
        merged[key] = merge(merged[key], node, (*path, key)) if key in merged else node
        if _INSTEAD_OF.get(key) not in above.value and node.value is not None:
            merged.pop(_INSTEAD_OF.get(key, ""), None)
    # A section stays where a file says it: `--set` writes one of its keys, and what it lacks belongs in the file.
    kept = below if above.place.setting else above
    return replace(kept, value=merged)


def _takes_null(path: PathParts) -> bool:
    """Whether null is a value of this key; an unknown key is left as it is, to be told of."""
    annotation = annotation_at(Recipe, path)
    return annotation is None or any(branch.kind is type(None) for branch in alternatives_of(annotation))


def _file(reading: _Reading, path: Path, chain: tuple[str, ...], asked: Location, subject: str) -> Node | None:
    """`path` over its parents. `chain` is the real paths of the files that lead here."""
    real = os.path.realpath(path)
    if real in reading.known:
        return reading.known[real]
    node, problems = read_file(path, asked, subject)
    reading.problems += problems
    if node is not None:
        own = {key: child for key, child in node.value.items() if key != "extends"}
        merged: Node | None = None
        for parent in _parents(reading, node.value.get("extends"), (*chain, real)):
            merged = merge(merged, parent) if merged else parent
        node = replace(node, value=own)
        node = merge(merged, node) if merged else node
    else:
        reading.complete = False
    reading.known[real] = node
    return node


def _parents(reading: _Reading, extends: Node | None, chain: tuple[str, ...]) -> list[Node]:
    if extends is None:
        return []
    written = extends.value if isinstance(extends.value, list) else [extends]
    parents = []
    for index, node in enumerate(written):
        subject = f"extends[{index}]" if written is extends.value else "extends"
        parent = _parent(reading, node, subject, chain)
        if parent is None:
            reading.complete = False
        else:
            parents.append(parent)
    return parents


def _parent(reading: _Reading, node: Node, subject: str, chain: tuple[str, ...]) -> Node | None:
    complaint = _no_path(node)
    if complaint is None:
        # os.path rather than pathlib, which raises for `~nobody` and for names that are too long.
        path = Path(os.path.normpath(node.place.folder / os.path.expanduser(node.value)))  # noqa: PTH111
        path = path if os.path.isfile(path) else _shipped(node.value) or path  # noqa: PTH113
        complaint = _endless(path, chain)
        if complaint is None:
            known = None if os.path.isdir(path.parent) else _known_parts(node.value)  # noqa: PTH112
            if known is None:
                return _file(reading, path, chain, node.place, subject)
            complaint = f"there is no file {one_line(node.value)}, and no part of that name", known
    reading.problems.append(Problem(node.place, subject, quote(plain(node)), *complaint))
    return None


def _shipped(text: str) -> Path | None:
    """The part that comes with lorakit under a name such as `hardware/8gb`: in the wheel, or in a checkout."""
    if not re.fullmatch(r"[a-z0-9-]+(/[a-z0-9-]+)+", text):
        return None
    return next((path for folder in _shipped_folders() if os.path.isfile(path := folder / f"{text}.yaml")), None)  # noqa: PTH113


def _shipped_folders() -> tuple[Path, Path]:
    package = Path(__file__).resolve().parents[1]
    return package / "configs", package.parent / "configs"


def _known_parts(text: str) -> str | None:
    """The parts that come with lorakit in the folder that a name means; None where it means none of theirs."""
    kind = text.partition("/")[0]
    folder = next((found for configs in _shipped_folders() if kind and os.path.isdir(found := configs / kind)), None)  # noqa: PTH112
    if folder is None or "/" not in text:
        return None
    names = sorted((path.stem for path in folder.glob("*.yaml")), key=lambda name: (len(name), name))  # 8gb before 12gb
    return f"Write one of: {', '.join(f'{kind}/{name}' for name in names)}."


def _no_path(node: Node) -> tuple[str, str] | None:
    if not isinstance(node.value, str) or not node.value.strip() or "\0" in node.value:
        return f"{quote(plain(node))} is not a path or a list of paths", _EXAMPLE
    if "://" in node.value:
        return f"{quote(node.value)} is an address", "Download the file and write its path."
    return None


def _endless(path: Path, chain: tuple[str, ...]) -> tuple[str, str] | None:
    real = os.path.realpath(path)
    if real in chain:
        ring = " -> ".join(show_path(Path(file)) for file in [*chain[chain.index(real) :], real])
        return f"the files extend each other: {one_line(ring, longest=300)}", "Remove one of these extends."
    if len(chain) >= LONGEST_CHAIN:
        return f"files extend each other more than {LONGEST_CHAIN} deep", "Merge some of them."
    return None


def _setting(reading: _Reading, override: str) -> Node | None:
    """`a.b=value` as the mapping {a: {b: value}}."""
    name, _, text = override.partition("=")
    place = Location(setting=override)
    complaint = _malformed(override)
    if complaint:
        reading.problems.append(Problem(place, "", one_line(override), *complaint))
        return None
    node, problems = read_text(text, place)
    reading.problems += [_under(name.strip(), problem) for problem in problems]
    for part in reversed(name.strip().split(".")):
        if node is not None:
            node = Node({part: replace(node, key=place)}, place)
    return node


def _malformed(override: str) -> tuple[str, str] | None:
    name, equals, _ = override.partition("=")
    parts = name.strip().split(".")
    if not override.isascii() and any("\ud800" <= sign <= "\udfff" for sign in override):
        return (
            "it has bytes that are not text in this terminal's encoding",
            "Write it in UTF-8 (the locale tells, LANG).",
        )
    if not equals or not all(parts):
        return "this is not of the form key=value", _FORM
    if len(parts) > MAX_DEPTH:
        return f"no key is {len(parts)} levels deep", _FORM
    if "[" in name:
        return "one item of a list cannot be set", f"Set the whole list: {one_line(name.partition('[')[0])}=[...]."
    if parts[0] == "extends":
        return "extends is a key of files", "Write it into the recipe."
    return None


def _under(name: str, problem: Problem) -> Problem:
    """A problem in the value of a setting, named from the top of the recipe."""
    inner = problem.path if problem.path.startswith("[") or not problem.path else f".{problem.path}"
    return replace(problem, path=one_line(name + inner))
