"""Whether a template of Ollama's writes what the chat template writes: compared on conversations."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from jinja2 import nodes

from lorakit.data.chat_template import ChatTemplate
from lorakit.data.rows import Message, RowError
from lorakit.export.chat_shape import ChatShape
from lorakit.export.go_expression import GoTemplateError
from lorakit.export.go_template import GoTemplate
from lorakit.export.source import Check
from lorakit.model.llama_cpp import GgufModel
from lorakit.recipe.problem import quote

_TEXTS = (
    "Hello",
    "  between spaces  ",
    "\n\nlines,\n\n  indented\tand\r\nmore\n",
    "quotes \" ' ` and \\n, {{ .Content }}, {% if x %}, {# y #}, }} %s %d 100%",
    "Un été à la mer: 你好 😀 שלום e\u0301 \u200d",
    "\u00a0\u3000other spaces\u2028\u0085",
    '{"name": "a", "list": [1, 2.5, null], "b": "<&>"}',
    "# Title\n\n- **one** <b>two</b>\n```python\nprint('x')\n```",
)
_SYSTEMS = (None, "", "Answer in one word.", '  Be terse.\n\nSpeak {{French}}: "oui".\n', "你好")
_THOUGHT = re.compile(r"think|thought|reason|channel", re.IGNORECASE)
_MOST_SPECIAL = 200


@dataclass(frozen=True)
class TemplateComparison:
    """On how many conversations two templates were compared, and the first one on which they differ."""

    count: int
    difference: str = ""
    thoughts: str = ""  # a text in an earlier answer that the chat template rewrites, which marks a thought


def compare(template: ChatTemplate, shape: ChatShape, source: str, beginning: str = "") -> TemplateComparison:
    """Compare a template of Ollama's, before which something else writes `beginning`, with the chat template."""
    go, count, thoughts = GoTemplate(source), 0, ""
    for messages in conversations(shape):
        difference = _difference(template, go, messages, beginning)
        if difference:
            return TemplateComparison(count, difference)
        count += difference is not None
    roles = ("system", "user", "assistant")[0 if "system prompt" in shape.takes else 1 :]
    for text, role in product(special_texts(template), roles):
        for content in (text, f"One {text} two.", f"{text}\nOne.", f"One.\n{text}"):
            difference = _difference(template, go, _with_content(role, content), beginning)
            if difference and not (role == "assistant" and _THOUGHT.search(text)):
                return TemplateComparison(count, f"{quote(text)} in a message of role {role} changes it: {difference}")
            thoughts = text if difference else thoughts
            count += difference is not None
    return TemplateComparison(count, thoughts=thoughts)


def check_prompts(
    template: ChatTemplate, shape: ChatShape, source: str, beginning: str, model: GgufModel
) -> tuple[Check, ...]:
    """The template that was written, compared with the chat template, and its prompts as llama.cpp reads them with the
    training's tokens."""
    compared, go = compare(template, shape, source, beginning), GoTemplate(source)
    same = compared.difference or f"{compared.count} conversations are written as the chat template does"
    checks = [Check("template", not compared.difference, same)]
    if compared.thoughts:
        what = f"the chat template takes thoughts ({compared.thoughts}) out of earlier answers, the TEMPLATE does not"
        checks.append(Check("thoughts", False, f"{what}: send earlier answers without their thoughts", fatal=False))
    count = equal = 0
    for messages in conversations(shape):
        if (text := _write(template, messages)) is not None:
            ours = list(template.tokenizer(text, add_special_tokens=False)["input_ids"])
            equal += ours == model.tokenize_prompt(go.render(as_ollama_hands_it(messages)))
            count += 1
    # Some pre-tokenizers of llama.cpp are approximations, wrong for rare stretches of text.
    detail = f"{equal} of {count} prompts become the tokens of the training in llama.cpp"
    checks.append(Check("prompt tokens", equal == count, detail, fatal=2 * equal < count))
    return tuple(checks)


def conversations(shape: ChatShape) -> Iterator[list[Message]]:
    """Conversations of one to four turns that end with a question, with texts of many kinds."""
    systems = _SYSTEMS if "system prompt" in shape.takes else (None,)
    for (turns, system), first in product(product((1, 2, 3, 4), systems), range(len(_TEXTS))):
        texts = [_TEXTS[(first + at * 3) % len(_TEXTS)] for at in range(2 * turns - 1)]
        yield ([] if system is None else [{"role": "system", "content": system}]) + _turns(texts)


def as_ollama_hands_it(messages: list[Message]) -> dict[str, Any]:
    """What Ollama gives a template for messages of which no two neighbours have one role."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    listed = [{"Role": message["role"], "Content": message["content"]} for message in messages]
    return {"System": system, "Messages": listed, "Response": ""}


def special_texts(template: ChatTemplate) -> list[str]:
    """Texts that the chat template compares something with, or hands to a function: it may look for them in what a
    message says."""
    tree = template.compiled[0].environment.parse(template.source)
    texts: dict[str, None] = {}
    for node in tree.find_all((nodes.Compare, nodes.Call, nodes.Filter)):
        for constant in node.find_all(nodes.Const):
            if isinstance(constant.value, str) and len(constant.value.strip()) > 1:
                texts[constant.value] = None
    return list(texts)[:_MOST_SPECIAL]


def _turns(texts: list[str]) -> list[Message]:
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


def _with_content(role: str, content: str) -> list[Message]:
    texts = ["One?", "Two.", "Three?", "Four.", "Five?"]
    if role == "system":
        return [{"role": "system", "content": content}, *_turns(texts)]
    return [turn | {"content": content} if turn["role"] == role else turn for turn in _turns(texts)]


def _write(template: ChatTemplate, messages: list[Message]) -> str | None:
    """The prompt of a conversation; None where the chat template refuses it, after which no answer can be trained."""
    try:
        return template.write(messages, ask=True)
    except RowError:
        return None


def _difference(template: ChatTemplate, go: GoTemplate, messages: list[Message], beginning: str) -> str | None:
    """Where the two differ on a conversation; empty where they do not, None where there is nothing to compare."""
    expected = _write(template, messages)
    if expected is None:
        return None
    try:
        written = beginning + go.render(as_ollama_hands_it(messages))
    except GoTemplateError as error:
        return str(error)
    if written == expected:
        return ""
    at = next((at for at, (one, two) in enumerate(zip(expected, written, strict=False)) if one != two), len(written))
    shown = [quote(text[max(0, at - 20) : at + 40]) for text in (expected, written)]
    return f"{shown[0]} of the chat template would be {shown[1]}"
