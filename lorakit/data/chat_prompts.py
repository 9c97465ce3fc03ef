"""Rows as chat messages: the conversation of a row up to an answer, read and cleaned as the pipeline reads it, for a
model whose own server writes the chat template."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from lorakit.bounds import bounded
from lorakit.data.chat_template import ChatTemplate
from lorakit.data.chat_template.render import prepare_row
from lorakit.data.chat_template.templated_row import TemplatedRow
from lorakit.data.cleaning.clean import clean
from lorakit.data.examples import rules_of
from lorakit.data.rows import Conversation, Message, RowError, up_to_last_answer
from lorakit.data.sources import open_source, source_name, sources_of
from lorakit.progress import Progress
from lorakit.recipe.fields import is_split
from lorakit.recipe.schema import Data


@dataclass(frozen=True)
class ChatPrompt:
    """Messages up to an answer, the first of which may be the recipe's system prompt, and the tools that the model is
    told of. `variables`: given to the chat template besides. `tokens`: how many the training's own template and
    tokenizer make of it."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0

    def to_openai(self) -> dict[str, Any]:
        """The messages as the body of a request has them. Thoughts are `reasoning_content`, as DeepSeek's interface
        names them, and vLLM's and llama.cpp's after it."""
        facts: dict[str, Any] = {"messages": _with_call_ids([_to_openai(message) for message in self.messages])}
        if self.tools:
            facts["tools"] = [
                tool if "function" in tool else {"type": "function", "function": tool} for tool in self.tools
            ]
        if self.variables:
            facts["chat_template_kwargs"] = self.variables  # of vLLM, SGLang and llama.cpp
        return facts


def read_conversations(
    settings: Data, template: ChatTemplate, places: Collection[str], progress: Progress
) -> dict[str, TemplatedRow]:
    """The conversations at some places (`where` of the examples), with the recipe's system prompt. Rows of other kinds
    (documents, tokens) have none. `settings`: the data section that the examples were made of; the rows of its `eval`,
    or of its `train` where that is a share or nothing."""
    written = settings.train if settings.eval is None or is_split(settings.eval) else settings.eval
    wanted, conversations = set(places), dict[str, TemplatedRow]()
    fixes = {check: "fix" for check, action in rules_of(settings, None, survey=False).checks.items() if action == "fix"}
    for source in (open_source(one) for one in sources_of(settings, written)):
        own = replace(template, system=source.source.system)
        label = f"reading the messages of {source_name(source.source)}"
        with progress.bar(label, total=source.size, unit="bytes") as bar:
            for block in source.blocks:
                for row in block.rows():
                    if row.where not in wanted or isinstance(row.record, RowError):
                        continue
                    with bounded(60):
                        content, _ = clean(up_to_last_answer(source.parse(row.record)), fixes, own.controls)
                    if isinstance(content, Conversation):
                        conversations[row.where] = prepare_row(content, own)
                bar.advance(block.size)
    return conversations


def answer_to(row: TemplatedRow, tokens: Sequence[int], reference: str) -> tuple[int, dict[str, Any]] | None:
    """The number of the message that answers the prompt of these `tokens`, and the variables with which the template
    writes that prompt; `reference` is the answer's text. None where no message is, or the beginning of the answer is
    given."""
    template = row.template
    answers = [at for at, message in enumerate(row.messages) if message["role"] == "assistant"]
    tried = ({}, template.without_thoughts)[: 2 if template.without_thoughts else 1]
    chosen = next(
        ((at, extra) for at in reversed(answers) for extra in tried if _tokens(row, at, extra) == list(tokens)), None
    )
    if chosen is None:  # the prompt has another form, such as without a thought that the template opens
        alike = [at for at in answers if row.messages[at]["content"].strip() == reference.strip()]
        chosen = (alike[-1], {}) if alike else None
    return None if chosen is None or "begun" in row.messages[chosen[0]] else chosen


def prompt_before(row: TemplatedRow, tokens: Sequence[int], reference: str) -> ChatPrompt | None:
    """The messages before the answer whose prompt is `tokens`; `reference` is the answer's text. None where a chat
    request cannot ask for it: the beginning of the answer is given, or the answer calls tools."""
    chosen = answer_to(row, tokens, reference)
    if chosen is None or row.messages[chosen[0]].get("tool_calls"):
        return None
    at, extra = chosen
    return ChatPrompt(row.messages[:at], row.tools, {**row.template.variables, **extra}, len(_tokens(row, at, extra)))


def _tokens(row: TemplatedRow, at: int, variables: dict[str, Any]) -> list[int]:
    try:
        text = row.write(at, ask=True, variables=variables or None)
    except RowError:
        return []
    return list(row.template.tokenizer(text, add_special_tokens=False)["input_ids"])


def _to_openai(message: Message) -> dict[str, Any]:
    facts = {"role": message["role"], "content": message["content"]}
    facts |= {key: message[key] for key in ("name", "tool_call_id") if message.get(key)}
    if message.get("thinking"):
        facts["reasoning_content"] = message["thinking"]
    if message.get("tool_calls"):
        functions = [call["function"] for call in message["tool_calls"]]
        texts = [json.dumps(function["arguments"], ensure_ascii=False) for function in functions]
        calls = [{**function, "arguments": text} for function, text in zip(functions, texts, strict=True)]
        facts["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return facts


def _with_call_ids(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls and their results with ids, which servers require: those of the results, else numbers."""
    for at, message in enumerate(messages):
        after = takewhile(lambda other: other["role"] == "tool", messages[at + 1 :])
        results = list(after) if message.get("tool_calls") else []
        for number, call in enumerate(message.get("tool_calls", ())):
            result = results[number] if number < len(results) else {}
            call["id"] = result.get("tool_call_id", f"call_{at}_{number}")
            if result:
                result["tool_call_id"] = call["id"]
    return messages
