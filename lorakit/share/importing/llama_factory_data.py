"""LLaMA-Factory's dataset_info.json (src/llamafactory/data/parser.py and converter.py of its repository)."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakit.errors import UserError
from lorakit.recipe.did_you_mean import nearest
from lorakit.recipe.problem import one_line, show_path
from lorakit.share.importing.conversion import Conversion
from lorakit.share.importing.data_sources import ImportedSource, conversations, write_sources
from lorakit.share.importing.paths import find_local, local_path, remote_reason
from lorakit.share.importing.prompts import JOINED, template_format

FILE = "dataset_info.json"
_MAX_BYTES = 10_000_000
_OWN_LIST = Path(__file__).with_name("llama_factory_datasets.json")
"""data/dataset_info.json of LLaMA-Factory 0.9.5 (Apache License 2.0), without other hubs' names."""
_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
}
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
_KNOWN = {
    *("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "file_name", "cloud_file_name", "formatting", "ranking"),
    *("subset", "split", "folder", "num_samples", "revision", "load_from", "columns", "tags", "converter"),
}
_MEDIA = ("images", "videos", "audios")
_PREFERENCES = ("chosen", "rejected", "kto_tag")


def import_datasets(c: Conversion) -> list[ImportedSource]:
    """`dataset` -> `data.train`, `eval_dataset` -> `data.eval`; the sources of both."""
    info = _read_info(c)
    sources: list[ImportedSource] = []
    for key, ours in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        names = _names(c.value(key))
        if not names:
            if key == "dataset":
                c.refuse(key, "LLaMA-Factory needs it", "Write the names of data sets.")
            continue
        read = [source for name in names if (source := _source(c, key, name, info)) is not None]
        if len(read) == len(names):
            c.account(key, "mapped", to=ours)
        _take(c, read)
        write_sources(c, ours, read, [key], key)
        sources += read
    return sources


def _names(value: Any) -> list[str]:
    names = value if isinstance(value, list) else str(value).split(",") if value is not None else []
    return [str(name).strip() for name in names if str(name).strip()]


def _take(c: Conversion, sources: list[ImportedSource]) -> None:
    most = c.whole("max_samples")
    if most and most > 0:
        for source in sources:
            source.facts["take"] = min(most, source.facts.get("take") or most)
        note = "as many rows, chosen by a hash of what they say instead of the first ones"
        c.account("max_samples", "mapped", to=f"take: {most}", reason=note)


def _read_info(c: Conversion) -> dict[str, Any] | None:
    """What dataset_info.json says; None where it is not here, and a refusal where something needs it."""
    folder = str(c.value("dataset_dir", "data"))
    if folder == "ONLINE":
        c.account("dataset_dir", "mapped", to="hub data sets")
        return None
    path = c.dataset_info or _info_path(c, folder)
    known = json.loads(_OWN_LIST.read_text(encoding="utf-8"))
    if (
        path is None
        and not folder.startswith("REMOTE:")
        and all(name in known for key in ("dataset", "eval_dataset") for name in _names(c.value(key)))
    ):
        c.data_folder = Path(local_path(c, folder, is_file=True))
        c.note(f"{folder}/{FILE} is not here: what its names mean is taken from LLaMA-Factory's own list.")
        c.ignore("dataset_dir", "the names are those of LLaMA-Factory's own list")
        return known
    if path is None:
        reason = f"its names stand in {folder}/{FILE}, which is not here"
        c.refuse("dataset", reason, f"Give the file: --dataset-info {FILE}.")
        return {}
    c.data_folder = Path(path).absolute().parent
    c.ignore("dataset_dir", f"{show_path(Path(path))} is read")
    return _parse_info(Path(path))


def _info_path(c: Conversion, folder: str) -> Path | None:
    if remote_reason(folder) or folder.startswith("REMOTE:"):
        return None
    candidates = (find_local(c, f"{folder}/{FILE}"), c.config.folder / FILE)
    return next((path for path in candidates if path and path.is_file()), None)


def _parse_info(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{show_path(path)}: there is no such file. Give LLaMA-Factory's {FILE}.")
    if path.stat().st_size > _MAX_BYTES:
        raise UserError(f"{show_path(path)}: is larger than 10 MB. Give LLaMA-Factory's {FILE}.")
    try:
        info = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{show_path(path)}: is not JSON: {one_line(str(error), 100)}. Correct it.") from error
    if not isinstance(info, dict):
        raise UserError(f"{show_path(path)}: is no mapping of names. Give LLaMA-Factory's {FILE}.")
    return info


def _source(c: Conversion, key: str, name: str, info: dict[str, Any] | None) -> ImportedSource | None:
    if info is None:  # dataset_dir: ONLINE, with the format's defaults
        return _alpaca(ImportedSource(local_path(c, name)), dict(_ALPACA))
    if not info:
        return None
    entry = info.get(name)
    if not isinstance(entry, dict):
        near = nearest(name, info)
        remedy = f"Did you mean {near}?" if near else f"Its names are {one_line(', '.join(sorted(info)), 200)}."
        c.refuse(key, f"{FILE} has no {one_line(name)}", remedy)
        return None
    if problem := _unusable(entry):
        c.refuse(key, f"{one_line(name)}: {problem}", "Give rows that lorakit reads.")
        return None
    source = _place(c, key, name, entry)
    return source and _format(c, key, name, entry, source)


def _unusable(entry: dict[str, Any]) -> str:
    """Why lorakit cannot train on these rows; empty where it can."""
    columns = entry.get("columns") or {}
    if unknown := [one for one in entry if one not in _KNOWN]:
        return f"{FILE} has a key {unknown[0]!r} that is not known"
    if entry.get("ranking") or any(columns.get(one) for one in _PREFERENCES):
        return "its rows are preferences, and lorakit trains on answers"
    if any(columns.get(one) for one in _MEDIA):
        return "its rows have images, videos or sounds, and lorakit trains text alone"
    if columns.get("history"):
        return "the turns before are in a column of pairs (history), which lorakit does not read"
    for one, reason in (
        ("folder", "lorakit reads a hub dataset by its splits and files, not a folder of it"),
        ("script_url", "it is a script, and lorakit runs none"),
        ("cloud_file_name", "it lies in a cloud's store"),
        ("converter", "it has a converter of its own"),
    ):
        if entry.get(one):
            return f"{reason} ({one})"
    return ""


def _place(c: Conversion, key: str, name: str, entry: dict[str, Any]) -> ImportedSource | None:
    if entry.get("hf_hub_url"):
        source = ImportedSource(str(entry["hf_hub_url"]))
        source.facts["subset"] = entry.get("subset")
        source.facts["split"] = None if entry.get("split", "train") == "train" else entry["split"]
        source.facts["revision"] = entry.get("revision")
    elif isinstance(entry.get("file_name"), str) and not remote_reason(entry["file_name"]):
        folder = c.data_folder or c.config.folder
        source = ImportedSource(str((folder / entry["file_name"]).absolute()))
        if not (folder / entry["file_name"]).exists():
            c.note(f"{entry['file_name']} is not here yet: lorakit check will look for it.")
    else:
        what = (
            "it lies on another hub (ms_hub_url)" if entry.get("ms_hub_url") or entry.get("om_hub_url") else "no file"
        )
        c.refuse(key, f"{one_line(name)}: {what}", "Give a file_name or an hf_hub_url.")
        return None
    if isinstance(entry.get("num_samples"), int):
        source.facts["take"] = entry["num_samples"]
    return source


def _format(c: Conversion, key: str, name: str, entry: dict[str, Any], source: ImportedSource) -> ImportedSource | None:
    columns = entry.get("columns")
    formatting = entry.get("formatting", "alpaca")
    if formatting == "alpaca":
        # Where `columns` stands, what it lacks is no column, whatever the default.
        given = _ALPACA if columns is None else columns
        return _alpaca(source, {one: theirs for one, theirs in given.items() if theirs})
    if formatting not in ("sharegpt", "openai"):
        c.refuse(key, f"{one_line(name)}: lorakit has no format for {formatting}", "Give alpaca or sharegpt rows.")
        return None
    tags = _TAGS | (_OPENAI_TAGS if formatting == "openai" else {}) | (entry.get("tags") or {})
    roles = {
        str(tags["user_tag"]): "user",
        str(tags["assistant_tag"]): "assistant",
        str(tags["observation_tag"]): "tool",
        str(tags["system_tag"]): "system",
    }
    columns = columns or {}
    column = str(columns.get("messages") or ("messages" if formatting == "openai" else "conversations"))
    if "tags" not in entry or "observation_tag" not in entry["tags"]:
        roles.pop("observation", None)  # sharegpt's word for a tool, known to the format
    result = conversations(str(tags["role_tag"]), str(tags["content_tag"]), column, roles)
    if isinstance(result, str):
        c.refuse(key, f"{one_line(name)}: {result}", "Rename them in the rows.")
        return None
    source.format, source.columns = result
    for one in ("system", "tools"):
        if columns.get(one) and columns[one] != one:
            source.columns[one] = str(columns[one])
    return source


def _alpaca(source: ImportedSource, columns: dict[str, Any]) -> ImportedSource:
    """Rows of prompt, query and response: LLaMA-Factory puts the query into the line below the prompt."""
    prompt, query = columns.get("prompt"), columns.get("query")
    answer = columns.get("response", "output")
    if prompt and query:
        names = {}
        theirs = {"instruction": prompt, "input": query, "output": answer}
        source.format = template_format(replace(JOINED, columns=theirs))
    else:
        names = {"prompt": prompt or query or "instruction", "completion": answer}
        source.format = "prompt-completion"
    names |= {one: columns[one] for one in ("system",) if columns.get(one)}
    if source.format == "prompt-completion" and columns.get("tools"):
        names["tools"] = columns["tools"]
    source.columns = {ours: str(column) for ours, column in names.items() if ours != column}
    return source
