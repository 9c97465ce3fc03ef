"""Another tool's config, read as that tool reads it: PyYAML's rules, JSON, or a command line; every key with its line.

PyYAML follows YAML 1.1 (`yes` is true, `1e-4` is a text), merges `<<`, and lets the last of two equal keys win; so does
this, and says which key lost.
"""

import json
import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lorakit.errors import UserError
from lorakit.recipe.did_you_mean import nearest_file
from lorakit.recipe.problem import one_line, show_path

MAX_BYTES = 1_000_000
MAX_DEPTH = 40
MAX_VALUES = 20_000
_VARIABLE = re.compile(r"\$\{(\w+)(?::?-([^}]*))?\}|\$(\w+)")
_ASSIGNMENT = re.compile(r"^\s*(?:export\s+)?([A-Za-z_]\w*)=(\"[^\"$`]*\"|'[^']*'|[^\s\"'$`;&|()]*)\s*$", re.MULTILINE)


@dataclass
class ForeignConfig:
    """What a config says: `tree` as its tool sees it, `lines` of its dotted keys where they are known, the keys that a
    later one of the same name replaced, and how many processes its launcher starts."""

    name: str
    tree: dict[str, Any]
    folder: Path
    lines: dict[str, int] = field(default_factory=dict)
    replaced: list[tuple[str, Any, int, int]] = field(default_factory=list)
    processes: int | None = None


def read_config(path: Path) -> ForeignConfig:
    """Read a YAML or JSON file, or the training command of a shell script.

    Raises:
        UserError: it cannot be read, or is no mapping.
    """
    text, name = _read_text(path), show_path(path)
    config = ForeignConfig(name, {}, path.absolute().parent)
    if path.suffix.lower() == ".sh":
        return read_command(text, name, config.folder)
    if path.suffix.lower() == ".toml":
        raise UserError(f"{name}: is TOML, and none of the tools reads it. Give the YAML file that the tool reads.")
    value = _parse_json(text, config) if path.suffix.lower() == ".json" else _parse_yaml(text, config)
    if not isinstance(value, dict):
        kind = "empty" if value is None else "a list" if isinstance(value, list) else "a single value"
        raise UserError(f"{name}: the file is {kind}, not a mapping of settings. Give a config of one of the tools.")
    config.tree = value
    return config


def _read_text(path: Path) -> str:
    name = show_path(path)
    if not path.exists():
        near = nearest_file(path)
        remedy = f"Did you mean {show_path(path.parent / near)}?" if near else "Give the path of a config."
        raise UserError(f"{name}: there is no such file. {remedy}")
    if not path.is_file():
        raise UserError(f"{name}: is {'a folder' if path.is_dir() else 'a device'}, not a file. Give a config in it.")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{name}: is larger than 1 MB. A config holds settings, not data.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: byte {error.start:,} is not UTF-8. Save the file as UTF-8.") from error
    if "\0" in text:
        raise UserError(f"{name}: has NUL characters: it is not a text. Give a config of one of the tools.")
    return text


class _Values:
    """Counts what is converted: ten nested aliases can stand for ten billion values."""

    def __init__(self, name: str) -> None:
        self.name, self.count = name, 0

    def enter(self, depth: int, line: int) -> None:
        self.count += 1
        if depth > MAX_DEPTH or self.count > MAX_VALUES:
            what = f"values nested deeper than {MAX_DEPTH}" if depth > MAX_DEPTH else f"more than {MAX_VALUES:,} values"
            raise UserError(f"{self.name}:{line}: there are {what}. A config holds settings, not data.")


def _parse_yaml(text: str, config: ForeignConfig) -> Any:
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        return _convert(root, loader, config, "", 0, _Values(config.name)) if root else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        place = f"{config.name}:{mark.line + 1}" if mark else config.name
        reason = one_line(str(getattr(error, "problem", None) or error).splitlines()[0], 200)
        raise UserError(f"{place}: is not YAML that the tool could read: {reason}. Correct the line.") from error
    except (RecursionError, ValueError, OverflowError) as error:
        raise UserError(f"{config.name}: cannot be read as YAML: {one_line(str(error), 100)}. Correct it.") from error


def _convert(node: Any, loader: Any, config: ForeignConfig, path: str, depth: int, values: _Values) -> Any:
    values.enter(depth, node.start_mark.line + 1)
    plain = {yaml.MappingNode: "map", yaml.SequenceNode: "seq"}.get(type(node))
    if plain and node.tag != f"tag:yaml.org,2002:{plain}":
        raise yaml.constructor.ConstructorError(None, None, f"the tag {node.tag}", node.start_mark)
    if isinstance(node, yaml.SequenceNode):
        items = enumerate(node.value)
        return [_convert(item, loader, config, f"{path}[{at}]", depth + 1, values) for at, item in items]
    if isinstance(node, yaml.ScalarNode):
        if node.tag == "tag:yaml.org,2002:timestamp":  # a date is a text in all of these configs
            return node.value
        return loader.construct_object(node)
    own = {id(key) for key, _ in node.value}
    loader.flatten_mapping(node)  # of `<<`: before what is written here, which wins
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
        name, line = f"{path}.{key}" if path else key, key_node.start_mark.line + 1
        value = _convert(value_node, loader, config, name, depth + 1, values)
        if key in mapping and id(key_node) in own:
            earlier = config.lines.get(name, line)
            config.replaced.append((name, mapping.pop(key), earlier, line))
        mapping[key] = value
        config.lines[name] = line
    return mapping


def _parse_json(text: str, config: ForeignConfig) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key, value in items:
            if key in mapping:
                config.replaced.append((key, mapping[key], 0, 0))
            mapping[key] = value
        return mapping

    try:
        return json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise UserError(f"{config.name}:{error.lineno}: is not JSON: {error.msg}. Correct the line.") from error
    except RecursionError as error:
        raise UserError(f"{config.name}: is nested too deeply. A config holds settings, not data.") from error


def read_command(text: str, name: str, folder: Path) -> ForeignConfig:
    """The options of a `trl sft` or `llamafactory-cli train` command (or of a launcher that starts TRL's sft.py), over
    those of its config."""
    words, start = _find_command(_fill_in(text.replace("\\\n", " ")), name)
    config = ForeignConfig(name, {}, folder, processes=_processes(words[:start]))
    options = _options(words[start:], name)
    file = options.pop("config", None)
    if isinstance(file, str):
        below = read_config(next((path for path in (folder / file, Path(file)) if path.exists()), Path(file)))
        options = {**below.tree, **options}
        config.lines, config.replaced = below.lines, below.replaced
    config.tree = options
    return config


def _fill_in(text: str) -> str:
    """The text with the variables that it sets itself; others stay, and are an error where a value holds one."""
    values = {match[1]: match[2].strip("\"'") for match in _ASSIGNMENT.finditer(text)}

    def value(match: re.Match[str]) -> str:
        default: str = match[0] if match[2] is None else match[2]
        return values.get(match[1] or match[3], default)

    return _VARIABLE.sub(value, text)


def _find_command(text: str, name: str) -> tuple[list[str], int]:
    """The words of the first line that starts a training, and where its options begin."""
    waiting, broken = "", ""
    for line in text.splitlines():
        waiting = f"{waiting}\n{line}" if waiting else line
        try:
            words = shlex.split(waiting, comments=True)
        except ValueError as error:  # a quote that a later line closes, or nothing does
            broken = str(error)
            continue
        waiting = ""
        start = _script_start(words, name)
        if start is not None:
            return words, start
    if waiting and re.search(r"\bsft\b", waiting):
        raise UserError(f"{name}: is no command that a shell could read: {broken}. Close the quote.")
    what = "has no `trl sft` or `llamafactory-cli train` command, and starts no sft.py"
    raise UserError(f"{name}: {what}. Give for example --trl-command 'trl sft ...'.")


def _script_start(words: list[str], name: str) -> int | None:
    for at, word in enumerate(words):
        if word == "trl" or word.endswith("/trl"):
            command = words[at + 1] if at + 1 < len(words) else ""
            if command != "sft":
                what = f"`trl {one_line(command)}` is no supervised fine-tuning"
                raise UserError(f"{name}: {what}: lorakit trains on answers alone. Give a `trl sft` command.")
            return at + 2
        if re.search(r"(^|/)sft[\w-]*\.py$|trl\.scripts\.sft$", word):
            return at + 1
        if re.search(r"(^|/)llamafactory-cli$|^llamafactory\.cli$", word) and words[at + 1 : at + 2] == ["train"]:
            return at + 2
        if re.search(r"(^|/)train(_bash)?\.py$", word) and "--stage" in words:  # LLaMA-Factory's earlier script
            return at + 1
    return None


def _processes(words: list[str]) -> int | None:
    """How many processes the launcher before the script starts."""
    text = " ".join(words)
    match = re.search(r"--(?:num[_-]processes|nproc[_-]per[_-]node)[= ](\d+)", text)
    return int(match[1]) if match else None


def _options(words: list[str], name: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    key = ""
    if words and words[0].endswith((".yaml", ".yml", ".json")):  # as llamafactory-cli takes it
        options["config"], words = words[0], words[1:]
    for word in words:
        if word in (";", "&&", "||", "|", "&", ">", ">>", "2>&1"):
            break
        if word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")
            options[key] = value if equals else True
        elif not key:
            raise UserError(f"{name}: {one_line(word)!r} is no option. Options begin with --.")
        else:
            before = options[key]
            options[key] = word if before is True else [*(before if isinstance(before, list) else [before]), word]
    for key, value in options.items():
        if variable := next((one for one in _texts(value) if _VARIABLE.search(one)), None):
            what = f"--{key} holds a variable of the shell, {one_line(variable)}"
            raise UserError(f"{name}: {what}, which nothing here fills in. Write its value.")
    return options


def _texts(value: Any) -> Iterator[str]:
    yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str))


def as_number(value: Any) -> float | int | None:
    """The number that a value is for tools that convert texts, such as PyYAML's "1e-4"; None for anything else."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, str):
        try:
            value = int(value) if re.fullmatch(r"[-+]?\d{1,18}", value.strip()) else float(value)
        except ValueError:
            return None
    if not isinstance(value, int | float) or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value


def as_flag(value: Any) -> bool | None:
    """The switch that a value is, `yes` and `true` as texts too; None for anything else."""
    if isinstance(value, bool):
        return value
    words = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}
    return words.get(str(value).lower()) if isinstance(value, str | int) else None
