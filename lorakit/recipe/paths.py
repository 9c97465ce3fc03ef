"""Paths in a recipe: told apart from hub ids, made absolute against the file that names them, checked to exist."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit.recipe.adapter_kind import adapter_folder, initial_adapter
from lorakit.recipe.chat_templates import CHAT_TEMPLATES, is_template_name
from lorakit.recipe.data_files import KNOWN_SUFFIXES, TooManyFiles, data_files, data_suffix, is_pattern, pattern_start
from lorakit.recipe.did_you_mean import nearest, nearest_file
from lorakit.recipe.fields import PathRole
from lorakit.recipe.problem import PathParts, Problem, dotted_name, one_line, quote, show_path
from lorakit.recipe.schema import Recipe
from lorakit.recipe.schema_introspection import annotation_at, path_role
from lorakit.recipe.yaml_reader import Node, children, other_notation

_HUB_ID = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*/)?[A-Za-z0-9][A-Za-z0-9._-]*")
_ON_THE_HUB = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)(?:datasets/|models/)?([\w.-]+/[\w.-]+)"
)
"""An address of the hub, and the id in it."""
_LONGEST_TEXT = 100_000  # bytes of a file that is taken into a recipe, which itself has a MB at most
_PATH_STARTS = ("/", "./", "../", "~")


def is_path(reference: str) -> bool:
    """Whether a reference of a loaded recipe is a path (then it is absolute) or a hub id."""
    return os.path.isabs(reference)  # noqa: PTH117


def resolve_paths(root: Node, ended: bool = False) -> tuple[Any, list[Problem]]:
    """The plain data of `root` with absolute paths, the files that a recipe takes in as their texts, and a problem for
    each reference that leads nowhere.

    Of a run that has `ended` nothing must be there: it is missed by what reads it.
    """
    problems: list[Problem] = []

    def resolve(node: Node, annotation: Any, path: PathParts) -> Any:
        inner = {part: resolve(one, annotation_at(annotation, (part,)), (*path, part)) for part, one in children(node)}
        if isinstance(node.value, list):
            return list(inner.values())
        if isinstance(node.value, dict):
            return inner | inline_texts(node, inner, annotation, path)
        role = path_role(annotation)
        if role is None or not isinstance(node.value, str) or not node.value:
            return node.value
        name = absolute_path(node.value, role, node.place.folder)
        complaint = None if ended else _complaint(node, name, role, path)
        if complaint:
            problems.append(Problem(node.place, dotted_name(path), quote(node.value), *complaint))
        return name or node.value

    def inline_texts(node: Node, inner: dict[Any, Any], annotation: Any, path: PathParts) -> dict[str, Any]:
        texts: dict[str, Any] = {}
        for key, child, role in _inlined_keys(node, annotation):
            name = dotted_name((*path, key))
            if inner.get(role.inlined) is not None or any(problem.path == name for problem in problems):
                continue
            text = _read_short_text(Path(inner[key]))
            if isinstance(text, str):
                texts |= {key: None, role.inlined: text}
            else:
                problems.append(Problem(child.place, name, quote(child.value), *text))
        return texts

    return resolve(root, Recipe, ()), problems


def _inlined_keys(node: Node, annotation: Any) -> Iterator[tuple[str, Node, PathRole]]:
    """The keys of a mapping that name a file whose text the recipe takes in."""
    for key, child in children(node):
        role = path_role(annotation_at(annotation, (key,)))
        if role and role.inlined and isinstance(child.value, str) and child.value:
            yield str(key), child, role


def inlined_files(root: Node, annotation: Any = Recipe) -> Iterator[Path]:
    """The files whose texts a loaded recipe holds."""
    if isinstance(root.value, dict):
        for _, child, role in _inlined_keys(root, annotation):
            yield Path(absolute_path(child.value, role, child.place.folder) or "")
    for part, inner in children(root):
        yield from inlined_files(inner, annotation_at(annotation, (part,)))


def _read_short_text(path: Path) -> str | tuple[str, str]:
    """The text of a file, or why a recipe cannot hold it and what to write instead."""
    try:
        if path.stat().st_size > _LONGEST_TEXT:
            return f"the file has more than {_LONGEST_TEXT:,} bytes", "Write a shorter one."
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        return f"the file cannot be read: {error}", "Save it as UTF-8, where this user may read it."
    return text or ("the file is empty", "Write what stands there into it.")


def absolute_path(text: str, role: PathRole, folder: Path) -> str | None:
    """The absolute path that `text` means, seen from `folder`; None when it is not a path."""
    if "\0" in text or (role.or_template and is_template_name(text)):
        return None
    path = path_from(folder, text)
    looks_so = text.startswith(_PATH_STARTS) or text.endswith("/") or text.lower().endswith(role.suffixes)
    if not role.or_hub or looks_so or (role.of_data and is_pattern(path)):
        return path
    return path if os.path.exists(path) else None  # noqa: PTH110


def path_from(folder: Path, text: str) -> str:
    """The absolute path that a text means in a folder, as the system follows it: `..` leads out of what a folder is,
    not of the place of a link to it."""
    # os.path rather than pathlib, which raises for `~nobody`.
    path = os.path.normpath(os.path.expanduser(text))  # noqa: PTH111
    if path.startswith(".."):
        folder = Path(os.path.realpath(folder))
    return os.path.normpath(os.path.join(folder, path))  # noqa: PTH118


def find_variable(text: str) -> str | None:
    """The environment variable that a shell would fill into `text`."""
    match = re.search(r"\$\{?[A-Za-z_]\w*\}?|%[A-Za-z_]\w*%", text)
    return match[0] if match else None


def refuse_variable(text: str, variable: str) -> tuple[str, str]:
    """Why a path cannot hold a variable, and what to write instead."""
    remedy = f"Write the path itself, or --set KEY=PATH on the command line, where the shell fills in {variable}."
    return f"{quote(text)} holds an environment variable, and a recipe reads none", remedy


def relative_path(path: str, folder: Path) -> str:
    """The text that means `path` in a recipe in `folder`, whether that is reached by a link or not."""
    text = os.path.relpath(path, folder)
    if text.startswith(".."):
        text = os.path.relpath(path, os.path.realpath(folder))
    return text if text.startswith("../") else f"./{text}"


def _complaint(node: Node, path: str | None, role: PathRole, key: PathParts) -> tuple[str, str] | None:
    """Why a reference leads nowhere, and what to write instead; None for one that leads somewhere."""
    text = node.value
    if "://" in text or (path is None and _ON_THE_HUB.match(text)):
        return f"{quote(text)} is an address", _without_address(text, role)
    exists, is_many = path is not None and os.path.exists(path), bool(path) and is_pattern(path or "")  # noqa: PTH110
    if (variable := find_variable(text)) and not exists and not is_many:
        return refuse_variable(text, variable)
    if path is None and role.or_template and is_template_name(text):
        return _unknown_template(text, node.place.folder)
    if path is None:
        return _no_hub_id(text, role, key == ("data", "eval"))
    if role.of_data and (is_many or os.path.isdir(path)):  # noqa: PTH112
        return _no_data_files(text, Path(path))
    if not exists:
        return f"{quote(text)} does not exist", _nearest_path(text, Path(path))
    if os.path.isdir(path):  # noqa: PTH112
        refused = f"{quote(text)} is a folder, not a file", "Write the path of a file in it."
        return None if role.or_folder else refused
    if not os.path.isfile(path):  # noqa: PTH113
        return f"{quote(text)} is not a regular file", "A pipe or a device would be read for ever: write a file's path."
    if role.of_data and not data_suffix(path):
        return f"{quote(text)} is not a data file", f"The name of one ends in {KNOWN_SUFFIXES}."
    return None


def _without_address(text: str, role: PathRole) -> str:
    """What to write instead of an address: the hub id in it, else a file's path."""
    if role.or_hub and (match := _ON_THE_HUB.match(text)):
        return f"Write the hub id: {match[1]}."
    if role.of_data:
        return "Download the file and write its path."
    return f"Write {'the hub id' if role.or_hub else 'the path'}, for example {role.example}."


def _unknown_template(name: str, folder: Path) -> tuple[str, str] | None:
    """Why a word names no chat template, and what to write instead; None for one that does."""
    if name in CHAT_TEMPLATES:
        return None
    near, names = nearest(name, CHAT_TEMPLATES, parts=True), ", ".join(CHAT_TEMPLATES)
    file = next((one for one in (name, f"{name}.jinja") if (folder / one).is_file()), None)
    known = f"lorakit has {names}; a path has a dot or a slash, and null is the tokenizer's own template."
    remedy = f"Write ./{file} for the file." if file else f"Did you mean {near}? {known}" if near else known
    return f"{quote(name)} is not a chat template's name", remedy


def _no_hub_id(text: str, role: PathRole, is_eval: bool) -> tuple[str, str] | None:
    reason = f"{quote(text)} is {'neither a path that exists nor a hub id' if role.or_hub else 'not a path'}"
    if is_eval and text.lower() in ("none", "no", "off", "auto", "false", "true", "yes", "on", "never"):
        return reason, "Write null for no held-out rows, or a fraction such as 0.1."
    number = other_notation(text)
    if share := re.fullmatch(r"(\d{1,3})/(\d{1,3})", text):
        number = f"{int(share[1]) / max(int(share[2]), 1):.4g}"
    if is_eval and number:
        is_number = 0 < float(number) < 1 or number.isdigit()
        return reason, f"Write {number}." if is_number else "Write a fraction such as 0.1."
    if _HUB_ID.fullmatch(text) and ".." not in text and "--" not in text:
        return None
    example = "data/eval.jsonl, or a fraction such as 0.1" if is_eval else role.example
    return reason, f"Write for example {example}."


def _no_data_files(text: str, path: Path) -> tuple[str, str] | None:
    try:
        if list(data_files(path)):
            return None
        if not is_pattern(path):
            return f"{quote(text)} is a folder without data files", f"Theirs end in {KNOWN_SUFFIXES}."
        folder, parts = pattern_start(path)
        near = None if any(sign in parts[0] for sign in "*?[") else nearest_file(folder / parts[0])
        if near:
            remedy = f"Did you mean {one_line(text.replace(parts[0], near, 1))}?"
        elif example := min(data_files(folder), default=None):
            remedy = f"There is for example {show_path(example)}."
        else:
            remedy = f"There is no data file in {show_path(folder)}; data files' names end in {KNOWN_SUFFIXES}."
    except TooManyFiles as error:
        return f"{quote(text)}: {error.strerror}", "Write the folder in which the rows lie."
    except OSError as error:
        return f"{quote(text)} cannot be read: {error.strerror}", "Check the permissions."
    return f"{quote(text)} matches no data file", remedy


def _nearest_path(text: str, path: Path) -> str:
    folder = show_path(path.parent)
    if not os.path.isdir(path.parent):  # noqa: PTH112
        return f"There is no folder {folder}: correct the path."
    near = nearest_file(path)
    if near is None:
        return f"Put the file into {folder}, or correct the path."
    return f"Did you mean {one_line(text[: text.rstrip('/').rfind('/') + 1] + near)}?"


def input_paths(recipe: Recipe) -> set[Path]:
    """What a recipe reads from disk, which no run may delete: base model, adapter, templates, schemas, data files."""
    references = _references(recipe.model_dump(exclude={"output"}), Recipe)
    named = {Path(text) for text in references if is_path(text) and "\0" not in text}
    paths = {path for path in named if not is_pattern(path) and path.exists()}
    source = initial_adapter(recipe.adapter)
    if source:
        paths = paths - {Path(source)} | {adapter_folder(Path(source))}
    base = Path(recipe.model.base)
    folders = {path for path in named - {base} if is_pattern(path) or path.is_dir()}
    return paths.union(*(set(data_files(folder)) for folder in folders if is_pattern(folder) or folder in paths))


def _references(value: Any, annotation: Any) -> Iterator[str]:
    """The texts that name something on disk."""
    if isinstance(value, str) and path_role(annotation):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _references(inner, annotation_at(annotation, (part,)))
