"""Where a config's rows come from, as sources of a recipe."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.recipe.data_files import data_suffix
from lorakit.share.importing.conversion import Conversion
from lorakit.share.importing.paths import find_local, is_local, local_path, remote_reason

BUILDERS = ("json", "jsonl", "csv", "parquet", "arrow", "text")
"""Names of readers of the library datasets, which stand where a path would."""
_DOWNLOAD = "Download its files, and write their path."
ALPACA_TEXTS = {"with_input": "{instruction}\n{input}", "without_input": "{instruction}"}


@dataclass
class ImportedSource:
    """One source on its way into `data.train` or `data.eval`; `trains` is what is trained of its rows."""

    path: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    format: Any = None
    columns: dict[str, str] = field(default_factory=dict)
    trains: str = "assistant"
    is_text: bool = False

    def to_recipe(self) -> Any:
        """The source as a recipe writes it: a path where there is nothing else to say."""
        facts = {key: value for key, value in self.facts.items() if value is not None}
        known = {"format": self.format, "columns": self.columns or None}
        facts = {"path": self.path, **facts, **{key: value for key, value in known.items() if value is not None}}
        return self.path if list(facts) == ["path"] else facts


def read_place(c: Conversion, at: str, path_key: str, files_key: str, split: str) -> list[ImportedSource]:
    """The files or the hub dataset that `path` and `data_files` name under the dotted name `at`; [] where they are
    none that a recipe can name, which is then said."""
    path, files = c.value(f"{at}.{path_key}"), c.value(f"{at}.{files_key}") if files_key else None
    keys = [f"{at}.{path_key}"] if files is None else [f"{at}.{path_key}", f"{at}.{files_key}"]
    files = files.get(split) if isinstance(files, dict) else files
    names = [str(file) for file in (files if isinstance(files, list) else [files])] if files else []
    if not isinstance(path, str) or not path or (len(keys) == 2 and not names):
        c.refuse(keys[-1], "it names no file, folder or hub dataset", "Write a path, or a list of paths.")
        return []
    folder = find_local(c, path)
    if path in BUILDERS and names:
        texts, is_file = names, True
    elif names and folder is not None and folder.is_dir():
        texts, is_file = [str(folder / name) for name in names], True
    else:
        texts, is_file = [path], False
    for text in (*texts, *names):
        if reason := remote_reason(text):
            c.refuse(keys[-1], reason, _DOWNLOAD)
            return []
    sources = []
    for text in texts:
        reference = local_path(c, text, is_file or bool(data_suffix(text)))
        source = ImportedSource(reference)
        if not is_local(c, reference):
            source.facts["data_files"] = names[0] if len(names) == 1 else names or None
            source.facts["split"] = None if split in ("train", "") else split
        elif not _exists(reference):
            c.note(f"{text} is not here yet: lorakit check will look for it.")
        sources.append(source)
    for key in keys:
        c.account(key, "mapped", to="data.train" if "test" not in at and "eval" not in at else "data.eval")
    return sources


def _exists(path: str) -> bool:
    try:
        return Path(path).exists() or any(sign in path for sign in "*?[")
    except (OSError, ValueError):
        return False


def read_subset(c: Conversion, key: str, sources: list[ImportedSource]) -> None:
    """A hub dataset's configuration by name; a file has none."""
    name = c.value(key)
    if name is None:
        return
    hub = [source for source in sources if not is_local(c, source.path)]
    for source in hub:
        source.facts["subset"] = str(name)
    if hub:
        c.account(key, "mapped", to=f"subset: {name}")
    else:
        c.ignore(key, "a file has no configurations")


def read_split(c: Conversion, key: str, sources: list[ImportedSource]) -> None:
    """The split of a hub dataset, or a part of it such as `train[:10%]`; of a file the first so many rows -> `take`."""
    if not c.has(key):
        return
    split = str(c.value(key))
    if sources and not is_local(c, sources[0].path):
        c.account(key, "same" if split == "train" else "mapped", to=f"split: {split}")
    elif first := re.fullmatch(r"\w+\[:(\d+)(%?)\]", split):
        number = int(first[1])
        take = number / 100 if first[2] else number
        for source in sources:
            source.facts["take"] = take if take != 1.0 or not first[2] else None
        reason = "as many rows, chosen by a hash of what they say instead of the first ones"
        c.account(key, "mapped", to=f"take: {take:g}", reason=reason)
    elif any(sign in split for sign in "[%+"):
        c.refuse(key, "a part of a file cannot be named", "Write `take` in the recipe, or a file of these rows.")
    else:
        c.ignore(key, "a file has one split")


def conversations(role: str, content: str, column: str, roles: dict[str, str]) -> tuple[Any, dict[str, str]] | str:
    """Messages of {role, content} under these names in a column -> format and columns, or why there are none.

    `roles` maps the config's words for roles to ours.
    """
    ours = {"user", "assistant", "system", "tool"}
    if unknown := sorted(set(roles.values()) - ours):
        return f"lorakit's roles are system, user, assistant and tool; {unknown[0]} is another"
    own_words = {word: role_word for word, role_word in roles.items() if word != role_word}
    if (role, content) == ("role", "content") and not own_words:
        return "messages", {"messages": column} if column != "messages" else {}
    if role not in ("role", "from") or content not in ("content", "value"):
        return f"lorakit reads turns of {{role, content}} and {{from, value}}, not {{{role}, {content}}}"
    known = {
        "human": "user",
        "gpt": "assistant",
        "observation": "tool",
        "function_response": "tool",
        "chatgpt": "assistant",
    }
    others = {word: role_word for word, role_word in own_words.items() if known.get(word) != role_word}
    columns = {"conversations": column} if column != "conversations" else {}
    return ({"sharegpt": {"roles": others}} if others else "sharegpt"), columns


def write_sources(c: Conversion, ours: str, sources: list[ImportedSource], keys: list[str], what: str) -> None:
    """Put sources into `data.train` or `data.eval`; one that is alone is no list."""
    if not sources:
        return
    written = _joined([source.to_recipe() for source in sources], c.flag("dataset_exact_deduplication"))
    c.recipe[ours] = written[0] if len(written) == 1 else written
    c.origins[ours] = keys
    c.note(f"{what}: paths are read from the folder in which {c.tool} runs, here {Path.cwd()}.") if any(
        is_local(c, source.path) for source in sources
    ) else None


def _joined(sources: list[Any], once: bool) -> list[Any]:
    """The sources, each there once: one that is named several times is trained as often, unless `once`."""
    joined: list[Any] = []
    for at, source in enumerate(sources):
        if source in sources[:at]:
            continue
        count = 1 if once else sources.count(source)
        facts = source if isinstance(source, dict) else {"path": source}
        joined.append(source if count == 1 else {**facts, "weight": float(count)})
    return joined


def write_training(c: Conversion, sources: list[ImportedSource], keys: list[str]) -> None:
    """What is trained of all rows -> `data.train_on`; a recipe says it once for all sources."""
    kinds = {source.trains for source in sources if not source.is_text}
    if len(kinds) > 1:
        c.refuse(keys or ["datasets"], f"some rows train {' and others '.join(sorted(kinds))}", "Import one at a time.")
    elif kinds:
        c.map("data.train_on", kinds.pop(), keys)
