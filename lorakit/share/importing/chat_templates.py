"""Chat templates that a tool has by name: those that are the base's own, and simple ones that are written beside the
recipe."""

import re

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

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + CONTENT + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
_QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_WRITTEN = {
    "Axolotl": {
        "chatml": (_CHATML, ""),
        "llama3": (_LLAMA_3.replace("CONTENT", "message['content'] | trim"), ""),
    },
    "LLaMA-Factory": {
        "chatml": (_CHATML, ""),
        "qwen": (_CHATML, _QWEN),
        "qwen3_nothink": (_CHATML, ""),
        "llama3": (_LLAMA_3.replace("CONTENT", "message['content']"), ""),
    },
}
"""A tool's template -> the same in Jinja for messages without tools, and its system prompt for rows that have none
(axolotl/utils/chat_templates, llamafactory/data/template.py)."""


def chat_template(c: Conversion, key: str, name: str) -> None:
    """A chat template that the tool has under a name: the base's own, or written beside the recipe, or refused."""
    base = str(c.recipe.get("model.base", "")).lower().rpartition("/")[2]
    pattern = OWN_TEMPLATES.get(c.tool, {}).get(name)
    if pattern and re.fullmatch(pattern, base):
        c.account(key, "same", to="model.chat_template: null", reason=f"{name} is the base's own chat template")
    elif name in _WRITTEN.get(c.tool, {}):
        text, system = _WRITTEN[c.tool][name]
        if c.files and text not in c.files.values():
            c.refuse(
                key, "rows of the config have several chat templates, and a recipe has one", "Import one at a time."
            )
            return
        c.write_template(text, key)
        c.note(f"{name} is written for messages without tools; the base's vocabulary must have its special tokens.")
        if system and "data.system" not in c.recipe:
            c.map("data.system", system, note=f"the system prompt of {name}")
    else:
        reason = f"{name} is {c.tool}'s own template, which may write other text than the base's tokenizer"
        remedy = "Save it as a .jinja file and write model.chat_template, or import with --partial for the base's own."
        c.refuse(key, reason, remedy)
