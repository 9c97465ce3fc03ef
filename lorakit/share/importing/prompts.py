"""Prompts that a tool writes as plain text, around columns of its own: as settings of the format `template`, and the
chat template that puts such a prompt and its answer together as the tool does."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Formatter
from typing import Any

from lorakit.share.importing.chat_templates import SEVERAL_TEMPLATES
from lorakit.share.importing.conversion import Conversion
from lorakit.share.importing.paths import is_local

_MARKS = re.compile(r"\{[{%#]|[}%#]\}|\{$|^\}")  # where Jinja begins and ends
_TASK = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
_WITH_CONTEXT, _BARE = _TASK.format(", paired with an input that provides further context"), _TASK.format("")
_INSTRUCTION = "### Instruction:\n{instruction}\n\n"


@dataclass(frozen=True)
class PlainPrompt:
    """The text before an answer: {instruction} and {input} in it stand for columns, and there is one for rows with an
    input and one for rows without. `system` comes before it, with {system} in it, where the row has a column for that;
    `system_otherwise` where it has not. `columns`: instruction, input, output, system -> the rows' columns."""

    with_input: str
    without_input: str
    system: str = ""
    system_otherwise: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    joins: bool = False
    """Whether instruction and input are lines of their own where they are not empty."""


_OF_ALPACA = {"instruction": "instruction", "input": "input", "output": "output"}
_OF_QUESTIONS = {"instruction": "question", "output": "answer"}
ALPACA = PlainPrompt(
    f"{_WITH_CONTEXT}\n\n{_INSTRUCTION}### Input:\n{{input}}\n\n### Response:\n",
    f"{_BARE}\n\n{_INSTRUCTION}### Response:\n",
    columns=_OF_ALPACA,
)
ALPACA_CHAT = PlainPrompt(
    f"SYSTEM: {_WITH_CONTEXT}\nUSER: {{instruction}}\n{{input}}\nASSISTANT:",
    f"SYSTEM: {_BARE}\nUSER: {{instruction}}\nASSISTANT:",
    columns=_OF_ALPACA,
)
_TURN, _BARE_TURN = "USER: {instruction}\n{input}\nASSISTANT:", "USER: {instruction}\nASSISTANT:"
ALPACA_CONCISE = PlainPrompt(
    "SYSTEM: Below is an instruction from a USER that describes a task, paired with an input that provides further "
    "context. The ASSISTANT writes a response that concisely and appropriately completes the request.\n\n\n" + _TURN,
    "SYSTEM: Below is an instruction from a USER that describes a task. The ASSISTANT writes a response that "
    "appropriately and concisely completes the request.\n\n\n" + _BARE_TURN,
    columns=_OF_ALPACA,
)
ALPACA_CHATML = PlainPrompt(
    f"<|im_start|>system\n{_WITH_CONTEXT}<|im_end|>\n<|im_start|>user\n{{instruction}}\n{{input}}<|im_end|>\n"
    "<|im_start|>assistant\n",
    f"<|im_start|>system\n{_BARE}<|im_end|>\n<|im_start|>user\n{{instruction}}<|im_end|>\n<|im_start|>assistant\n",
    columns=_OF_ALPACA,
)
ALPACA_PHI = PlainPrompt(
    f"<|system|>\n{_WITH_CONTEXT}<|end|>\n<|user|>\n{{instruction}}<|end|>{{input}}<|assistant|>",
    f"<|system|>\n{_BARE}<|end|>\n<|user|>\n{{instruction}}<|end|>\n<|assistant|>\n",
    columns=_OF_ALPACA,
)
UNPROMPTED = PlainPrompt(
    f"{_INSTRUCTION}### Input:\n{{input}}\n\n### Response:\n",
    f"{_INSTRUCTION}### Response:\n",
    columns=_OF_ALPACA,
)
UNPROMPTED_CHAT = PlainPrompt(_TURN, _BARE_TURN, columns=_OF_ALPACA)
_ARTICLE = (
    "SYSTEM: Use the following contextual information to concisely answer the question.\n\n"
    "USER: {input}\n===\n{instruction}\nASSISTANT:"
)
CONTEXT = PlainPrompt(_ARTICLE, _ARTICLE, columns={"instruction": "question", "input": "article", "output": "answer"})
_WITH_SYSTEM = {**_OF_ALPACA, "system": "system"}
SYSTEM_CHAT = replace(UNPROMPTED_CHAT, system="SYSTEM: {system}\n", columns=_WITH_SYSTEM)
SYSTEM_INSTRUCT = replace(UNPROMPTED, system="{system}\n\n", columns=_WITH_SYSTEM)
_ORCA_TURN = "### Human:\n{instruction}\n### Assistant:\n"
_ORCA_CHATML_TURN = "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n"
_OF_ORCA = {"instruction": "question", "output": "response", "system": "system_prompt"}
ORCA = PlainPrompt(_ORCA_TURN, _ORCA_TURN, "### System:\n{system}\n", columns=_OF_ORCA)
ORCA_CHATML = PlainPrompt(
    _ORCA_CHATML_TURN, _ORCA_CHATML_TURN, "<|im_start|>system\n{system}<|im_end|>\n", columns=_OF_ORCA
)
UNSLOTH_ALPACA = replace(ALPACA, without_input=ALPACA.with_input.replace("{input}", ""))
JOINED = PlainPrompt("{instruction}\n{input}", "{instruction}", columns=_OF_ALPACA, joins=True)


def template_format(prompt: PlainPrompt) -> dict[str, Any]:
    """The settings of the format `template` that write this prompt and its answer."""
    columns, answer = prompt.columns, _places("{output}", prompt.columns)
    if prompt.joins:
        names = (_variable(columns["instruction"]), _variable(columns["input"]))
        lines = ", ".join(f"{name} if {name} is defined else ''" for name in names)
        text = f"{{{{ [{lines}] | select | join('\\n') }}}}"
        return {"template": {"user": {"jinja_text": text}, "assistant": answer}}
    bare = prompt.without_input
    if "input" not in columns and "system" not in columns:
        return {"template": {"user": _places(prompt.system_otherwise + bare, columns), "assistant": answer}}
    text = _jinja(bare, columns)
    if "input" in columns and bare != prompt.with_input:
        filled = _jinja(prompt.with_input, columns)
        text = f"{{% if {_is_filled(columns['input'])} %}}{filled}{{% else %}}{text}{{% endif %}}"
    if "system" in columns:
        variable = _variable(columns["system"])
        own = f"{{% if {variable} %}}{_jinja(prompt.system, columns)}{{% endif %}}"
        other = f"{{% else %}}{_jinja(prompt.system_otherwise, columns)}" if prompt.system_otherwise else ""
        text = f"{{% if {variable} is defined %}}{own}{other}{{% endif %}}{text}"
    else:
        text = _jinja(prompt.system_otherwise, columns) + text
    return {"template": {"user": {"jinja_text": text}, "assistant": answer}}


def unknown_places(text: str, columns: Mapping[str, str]) -> list[str]:
    """What stands in braces in a text and is no column; the text itself where it cannot be read."""
    try:
        names = [name for _, name, _, _ in Formatter().parse(text) if name is not None]
    except ValueError:
        return [text]
    return [name for name in names if name not in columns]


def _places(text: str, columns: Mapping[str, str]) -> str:
    parts = []
    for literal, name, _, _ in Formatter().parse(text):
        parts.append(literal.replace("{", "{{").replace("}", "}}"))
        parts.append(f"{{{columns[name]}}}" if name is not None else "")
    return "".join(parts)


def _jinja(text: str, columns: Mapping[str, str]) -> str:
    pieces = list(Formatter().parse(text))
    parts = []
    for at, (literal, name, _, _) in enumerate(pieces):
        # Jinja drops the line break after a block and the last one of a text, unless an expression writes it.
        at_edge = (at == 0 and literal.startswith("\n")) or (at == len(pieces) - 1 and literal.endswith("\n"))
        is_plain = not at_edge and not _MARKS.search(literal)
        parts.append(literal if is_plain or not literal else f"{{{{ {json.dumps(literal, ensure_ascii=False)} }}}}")
        parts.append(f"{{{{ {_variable(columns[name])} }}}}" if name is not None else "")
    return "".join(parts)


def _variable(column: str) -> str:
    return column if column.isidentifier() and column != "row" else f"row[{json.dumps(column, ensure_ascii=False)}]"


def _is_filled(column: str) -> str:
    variable = _variable(column)
    return f"{variable} is defined and {variable}"


_BOS = (
    (True, r"deepseek"),  # its distilled Qwen and Llama models too
    (True, r"openhermes|openchat|starling|neural-chat|zephyr"),  # of Mistral
    (False, r"qwen|qwq|smollm|pythia|gpt-neo|gpt2|gpt-j|gpt-oss|phi-?[1-4]|falcon|starcoder|\byi-|stablelm|opt-iml"),
    (False, r"bloom|mamba|mpt-|redpajama|cerebras-gpt|olmo|granite|replit|dolly-v2|rwkv"),
    (True, r"llama-?[234]|codellama|tinyllama|open_?llama|llama-(?:7|13|30|33|65)b|alpaca|vicuna|guanaco|tulu|solar"),
    (True, r"mi[sx]tral|ministral|magistral|devstral|codestral|mathstral|gemma|command-r|c4ai|\baya-|jamba|lfm2"),
    (True, r"internlm|hermes-3|nous-hermes|wizardlm|orca-2|xwin|platypus"),
)
"""Whether a tokenizer begins a plain text with a token of its own -> names of its bases; the first that matches."""


def begins_with_bos(c: Conversion) -> bool | None:
    """Whether the base's tokenizer puts its beginning of sequence before a plain text; None where that is not known."""
    reference = str(c.recipe.get("model.base", ""))
    file = Path(reference) / "tokenizer.json"
    if is_local(c, reference) and file.is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
        return len(tokenizer.encode("a").ids) > len(tokenizer.encode("a", add_special_tokens=False).ids)
    name = reference.lower().rpartition("/")[2]
    return next((begins for begins, pattern in _BOS if re.search(pattern, name)), None)


def write_plain_template(c: Conversion, key: str) -> bool:
    """A chat template that writes prompts and answers as they stand, with an end of sequence after each answer, as a
    file beside the recipe; whether it could be written."""
    if c.recipe.get("model.chat_template") is not None:
        c.refuse(key, SEVERAL_TEMPLATES, "Import one at a time.")
        return False
    bos = begins_with_bos(c)
    if bos is None:
        reason = "whether the tokenizer begins a text with a token of its own is not known from the base's name"
        c.refuse(key, reason, "Download the base, and write its folder, or import with --partial.")
        return False
    turns = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
        "{% elif message['role'] == 'user' %}{{ message['content'] }}{% endif %}{% endfor %}"
    )
    c.write_template(("{{ bos_token }}" if bos else "") + turns, key)
    c.note("The prompt is plain text here as there: ask the trained model with the same text around the question.")
    return True
