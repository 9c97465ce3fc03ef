"""A model's tokenizer and chat template from its files, without transformers."""

import json
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from lorakit.bounds import TooLong, bounded
from lorakit.data.glance.token_counts import FAULTS, Counter
from lorakit.data.template_source import compile_bounded
from lorakit.errors import UserError

_SAMPLE = "lorakitsample"
# A template writes a conversation in milliseconds.
_SECONDS, _MEMORY = 10, 2 << 30

# `{% generation %}` marks answers for transformers; for their text it is no more than a block.
_MARKS = (
    (re.compile(r"\{%([-+]?)\s*generation\s*([-+]?)%\}"), r"{%\1 if true \2%}"),
    (re.compile(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}"), r"{%\1 endif \2%}"),
)


def counter_of(
    tokenizer_file: Path, template: Path | None = None, variables: Mapping[str, Any] | None = None
) -> Counter:
    """What counts the tokens of a model's rows: its tokenizer.json, and the chat template beside it, or another, with
    values of the template's variables.

    Raises:
        ValueError: the tokenizer's file cannot be read.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    except Exception as error:  # the package raises nothing more special
        raise ValueError(str(error)) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    config = _json(tokenizer_file.with_name("tokenizer_config.json"))
    words = {name: _word(value) for name, value in config.items() if name.endswith("_token") and value}
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    special |= set(filter(None, words.values()))
    texts = _templates(tokenizer_file.parent, config, template)
    return Counter(
        tokenizer=tokenizer,
        write=_writer(texts, words, variables or {}) if texts else None,
        special=re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True)))) if special else None,
        end=words.get("eos_token", ""),
        opening=len(tokenizer.encode("a").ids) - len(tokenizer.encode("a", add_special_tokens=False).ids),
    )


def templates_here(folder: Path | None, template: Path | None) -> dict[str, str]:
    """The chat template in a model's folder, or another, or several by name; none where it is not here."""
    config = _json(folder / "tokenizer_config.json") if folder else {}
    return _templates(folder or Path(), config, template) if folder or template else {}


def check_template_variables(folder: Path | None, template: Path | None, values: Mapping[str, Any]) -> None:
    """Refuse values of variables that the chat template in a model's folder, or another, does not read.

    A template that is not here, or is none, is left to the run.

    Raises:
        UserError: there is such a variable.
    """
    from jinja2 import TemplateSyntaxError

    from lorakit.data.template_source import find_variables

    texts, config = templates_here(folder, template), _json(folder / "tokenizer_config.json") if folder else {}
    if not texts:
        return
    environment = _environment()
    words = (name for name, value in config.items() if name.endswith("_token") and value)
    given = frozenset({"messages", "tools", "documents", "add_generation_prompt", *environment.globals, *words})
    try:
        read = find_variables(environment, [_without_marks(text) for text in texts.values()], given)
    except TemplateSyntaxError:
        return
    read.check(values)


def _environment() -> Any:
    """Jinja as transformers sets it up for chat templates."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _as_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    return environment


def _without_marks(text: str) -> str:
    for mark, block in _MARKS:
        text = mark.sub(block, text)
    return text


def _templates(folder: Path, config: dict[str, Any], given: Path | None) -> dict[str, str]:
    """The chat templates of a tokenizer by name; `default`, and for some `tool_use`."""
    file = given or folder / "chat_template.jinja"
    if file.is_file():
        return {"default": file.read_text(encoding="utf-8")}
    written = config.get("chat_template")
    if isinstance(written, str):
        return {"default": written}
    named = written if isinstance(written, list) else []
    return {
        one["name"]: one["template"] for one in named if isinstance(one, dict) and {"name", "template"} <= one.keys()
    }


def _writer(texts: dict[str, str], words: dict[str, str], variables: Mapping[str, Any]) -> Callable[..., str] | None:
    """`write(messages, tools, ask)`: a template's text, rendered in jinja2's sandbox; None where it is no template."""
    from jinja2 import TemplateError

    environment, compiled = _environment(), {}
    for name, text in texts.items():
        try:
            compiled[name] = compile_bounded(environment, _without_marks(text))
        except TemplateError:  # `lorakit data` says so; here the rows are estimated
            return None

    def write(messages: list[dict[str, Any]], tools: Any, ask: bool) -> str:
        chosen = compiled.get("tool_use") if tools else None
        template = chosen or compiled["default"]
        given = {"messages": messages, "tools": tools or None, "documents": None, "add_generation_prompt": ask}
        # As Template.render does it, without gathering the names that every template knows anew each time.
        context = template.new_context({**template.globals, **words, **variables, **given}, shared=True)
        try:
            with bounded(_SECONDS, _MEMORY):
                return "".join(template.root_render_func(context))
        except (TooLong, MemoryError) as error:
            raise UserError(
                f"model.chat_template: it computes for more than {_SECONDS} s to write {len(messages)} messages, or "
                f"takes more than {_MEMORY >> 30} GiB. Fix the template, or write another."
            ) from error

    if "default" not in compiled:
        return None
    found: list[Callable[..., str]] = []

    def write_as_read(messages: list[dict[str, Any]], tools: Any, ask: bool) -> str:
        if not found:  # tried at first use, in the main thread, where the time is bounded
            in_parts = not _writes(write, _SAMPLE) and _writes(_in_parts(write), _SAMPLE)
            found.append(_in_parts(write) if in_parts else write)
        return found[0](messages, tools, ask)

    return write_as_read


def _writes(write: Callable[..., str], text: str) -> bool:
    """Whether the template writes a question's text."""
    from jinja2 import TemplateError

    try:
        return text in write([{"role": "user", "content": text}], None, True)
    except (TemplateError, *FAULTS):
        return False


def _in_parts(write: Callable[..., str]) -> Callable[..., str]:
    """The same with each content as a list of one part, as templates for images and texts read it."""

    def write_parts(messages: list[dict[str, Any]], tools: Any, ask: bool) -> str:
        told = [one | {"content": [{"type": "text", "text": one.get("content") or ""}]} for one in messages]
        return write(told, tools, ask)

    return write_parts


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _as_json(value: Any, indent: int | None = None, **others: Any) -> str:
    """As templates expect it: without the escapes for HTML that jinja2's own writes."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **others)


def _word(value: Any) -> str:
    return str(value.get("content", "")) if isinstance(value, dict) else str(value)


def _json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}
