"""Chat templates that a tool has by name: those that are the base's own, and those that are one of lorakit's."""

import re

from lorakit.recipe.chat_templates import template_file
from lorakit.share.importing.conversion import Conversion

OWN_TEMPLATES = {
    "Axolotl": {
        "llama3": r"meta-llama-3-\d+b-instruct",
        "qwen_25": r"qwen2\.5-(?:coder-)?[\d.]+b-instruct",
        "gemma": r"gemma-(?:1\.1-)?[27]b-it|gemma-2-\d+b-it",
        "gemma3": r"gemma-3-\w+-it",
        "phi_35": r"phi-3\.5-mini-instruct",
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
    "Axolotl": {"chatml": ("chatml", True, ""), "llama3": ("llama-3", True, "")},
    "LLaMA-Factory": {
        "chatml": ("chatml", True, ""),
        "qwen": ("chatml", True, _QWEN),
        "qwen3_nothink": ("chatml", True, ""),
        "llama3": ("llama-3", False, ""),
    },
}
"""A tool's template -> lorakit's that writes the same text for messages without tools; whether the tool takes white
space around texts away where lorakit's does; and its system prompt for rows that have none
(axolotl/utils/chat_templates, llamafactory/data/template.py)."""
SEVERAL_TEMPLATES = "rows of the config have several chat templates, and a recipe has one"


def chat_template(c: Conversion, key: str, name: str) -> None:
    """A chat template that the tool has under a name: the base's own, or written beside the recipe, or refused."""
    base = str(c.recipe.get("model.base", "")).lower().rpartition("/")[2]
    pattern = OWN_TEMPLATES.get(c.tool, {}).get(name)
    if pattern and re.fullmatch(pattern, base):
        c.account(key, "same", to="model.chat_template: null", reason=f"{name} is the base's own chat template")
    elif name in _SAME_TEXT.get(c.tool, {}):
        ours, is_trimmed, system = _SAME_TEXT[c.tool][name]
        before, files = c.recipe.get("model.chat_template"), dict(c.files)
        if is_trimmed:
            c.map("model.chat_template", ours, key)
        else:
            c.write_template(template_file(ours).read_text(encoding="utf-8").replace(" | trim", ""), key)
        if before not in (None, c.recipe["model.chat_template"]) or (files and files != c.files):
            c.refuse(key, SEVERAL_TEMPLATES, "Import one at a time.")
            return
        c.note(f"{name} is for messages without tools; the base's vocabulary must have its special tokens.")
        if system and "data.system" not in c.recipe:
            c.map("data.system", system, note=f"the system prompt of {name}")
    else:
        reason = f"{name} is {c.tool}'s own template, which may write other text than the base's tokenizer"
        remedy = "Save it as a .jinja file and write model.chat_template, or import with --partial for the base's own."
        c.refuse(key, reason, remedy)
