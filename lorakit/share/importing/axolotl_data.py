"""Axolotl's `datasets` and `test_datasets` (axolotl/utils/schemas/datasets.py and prompt_strategies/)."""

from dataclasses import replace
from typing import Any

from lorakit.share.importing import prompts
from lorakit.share.importing.chat_templates import chat_template
from lorakit.share.importing.conversion import Conversion
from lorakit.share.importing.data_sources import (
    ImportedSource,
    conversations,
    read_place,
    read_split,
    read_subset,
    write_sources,
    write_training,
)
from lorakit.share.importing.paths import local_path, remote_reason
from lorakit.share.importing.prompts import PlainPrompt, template_format, unknown_places, write_plain_template

_PARTIAL = "Import with --partial, and write the source's format into the recipe."
_RAW = "Axolotl writes this prompt as plain text of its own"
_ROLES = {
    "human": "user",
    "user": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
    "tool": "tool",
}

_CONVERSATIONS = {"llama-3": "llama3", "mistral": "mistral_v1"}
"""A conversation of FastChat's -> the chat template of Axolotl's that writes the same."""

RowKind = tuple[Any, dict[str, str], str, bool]
"""A source's format, columns, what is trained of it, and whether its rows are documents."""

_QUESTIONS = {"instruction": "question", "output": "answer"}
_PLAIN_PROMPTS = {
    **dict.fromkeys(("alpaca", "alpaca:instruct", "alpaca_instruct", "alpaca_instruct.load"), prompts.ALPACA),
    **dict.fromkeys(("alpaca:chat", "alpaca_chat", "alpaca_chat.load"), prompts.ALPACA_CHAT),
    "alpaca:chatml": prompts.ALPACA_CHATML,
    "alpaca:phi": prompts.ALPACA_PHI,
    "alpaca_instruct.load_no_prompt": prompts.UNPROMPTED,
    "alpaca_chat.load_no_prompt": prompts.UNPROMPTED_CHAT,
    "alpaca_chat.load_concise": prompts.ALPACA_CONCISE,
    "alpaca_chat.load_qa": replace(prompts.ALPACA_CONCISE, columns=_QUESTIONS),
    "alpaca_chat.load_camel_ai": replace(
        prompts.ALPACA_CONCISE, columns={"instruction": "message_1", "output": "message_2"}
    ),
    **dict.fromkeys(("alpaca_w_system", "alpaca_w_system.load", "alpaca_w_system.load_chat"), prompts.SYSTEM_CHAT),
    "alpaca_w_system.load_instruct": prompts.SYSTEM_INSTRUCT,
    "alpaca_w_system.load_open_orca": prompts.ORCA,
    "alpaca_w_system.load_open_orca_chatml": prompts.ORCA_CHATML,
    **dict.fromkeys(("context_qa", "context_qa.load"), prompts.CONTEXT),
    "gpteacher": replace(prompts.ALPACA, columns={**prompts.ALPACA.columns, "output": "response"}),
    "oasst": replace(prompts.ALPACA, columns={"instruction": "INSTRUCTION", "output": "RESPONSE"}),
}
"""Types whose prompts are plain text -> the prompt (axolotl/prompters.py)."""


def import_datasets(c: Conversion) -> None:
    """`datasets` -> `data.train`, `test_datasets` -> `data.eval`, and what is trained of their rows."""
    trained = _read_list(c, "datasets")
    eval_sources = _read_list(c, "test_datasets") if c.has("test_datasets") else []
    write_sources(c, "data.train", trained, ["datasets"], "datasets")
    write_sources(c, "data.eval", eval_sources, ["test_datasets"], "test_datasets")
    if not c.has("datasets"):
        c.refuse("datasets", "Axolotl needs it", "Write the rows to train on.")
    keys = [key for key in ("train_on_inputs",) if c.has(key)]
    write_training(c, [*trained, *eval_sources], keys)
    if trained and all(source.is_text for source in trained):
        c.ignore("train_on_inputs", "every token of a document is trained")
    if any(source.is_text for source in trained) and c.settled.get("data.overlong") == "drop":
        c.map("data.overlong", "split", note="a completion's document is cut into examples of sequence_len")
    plain = [source for source in trained if isinstance(source.format, dict) and "template" in source.format]
    if plain and len(plain) < len([source for source in trained if not source.is_text]):
        reason = (
            "some rows are prompts as plain text, others go through the chat template, and a recipe has one template"
        )
        c.refuse("datasets", reason, "Import them one at a time.")
    if trained and all(source.is_text or source in plain for source in trained):
        c.ignore("chat_template chat_template_jinja default_system_message", "no row goes through a chat template")
    else:
        _top_level_template(c)


def _read_list(c: Conversion, name: str) -> list[ImportedSource]:
    entries = c.value(name, [])
    entries = entries if isinstance(entries, list) else [entries]
    sources: list[ImportedSource] = []
    for index, entry in enumerate(entries):
        if isinstance(entry, dict):
            sources += _read_entry(c, f"{name}[{index}]", entry)
        else:
            c.refuse(f"{name}", "an entry is not a mapping with path and type", "Write - path: ..., type: ...")
    return sources


def _read_entry(c: Conversion, at: str, entry: dict[str, Any]) -> list[ImportedSource]:
    split = str(entry.get("split") or "train")
    sources = read_place(c, at, "path", "data_files", split)
    read_split(c, f"{at}.split", sources)
    read_subset(c, f"{at}.name", sources)
    _read_shard(c, at, sources)
    c.ignore(f"{at}.ds_type", "the file's name tells its kind")
    if str(entry.get("ds_type")) == "text":
        c.refuse(f"{at}.ds_type", "Axolotl makes a row of each line, and lorakit of each document", "Write JSON Lines.")
    if entry.get("revision"):
        for source in sources:
            source.facts["revision"] = str(entry["revision"])
        c.account(f"{at}.revision", "mapped", to="revision")
    kind = _read_type(c, at, entry)
    for source in sources:
        source.format, source.columns, source.trains, source.is_text = kind
    return sources


def _read_shard(c: Conversion, at: str, sources: list[ImportedSource]) -> None:
    """One of `shards` of the shuffled rows, which is so large a share of them."""
    shards = c.whole(f"{at}.shards")
    if not shards or shards < 2:
        c.ignore([f"{at}.shards", f"{at}.shards_idx"], "all rows")
        return
    for source in sources:
        source.facts["take"] = round(1 / shards, 6)
    reason = "as large a share of the rows, chosen by a hash of what they say"
    keys = [key for key in (f"{at}.shards", f"{at}.shards_idx") if c.has(key)]
    for key in keys:
        c.account(key, "mapped", to=f"take: {1 / shards:.6g}", reason=reason)


def _read_type(c: Conversion, at: str, entry: dict[str, Any]) -> RowKind:
    kind, everything = entry.get("type"), "all" if c.flag("train_on_inputs") else "assistant"
    key = f"{at}.type"
    if isinstance(kind, dict):
        return _own_prompt(c, key, kind, everything)
    word = str(kind or "").removesuffix(".default")
    if word in ("chat_template", "chat_template.argilla"):
        return _chat(c, at, entry, everything)
    if word.startswith("sharegpt"):
        return _old_sharegpt(c, at, entry, everything)
    if word.partition(":")[0] in ("completion", "pretrain"):
        column = str(entry.get("field") or word.partition(":")[2] or "text")
        c.account(key, "mapped", to="format: text")
        if c.has(f"{at}.field"):
            c.account(f"{at}.field", "mapped", to=f"columns: {{text: {column}}}")
        return "text", {"text": column} if column != "text" else {}, "all", True
    if prompt := _PLAIN_PROMPTS.get(word):
        return _plain(c, key, prompt, everything)
    if kind is None and not entry.get("field_messages"):
        c.ignore(f"{at}.field", "the rows have token ids already")
        c.note(f"{at} has no type: its rows must have token ids (input_ids, labels) of this base.")
        return "tokens", {}, everything, False
    c.refuse(key, f"lorakit has no format for the rows or the prompt of {word or 'this entry'}", _PARTIAL)
    return None, {}, everything, False


def _chat(c: Conversion, at: str, entry: dict[str, Any], everything: str) -> RowKind:
    mappings = entry.get("message_property_mappings") or {}
    mappings = mappings if isinstance(mappings, dict) else {}
    role = str(mappings.get("role") or entry.get("message_field_role") or "role")
    content = str(mappings.get("content") or entry.get("message_field_content") or "content")
    column = str(entry.get("field_messages") or "messages")
    result = conversations(role, content, column, _roles(c, at, entry))
    inner = [f"{at}.message_property_mappings.{name}" for name in mappings]
    keys = [f"{at}.{key}" for key in ("type", "field_messages", "message_field_role", "message_field_content", "roles")]
    if isinstance(result, str):
        c.refuse([*inner, *keys[2:4]] or keys, result, "Rename them in the rows.")
        return "messages", {}, everything, False
    form, columns = result
    name = form if isinstance(form, str) else next(iter(form))
    for key in [*keys, *inner]:
        if c.has(key):
            c.account(key, "mapped", to=f"format: {name}")
    for key in (f"{at}.message_property_mappings.{name}" for name in mappings if name not in ("role", "content")):
        ours = key.rpartition(".")[2]
        if str(mappings[ours]) == ours or ours in ("reasoning_content", "thinking"):
            c.ignore(key, "the format reads it under its own names")
    for ours, field in (("system", "field_system"), ("tools", "field_tools")):
        theirs = str(entry.get(field) or ours)
        if theirs != ours:
            columns = {**columns, ours: theirs}
        if entry.get(field):
            c.account(f"{at}.{field}", "same" if theirs == ours else "mapped", to=f"columns: {{{ours}: {theirs}}}")
    trains = _trained_roles(c, at, entry, everything)
    _source_template(c, at, entry)
    if trains == "all" and c.flag("train_on_inputs"):
        c.note("train_on_inputs: lorakit trains the marks around messages too, Axolotl their texts alone.")
    return form, columns, trains, False


def _roles(c: Conversion, at: str, entry: dict[str, Any]) -> dict[str, str]:
    roles = entry.get("roles")
    if not isinstance(roles, dict):
        return {}
    return {
        str(word): str(target)
        for target, words in roles.items()
        for word in (words if isinstance(words, list) else [words])
    }


def _trained_roles(c: Conversion, at: str, entry: dict[str, Any], everything: str) -> str:
    key, roles = f"{at}.roles_to_train", entry.get("roles_to_train")
    words = {_ROLES.get(str(role), str(role)) for role in roles} if isinstance(roles, list) else {"assistant"}
    end = str(entry.get("train_on_eos") or "turn")
    if end == "turn":
        c.ignore(f"{at}.train_on_eos", "the token that ends a trained turn is always trained")
    elif isinstance(roles, list):
        c.refuse(f"{at}.train_on_eos", f"lorakit trains the end of each trained turn, not {end}", "Write turn.")
    else:
        c.refuse(f"{at}.train_on_eos", f"lorakit trains the end of each trained turn, not {end}", "Write turn.")
    training_field = str(entry.get("message_field_training") or "train")
    if training_field in ("train", "weight"):
        c.ignore(f"{at}.message_field_training", "lorakit reads `train` and `weight` of a message")
    else:
        c.refuse(f"{at}.message_field_training", "lorakit reads it under the name `train`", "Rename it in the rows.")
    if words == {"assistant"}:
        if c.has(key):
            c.account(key, "same" if everything != "all" else "without effect", to="data.train_on: assistant")
        return everything
    if isinstance(roles, list) and not roles and everything == "assistant":
        c.account(key, "mapped", to="data.train_on: last", reason="without roles the last turn alone is trained")
        return "last"
    c.refuse(key, "lorakit trains the assistant's turns, the last one, or every token", "Write [assistant].")
    return everything


def _source_template(c: Conversion, at: str, entry: dict[str, Any]) -> None:
    name, key = str(entry.get("chat_template") or ""), f"{at}.chat_template"
    if c.has(f"{at}.chat_template_jinja"):
        _jinja(c, f"{at}.chat_template_jinja")
    if name and name == str(c.value("chat_template", "")):
        c.account(key, "same", reason="as the whole config's")
    elif name:
        _named_template(c, key, name)


def _top_level_template(c: Conversion) -> None:
    if c.has("chat_template_jinja"):
        _jinja(c, "chat_template_jinja")
    if c.has("chat_template"):
        _named_template(c, "chat_template", str(c.value("chat_template")))
    if isinstance(c.value("chat_template_kwargs"), dict):
        c.map("model.template_variables", dict(c.value("chat_template_kwargs")), "chat_template_kwargs")
    if c.has("default_system_message"):
        c.map("data.system", c.text("default_system_message"), "default_system_message")


def _named_template(c: Conversion, key: str, name: str) -> None:
    if name == "tokenizer_default":
        c.account(key, "same", to="model.chat_template: null", reason="the tokenizer's own")
    elif name.startswith("tokenizer_default_fallback_"):
        reason = "the tokenizer's own; where it has none, lorakit says so instead of taking another"
        c.account(key, "same", to="model.chat_template: null", reason=reason)
    elif name == "jinja":
        c.account(key, "mapped", to="model.chat_template", reason="chat_template_jinja says which")
    else:
        chat_template(c, key, name)


def _jinja(c: Conversion, key: str) -> None:
    text = str(c.value(key))
    if "{" in text or "\n" in text:
        c.write_template(text, key)
    elif reason := remote_reason(text):
        c.refuse(key, reason, "Save the template as a .jinja file, and write its path.")
    else:
        c.map("model.chat_template", local_path(c, text, is_file=True), key)


def _old_sharegpt(c: Conversion, at: str, entry: dict[str, Any], everything: str) -> RowKind:
    column = str(entry.get("field_messages") or "conversations")
    c.account(f"{at}.type", "mapped", to="format: sharegpt")
    for key in ("field_human", "field_model"):
        if c.has(f"{at}.{key}"):
            c.account(f"{at}.{key}", "mapped", to="format: sharegpt")
    if c.has(f"{at}.conversation"):
        name = str(entry["conversation"])
        if name != str(c.value("chat_template", "")):
            chat_template(c, f"{at}.conversation", _CONVERSATIONS.get(name, name))
        else:
            c.account(f"{at}.conversation", "same", reason="as the whole config's chat_template")
    elif not c.has("chat_template"):
        chat_template(c, f"{at}.type", "vicuna_v1.1")
    return "sharegpt", {"conversations": column} if column != "conversations" else {}, everything, False


def _plain(c: Conversion, key: str, prompt: PlainPrompt, everything: str) -> RowKind:
    """A prompt of plain text: the format `template`, and a chat template that adds nothing to it."""
    if c.files or write_plain_template(c, key):
        c.account(key, "mapped", to="format: template; model.chat_template", reason=_RAW)
    return template_format(prompt), {}, everything, False


def _own_prompt(c: Conversion, key: str, kind: dict[str, Any], everything: str) -> RowKind:
    """A type of one's own (user_defined.py): its fields and formats, with Axolotl's defaults."""
    fields = {ours: str(kind.get(f"field_{ours}") or ours) for ours in ("instruction", "input", "output", "system")}
    formats = {"format": "{instruction} {input} ", "no_input_format": "{instruction} ", "system_format": "{system}"}
    texts = {name: str(kind.get(name) or default) for name, default in formats.items()}
    for name, text in texts.items():
        known = {"format": ("instruction", "input"), "no_input_format": ("instruction",), "system_format": ("system",)}
        if unknown := unknown_places(text, dict.fromkeys(known[name], "")):
            c.refuse(f"{key}.{name}", f"{{{unknown[0]}}} is no place that is filled there", "Correct the format.")
            return None, {}, everything, False
    system = str(kind.get("system_prompt") or "")
    otherwise = (
        texts["system_format"].replace("{system}", system.replace("{", "{{").replace("}", "}}")) if system else ""
    )
    prompt = PlainPrompt(texts["format"], texts["no_input_format"], texts["system_format"], otherwise, fields)
    form = _plain(c, f"{key}.{next(iter(kind), '')}", prompt, everything)
    for name in kind:
        if kind[name] is not None and name in (*(f"field_{ours}" for ours in fields), *formats, "system_prompt"):
            c.account(f"{key}.{name}", "mapped", to="format: template")
    return form
