"""One recipe from several writings: the file, the files it extends, and `--set`; later wins, locations survive."""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lorakit.recipe.paths import path_from
from lorakit.recipe.problem import Location, PathParts, Problem, one_line, quote, show_path
from lorakit.recipe.schema import Recipe
from lorakit.recipe.schema_introspection import alternatives_of, annotation_at
from lorakit.recipe.yaml_reader import MAX_DEPTH, Node, node_of, plain, read_file, read_text

LONGEST_CHAIN = 20
# Two ways to say one thing: whoever writes one of them over another file or with `--set` means it instead of the other.
_PAIRS = (("steps", "epochs"), ("jinja", "jinja_text"), ("system", "system_file"), ("batch_size", "batch_tokens"))
_INSTEAD_OF = {one: other for pair in _PAIRS for one, other in (pair, pair[::-1])}


@dataclass
class Composition:
    """The merged recipe. `complete` is False when something could not be read, so that keys may be lacking."""

    root: Node | None = None
    problems: list[Problem] = field(default_factory=list)
    complete: bool = True
    nodes: dict[str, Node | None] = field(default_factory=dict)
    """The recipe's file and those that it extends, by their real paths: each is read once."""


def compose(path: Path, overrides: Sequence[str | Node] = (), text: str | None = None) -> Composition:
    """Read `path` with everything that it extends, and put each `key=value` of `overrides` over it, or what
    `setting_node` made. `text`: what stands there once the file is written."""
    composition = Composition()
    root = _read(composition, path, (), Location(path), "", text)
    layers = [one if isinstance(one, Node) else _read_setting(composition, one) for one in overrides]
    composition.complete &= None not in layers
    composition.root = functools.reduce(merge, filter(None, layers), root) if root else None
    return composition


def merge(below: Node, above: Node, path: PathParts = ()) -> Node:
    """`above` over `below`: mappings merge key by key, everything else replaces.

    null over a key that takes no null takes away what `below` says: the default holds again. `path`: where both stand.
    """
    if not (isinstance(below.value, dict) and isinstance(above.value, dict)):
        return above
    merged = dict(below.value)
    for key, node in above.value.items():
        if key in merged and node.value is None:
            annotation = annotation_at(Recipe, (*path, key))  # None for an unknown key, which stays to be reported
            if annotation is not None and all(one.kind is not type(None) for one in alternatives_of(annotation)):
                del merged[key]
                continue
        merged[key] = merge(merged[key], node, (*path, key)) if key in merged else node
        if _INSTEAD_OF.get(key) not in above.value and node.value is not None:
            merged.pop(_INSTEAD_OF.get(key, ""), None)
    # A section stays where a file says it: `--set` writes one of its keys, and what it lacks belongs in the file.
    return replace(below if above.place.setting else above, value=merged)


def _read(
    composition: Composition,
    path: Path,
    chain: tuple[str, ...],
    asking: Location,
    subject: str,
    text: str | None = None,
) -> Node | None:
    """`path` over its parents. `chain` is the real paths of the files that lead here."""
    real = os.path.realpath(path)
    if real in composition.nodes:
        return composition.nodes[real]
    node, problems = read_file(path, asking, subject) if text is None else read_text(text, Location(path))
    composition.problems += problems
    if node is None:
        composition.complete = False
    else:
        own = dict(node.value)
        named = {"extends": own.pop("extends")} if "extends" in own else {}
        if named and isinstance(named["extends"].value, list):
            named = {f"extends[{index}]": item for index, item in enumerate(named["extends"].value)}
        parents = [_read_parent(composition, item, name, (*chain, real)) for name, item in named.items()]
        composition.complete &= None not in parents
        node = functools.reduce(merge, [*filter(None, parents), replace(node, value=own)])
    composition.nodes[real] = node
    return node


def _read_parent(composition: Composition, node: Node, subject: str, chain: tuple[str, ...]) -> Node | None:
    example = "Write for example extends: base.yaml, or remove the line."
    if not isinstance(node.value, str) or not node.value.strip() or "\0" in node.value:
        complaint = f"{quote(plain(node))} is not a path or a list of paths", example
    elif "://" in node.value:
        complaint = f"{quote(node.value)} is an address", "Download the file and write its path."
    else:
        path = Path(path_from(node.place.folder, node.value))
        shipped = _shipped_parts() if not os.path.isfile(path) else {}  # noqa: PTH113
        path = shipped.get(node.value, path)
        real, kind = os.path.realpath(path), node.value.partition("/")[0]
        parts = [name for name in shipped if name.startswith(f"{kind}/") and not os.path.isdir(path.parent)]  # noqa: PTH112
        if real in chain:
            ring = " -> ".join(show_path(Path(file)) for file in [*chain[chain.index(real) :], real])
            complaint = f"the files extend each other: {one_line(ring, longest=300)}", "Remove one of these extends."
        elif len(chain) >= LONGEST_CHAIN:
            complaint = f"files extend each other more than {LONGEST_CHAIN} deep", "Merge some of them."
        elif parts:
            remedy = f"Write one of: {', '.join(parts)}."
            complaint = f"there is no file {one_line(node.value)}, and no part of that name", remedy
        else:
            return _read(composition, path, chain, node.place, subject)
    composition.problems.append(Problem(node.place, subject, quote(plain(node)), *complaint))
    return None


def _shipped_parts() -> dict[str, Path]:
    """lorakit's own parts, such as `hardware/8gb`, with their files in the wheel or the checkout; 8gb before 12gb."""
    package = Path(__file__).resolve().parents[1]
    folder = next(path for path in (package / "configs", package.parent / "configs") if path.is_dir())
    parts = {str(path.relative_to(folder).with_suffix("")): path for path in folder.rglob("*.yaml")}
    return dict(sorted(parts.items(), key=lambda part: (len(part[0]), part[0])))


def _read_setting(composition: Composition, override: str) -> Node | None:
    """`a.b=value` as the mapping {a: {b: value}}."""
    name, _, text = override.partition("=")
    place = Location(setting=override)
    if complaint := _why_malformed(override, name.strip().split(".")):
        composition.problems.append(Problem(place, "", one_line(override), *complaint))
        return None
    node, problems = read_text(text, place)
    for problem in problems:
        inner = problem.path if problem.path.startswith("[") else f".{problem.path}"
        composition.problems.append(replace(problem, path=one_line(name.strip() + inner.rstrip("."))))
    return _below(name.strip(), node) if node is not None else None


def setting_node(name: str, value: Any, file: Path) -> Node:
    """A key with a plain value as `--set` would write it, but that its relative paths begin where `file` lies."""
    return _below(name, node_of(value, Location(file, setting=f"{name}={one_line(str(value))}")))


def _below(name: str, node: Node) -> Node:
    """The value of `a.b` as the mapping {a: {b: value}}."""
    for part in reversed(name.split(".")):
        node = Node({part: replace(node, key=node.place)}, node.place)
    return node


def _why_malformed(override: str, parts: list[str]) -> tuple[str, str] | None:
    if not override.isascii() and any("\ud800" <= sign <= "\udfff" for sign in override):
        return "it has bytes that are not text in this terminal's encoding", "Write it in UTF-8 (see LANG)."
    if "=" not in override or not all(parts) or len(parts) > MAX_DEPTH:
        return "this is not of the form key=value", "Write for example --set train.learning_rate=1e-4."
    if "[" in (name := override.partition("=")[0]):
        return "one item of a list cannot be set", f"Set the whole list: {one_line(name.partition('[')[0])}=[...]."
    return ("extends is a key of files", "Write it into the recipe.") if parts[0] == "extends" else None
