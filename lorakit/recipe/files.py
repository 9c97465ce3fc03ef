"""Recipe files on disk: found, decoded, and read as one mapping."""

import os
from pathlib import Path
from typing import Any

from lorakit.recipe.did_you_mean import nearest_file
from lorakit.recipe.problem import Location, Problem, quote, show_path
from lorakit.recipe.yaml_reader import Node, position, read_text

MAX_BYTES = 1_000_000


def read_file(path: Path, asked: Location, subject: str = "") -> tuple[Node | None, list[Problem]]:
    """Read a file whose top level is a mapping; None when it cannot be read.

    `asked` and `subject` are the place and the dotted name of what asks for the file: a file that cannot be opened is
    that one's mistake.
    """
    complaint = _no_file(path)
    if complaint:
        return None, [Problem(asked, subject, str(path), *complaint)]
    try:
        raw = path.read_bytes()
    except OSError as error:
        reason = f"{show_path(path)} cannot be read: {error.strerror}"
        return None, [Problem(asked, subject, str(path), reason, "Check its permissions.")]
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8", errors="replace")
        place = Location(path).at(*position(before, len(before)))
        reason = f"byte 0x{raw[error.start]:02x} is not UTF-8"
        return None, [Problem(place, "", "", reason, "Save the file as UTF-8.")]
    node, problems = read_text(text, Location(path))
    if node is None or isinstance(node.value, dict):
        return node, problems
    return None, [*problems, _no_mapping(node)]


def _no_file(path: Path) -> tuple[str, str] | None:
    name = show_path(path)
    if not os.path.exists(path):  # noqa: PTH110 (Path.exists raises for names that are too long or hold a NUL)
        near = nearest_file(path)
        remedy = f"Did you mean {show_path(path.parent / near)}?" if near else "Write the path of a YAML file."
        return f"there is no file {name}", remedy
    if path.is_dir():
        inside = path / "recipe.yaml"
        remedy = f"Did you mean {show_path(inside)}?" if inside.is_file() else "Write the path of a YAML file."
        return f"{name} is a folder, not a file", remedy
    if not path.is_file():
        return f"{name} is a device, not a file", "Write the path of a YAML file."
    if path.stat().st_size > MAX_BYTES:
        return f"{name} is larger than 1 MB", "A recipe holds settings, not data."
    return None


def _no_mapping(node: Node) -> Problem:
    value: Any = node.value
    if value is None:
        return Problem(node.place, "", "", "the file says nothing", "Write at least model.base and data.train.")
    given = "a list" if isinstance(value, list) else f"the single value {quote(value)}"
    remedy = "Write `key: value` lines, with a space behind each colon."
    return Problem(node.place, "", quote(value), f"the file is {given}, not a mapping", remedy)
