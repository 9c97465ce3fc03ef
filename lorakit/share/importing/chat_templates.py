"""Chat templates that a tool has by name: those that are the base's own, those that are one of lorakit's, and those
that are written beside the recipe."""

import re
from pathlib import Path

from lorakit.recipe.chat_templates import CHAT_TEMPLATES
from lorakit.share.importing.conversion import Conversion
from lorakit.share.importing.turn_templates import to_jinja, turn_template

OWN_TEMPLATES = {
    "Axolotl": {
        "llama3": r"meta-llama-3-\d+b-instruct",
        "qwen_25": r"qwen2\.5-(?:coder-)?[\d.]+b-instruct",
        "gemma": r"gemma-(?:1\.1-)?[27]b-it|gemma-2-\d+b-it",
        "gemma3": r"gemma-3-\w+-it",
        "phi_35": r"phi-3\.5-mini-instruct",
        "qwen3": r"qwen3-[\d.]+b(?:-a\d+b)?",
    },
    "LLaMA-Factory": {
        "llama3": r"meta-llama-3-\d+b-instruct",
        "qwen": r"qwen2\.5-(?:coder-)?[\d.]+b-instruct",
        "qwen3_nothink": r"qwen3-[\w.-]+-instruct-2507",
        "gemma": r"gemma-(?:1\.1-)?[27]b-it",
        "gemma2": r"gemma-2-\d+b-it",
    },
}
"""A tool's template -> the bases whose own it is: the tool's text, compared with the base's tokenizer_config.json."""

_QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_SAME_TEXT = {
    "Axolotl": {
        "chatml": ("chatml", ""),
        "nemotron_h": ("chatml", ""),
        "qwen_25": ("chatml", _QWEN),
        "llama3": ("llama-3", ""),
        "gemma": ("gemma", ""),
        "gemma3": ("gemma", ""),
        "gemma3n": ("gemma", ""),
        "phi_35": ("phi-3", ""),
    },
    "LLaMA-Factory": {
        "chatml": ("chatml", ""),
        "yi": ("chatml", ""),
        "smollm": ("chatml", ""),
        "qwen": ("chatml", _QWEN),
        "qwen3_nothink": ("chatml", ""),
        "phi": ("phi-3", ""),
        "phi4": ("phi-4", ""),
    },
}
"""A tool's template -> lorakit's that writes the same text for messages without tools, and its system prompt for rows
that have none (axolotl/utils/chat_templates, llamafactory/data/template.py)."""
SEVERAL_TEMPLATES = "rows of the config have several chat templates, and a recipe has one"


def chat_template(c: Conversion, key: str, name: str, thinks: bool = True) -> None:
    """A chat template that the tool has under a name: the base's own, or written beside the recipe, or refused.
    `thinks`: whether an answer without a thought begins with an empty one that is trained."""
    base = str(c.recipe.get("model.base", "")).lower().rpartition("/")[2]
    pattern = OWN_TEMPLATES.get(c.tool, {}).get(name)
    if pattern and re.fullmatch(pattern, base):
        c.account(key, "same", to="model.chat_template: null", reason=f"{name} is the base's own chat template")
    elif name in _SAME_TEXT.get(c.tool, {}):
        ours, system = _SAME_TEXT[c.tool][name]
        before, files = c.recipe.get("model.chat_template"), dict(c.files)
        c.map("model.chat_template", ours, key)
        c.end_of_turn = CHAT_TEMPLATES[ours].end_of_turn or ""
        if _is_another(c, key, before, files):
            return
        c.note(f"{name} is for messages without tools; the base's vocabulary must have its special tokens.")
        if system and "data.system" not in c.recipe:
            c.map("data.system", system, note=f"the system prompt of {name}")
    elif turns := turn_template(c.tool, name):
        before, files = c.recipe.get("model.chat_template"), dict(c.files)
        c.write_template(to_jinja(turns, thinks), key)
        c.end_of_turn = turns.end_of_turn
        if not _is_another(c, key, before, files):
            c.note(f"{name} is for messages without tools; the base's vocabulary must have its special tokens.")
    else:
        reason = f"{name} is {c.tool}'s own template, which may write other text than the base's tokenizer"
        remedy = "Save it as a .jinja file and write model.chat_template, or import with --partial for the base's own."
        c.refuse(key, reason, remedy)


def _is_another(c: Conversion, key: str, before: str | None, files: dict[Path, str]) -> bool:
    """Whether the recipe had another template `before`, with these `files`, which is then refused."""
    is_another = before not in (None, c.recipe["model.chat_template"]) or (bool(files) and files != c.files)
    if is_another:
        c.refuse(key, SEVERAL_TEMPLATES, "Import one at a time.")
    return is_another
