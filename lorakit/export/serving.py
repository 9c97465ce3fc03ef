"""What the exports for servers share: the adapter where the server takes it, else the merged model, with the commands.

A limit of a server is a check whose detail names the file of the server that it was read in.
"""

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import UserError
from lorakit.export.source import Check, Export, ExportSource
from lorakit.progress import Progress

if TYPE_CHECKING:
    from lorakit.export.folded_adapter import FoldedAdapter, PlainLora

# float32 holds a sum of products to about this share.
_EXACT = 1e-5
_LOSSY = 0.01
_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Served:
    """What the command that starts a server names."""

    name: str
    base: str  # quoted for a shell
    rank: int  # that the server is told, at least the adapter's
    modules: tuple[str, ...]
    template: str  # the option's value: the file of the chat template, empty where there is none


@dataclass(frozen=True)
class Server:
    """A server that takes adapters: its limits, each with the file of the server that it was read in."""

    name: str
    port: int
    parts: str  # the file that says that it takes A and B of LoRA alone
    layers: str  # what is said of layers that an adapter lacks
    ranks: tuple[int, ...]  # that it can be told; empty: any
    rank_source: str
    start_adapter: Callable[[Served], str]
    start_merged: Callable[[Served], str]
    request: Callable[[Served], dict[str, Any]] = lambda served: {"model": served.name}
    modules: frozenset[str] | None = None  # that it adapts; None: any linear layer
    module_source: str = ""
    pads: bool = False  # whether the adapter itself has to have one of the ranks
    stop_words: bool = False  # whether a request names stop tokens by their texts instead of their ids
    note: str = ""


def export_for_server(server: Server, source: ExportSource, folder: Path, progress: Progress) -> Export:
    """Fill a folder with the adapter, or with the merged model where the server cannot take the adapter right."""
    lora, reason, limit = _adapter_for(server, source)
    if lora is None:
        return _export_merged(server, source, reason, limit, folder, progress)
    rank = allowed_rank(server, lora.rank)
    assert rank is not None
    return _export_adapter(server, source, lora, rank, folder, progress)


def _adapter_for(server: Server, source: ExportSource) -> tuple["PlainLora | None", str, str]:
    """The adapter if the server takes it; else the reason, and the file of the server that has the limit."""
    from lorakit.export.folded_adapter import open_plain_lora

    if source.adapter is None:
        return None, "there is no adapter: this is a whole model", ""
    if source.needs_quantized:
        return None, f"the adapter makes up for what {source.quantization} took away from the base", ""
    lora, obstacle = open_plain_lora(source.adapter, source.base.folder)
    if lora is None:
        return None, f"the adapter {obstacle}", server.parts
    if allowed_rank(server, lora.rank) is None:
        return None, f"the adapter has rank {lora.rank}, and the largest is {server.ranks[-1]}", server.rank_source
    foreign = sorted(set(lora.modules) - server.modules) if server.modules is not None else []
    if foreign:
        return None, f"the adapter adapts {', '.join(foreign)}", server.module_source
    return lora, "", ""


def allowed_rank(server: Server, rank: int) -> int | None:
    """The smallest rank that the server can be told for an adapter of a rank; None where that is too large."""
    return next((one for one in server.ranks if one >= rank), None) if server.ranks else rank


def _export_adapter(
    server: Server, source: ExportSource, lora: "PlainLora", rank: int, folder: Path, progress: Progress
) -> Export:
    from lorakit.export.folded_adapter import write_folded_adapter
    from lorakit.model.companion_files import write_json, write_tokenizer
    from lorakit.model.config_values import read_json
    from lorakit.model.model_card import hub_id

    progress.say(f"writing the adapter for {server.name}")
    own_rank = rank if server.pads else lora.rank
    name = hub_id(source.base.name)
    folded = write_folded_adapter(lora, source.base.folder, name, folder, own_rank)
    write_tokenizer(source.base.folder, source.tokenizer, folder)
    # SGLang counts every token of this file that older releases wrote as one that the base lacks (lora_config.py).
    if (folder / "tokenizer.json").is_file():
        (folder / "added_tokens.json").unlink(missing_ok=True)
    template = _write_template(source, folder)
    if template:  # programs on transformers 4, LoRAX among them, find a template in tokenizer_config.json alone
        settings = read_json(folder / "tokenizer_config.json")
        write_json(folder / "tokenizer_config.json", settings | {"chat_template": source.tokenizer.chat_template})
    word, before = base_word(source)
    served = Served(served_name(source), word, rank, lora.modules, template)
    checks = (*_adapter_checks(server, lora, folded, rank), check_base(source), _check_stops(source))
    facts = {"weights": "adapter", "rank": folded.rank, "served_name": served.name, "max_lora_rank": rank}
    facts |= {"layers": folded.layers, "difference": folded.difference, "bfloat16_loss": folded.bfloat16_loss}
    intro = f"The adapter, for {server.name} on its base {name or Path(source.base.name).name}."
    request = server.request(served) | _stop_request(server, source)
    return Export(facts, checks, _readme(server, intro, before + server.start_adapter(served), request))


def _adapter_checks(server: Server, lora: "PlainLora", folded: "FoldedAdapter", rank: int) -> Iterator[Check]:
    off = folded.difference
    scale = f"folded into B of {folded.layers} layers: alpha is the rank, and each change is the adapter's to"
    yield Check("scale", off <= _EXACT, f"{scale} {off:.1g} of its length (the largest of the layers)")
    yield Check("parts", True, f"A and B of LoRA alone, no biases or whole modules ({server.parts})")
    added = f", {folded.added} of them zeros that the adapter leaves alone" if folded.added else ""
    yield Check("layers", True, f"every layer of {', '.join(lora.modules)}{added} ({server.layers})")
    padded = f", from {lora.rank}" if folded.rank != lora.rank else ""
    yield Check("rank", True, f"{folded.rank}{padded}; the server is started with {rank} ({server.rank_source})")
    if server.modules is not None:
        yield Check("modules", True, f"{', '.join(lora.modules)} ({server.module_source})")
    loss = folded.bfloat16_loss
    detail = f"a server that holds A and B in bfloat16 changes a layer's change by up to {100 * loss:.2g} %"
    yield Check("rounding", loss <= _LOSSY, detail, fatal=False)


def check_base(source: ExportSource) -> Check:
    """Whether the base that a server loads is the one of the training."""
    if source.quantization == "none":
        return Check("base", True, "unquantized, as in training")
    detail = (
        f"the adapter was trained on the base in {source.quantization}; on the full-precision base it answers a little "
        "differently. The merged model holds what was trained: lorakit merge"
    )
    return Check("base", False, detail, fatal=False)


def _missing_stops(source: ExportSource) -> list[int]:
    """Stop tokens of the training at which a server that goes by the base's files does not end an answer."""
    from lorakit.model.tokenizer import load_tokenizer, stop_token_ids

    known = stop_token_ids(source.base, load_tokenizer(source.base, None))
    return sorted(set(source.stop_ids) - set(known))


def _check_stops(source: ExportSource) -> Check:
    missing = _missing_stops(source)
    words = ", ".join(map(str, source.tokenizer.convert_ids_to_tokens(missing or list(source.stop_ids))))
    if not missing:
        return Check("stop tokens", True, words)
    return Check("stop tokens", False, f"the base's files do not name {words}: requests have to", fatal=False)


def _stop_request(server: Server, source: ExportSource) -> dict[str, Any]:
    missing = _missing_stops(source)
    if not missing:
        return {}
    words = list(map(str, source.tokenizer.convert_ids_to_tokens(missing)))
    return {"stop": words} if server.stop_words else {"stop_token_ids": missing}


def _export_merged(
    server: Server, source: ExportSource, reason: str, limit: str, folder: Path, progress: Progress
) -> Export:
    from lorakit.export.hub_folder import copy_model

    progress.say(f"{server.name} gets the merged model, since {reason}")
    copy_model(source.merged_model, folder, link_file)
    template = _write_template(source, folder)
    served = Served(served_name(source), "", 0, (), template)
    detail = f"the merged model, since {reason}" + (f" ({limit})" if limit else "")
    intro = f"The merged model, for {server.name}: {reason}."
    # The folder of a merge, or of a full fine-tuning, names all stop tokens in its generation_config.json.
    readme = _readme(server, intro, server.start_merged(served), {"model": served.name})
    return Export({"weights": "merged", "served_name": served.name}, (Check("weights", True, detail),), readme)


def link_file(file: Path, place: Path) -> None:
    """The same file under another name: a hard link where the file system has them, else a copy."""
    try:
        os.link(file.resolve(), place)  # in the hub's cache the files are links themselves
    except OSError:  # another file system, or one without links
        shutil.copyfile(file, place)


def _write_template(source: ExportSource, folder: Path) -> str:
    """Write the training's chat template where there is none; its file's name, empty where there is no template."""
    template = source.tokenizer.chat_template
    if not isinstance(template, str):
        return ""
    path = folder / _TEMPLATE
    if not path.is_file() or path.read_text(encoding="utf-8") != template:
        path.unlink(missing_ok=True)  # which may be a link to the merged model's
        path.write_text(template, encoding="utf-8")
    return _TEMPLATE


def served_name(source: ExportSource) -> str:
    """The model's name for requests: that of the recipe, of letters that every command line takes."""
    name = re.sub(r"[^\w.-]+", "-", source.name).strip("-")
    if not name:
        raise UserError(f"{source.folder}: has no name that a server can serve it by. Give the recipe a name.")
    return name


def base_word(source: ExportSource) -> tuple[str, str]:
    """The base as a word of a shell's command, and the line that has to stand before the command: none for a hub id.
    A folder's path is left out, since exports are handed on."""
    from lorakit.model.model_card import hub_id

    name = hub_id(source.base.name)
    if name:
        return shlex.quote(name), ""
    return '"$BASE"', f"BASE=...  # the folder of the base model, {Path(source.base.name).name}\n"


def _readme(server: Server, intro: str, command: str, request: dict[str, Any]) -> str:
    body = {**request, "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
    written = shlex.quote(json.dumps(body, ensure_ascii=False)).replace("$PWD", "'\"$PWD\"'")
    note = f"\n{server.note}\n" if server.note else ""
    name = str(request.get("model", ""))
    address = f"http://127.0.0.1:{server.port}/v1" + (f"#{name}" if name and "$PWD" not in name else "")
    return f"""\
{intro} `export.json` has what was checked.
{note}
```bash
{command}
curl http://127.0.0.1:{server.port}/v1/chat/completions -H 'Content-Type: application/json' \\
  -d {written}
```

Start the server in this folder. Score what it serves on the run's held-out rows:
`lorakit eval RUN {address}`.
"""


def command_line(*words: str) -> str:
    """A command over lines, of words that are quoted already; an option and its values are one word."""
    return " \\\n  ".join(word for word in words if word)
