"""The chat template of a model from its files, and whether it reads a recipe's variables; without transformers."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.data.template_source import find_variables

# `{% generation %}` marks answers for transformers; jinja2 alone knows no such tag.
_GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")


def read_templates(folder: Path | None, template: Path | None) -> dict[str, str]:
    """The chat template in a model's folder, or `template` instead: `default`, and for some models others by name;
    empty where there is none."""
    file = template or (folder / "chat_template.jinja" if folder else None)
    if file and file.is_file():
        return {"default": file.read_text(encoding="utf-8")}
    given = _read_config(folder).get("chat_template")
    if isinstance(given, str):
        return {"default": given}
    named = [one for one in given if isinstance(one, dict)] if isinstance(given, list) else []
    return {one["name"]: one["template"] for one in named if {"name", "template"} <= one.keys()}


def check_template_variables(folder: Path | None, template: Path | None, values: Mapping[str, Any]) -> None:
    """Refuse values of variables that the chat template in a model's folder, or `template` instead, does not read.

    A template that is not here, or is damaged, is left to the run.

    Raises:
        UserError: there is such a variable.
    """
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = json.dumps
    tokens = (name for name, value in _read_config(folder).items() if name.endswith("_token") and value)
    given = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}
    sources = [_GENERATION.sub("", source) for source in read_templates(folder, template).values()]
    try:
        variables = find_variables(environment, sources, frozenset({*given, *environment.globals, *tokens}))
    except TemplateSyntaxError:
        return
    if sources:
        variables.check(values)


def _read_config(folder: Path | None) -> dict[str, Any]:
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")) if folder else {}
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
