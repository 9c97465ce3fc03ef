"""What the tests of rendering and encoding ask of a mask, judged by what transformers writes for inference."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from data_families import Family
from transformers import PreTrainedTokenizerFast

from lorakit.data.chat_template import ChatTemplate, render
from lorakit.data.rows import IGNORED, Conversation, Encoded, Message, RowError
from lorakit.data.tokenize import Encoder


def examples(
    family: Family,
    tokenizer: PreTrainedTokenizerFast,
    messages: list[Message],
    train_on: str = "assistant",
    tools: list[dict[str, Any]] | None = None,
    system: str | None = None,
) -> list[Encoded]:
    template = ChatTemplate(tokenizer, train_on, system, family.stops)
    encoded = Encoder(tokenizer).encode(render(Conversation(messages, tools), template))
    for one in encoded:
        if isinstance(one, RowError):
            raise one
    return [one for one in encoded if isinstance(one, Encoded)]


def example(*arguments: Any, **settings: Any) -> Encoded:
    """The one example of a row."""
    (encoded,) = examples(*arguments, **settings)
    return encoded


def refusal(family: Family, messages: list[Message], *arguments: Any, kind: str = "bytes", **settings: Any) -> str:
    with pytest.raises(RowError) as caught:
        examples(family, family.tokenizer(kind), messages, *arguments, **settings)
    return str(caught.value)


def tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompt(
    family: Family,
    tokenizer: PreTrainedTokenizerFast,
    messages: list[Message],
    tools: list[dict[str, Any]] | None = None,
) -> list[int]:
    """What the model reads at inference before it answers."""
    told = [_as_sent(message, family.json_text) for message in messages]
    text = tokenizer.apply_chat_template(told, tools=tools, tokenize=False, add_generation_prompt=True)
    return tokens(tokenizer, text)


def _as_sent(message: Message, json_text: bool) -> Message:
    message = {key: value for key, value in message.items() if key != "train"}
    if not message.get("thinking", "").strip():
        message.pop("thinking", None)
    if json_text and "tool_calls" in message:
        functions = [call["function"] for call in message["tool_calls"]]
        texts = [json.dumps(function["arguments"], ensure_ascii=False) for function in functions]
        message["tool_calls"] = [
            called | {"function": function | {"arguments": text}}
            for called, function, text in zip(message["tool_calls"], functions, texts, strict=True)
        ]
    return message


def trained_texts(tokenizer: PreTrainedTokenizerFast, encoded: Encoded) -> list[str]:
    """The text of each trained turn, decoded in its place."""
    texts = []
    for start, end in encoded.turns:
        assert encoded.labels[start:end] == encoded.input_ids[start:end]
        before, after = (tokenizer.decode(encoded.input_ids[:edge]) for edge in (start, end))
        assert after.startswith(before)
        texts.append(after[len(before) :])
    return texts


def trained_answers(messages: list[Message], train_on: str) -> list[int]:
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return [index for index in (answers[-1:] if train_on == "last" else answers) if messages[index].get("train", True)]


def assert_exact(
    family: Family,
    tokenizer: PreTrainedTokenizerFast,
    messages: list[Message],
    found: Sequence[Encoded],
    train_on: str = "assistant",
    tools: list[dict[str, Any]] | None = None,
) -> None:
    """Labels decode to exactly the trained turns, each once and behind the prompt that the model reads at inference,
    and nothing else has a label. The first prompts have the tokens of inference; later ones read what the model said in
    the tokens in which it said it, which are sometimes others than those of the text."""
    wanted = [
        (
            prompt(family, tokenizer, messages[:index], tools),
            _comparable(family.turn(messages[index]), family, tokenizer),
        )
        for index in trained_answers(messages, train_on)
    ]
    got = [
        (encoded.input_ids[:start], _comparable(text, family, tokenizer))
        for encoded in found
        for (start, _), text in zip(encoded.turns, trained_texts(tokenizer, encoded), strict=True)
    ]
    assert _read(got, tokenizer) == _read(wanted, tokenizer)
    at_inference = [ids for ids, _ in wanted]
    assert all(encoded.input_ids[: encoded.turns[0][0]] in at_inference for encoded in found)
    for encoded in found:
        inside = {at for start, end in encoded.turns for at in range(start, end)}
        outside = [label for at, label in enumerate(encoded.labels) if at not in inside]
        if train_on != "all":
            assert all(label == IGNORED for label in outside)
        elif all(message.get("train", True) for message in messages):
            assert encoded.labels == encoded.input_ids


def _read(turns: list[tuple[list[int], str]], tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    texts = [(tokenizer.decode(ids), text) for ids, text in turns]
    if _writes_spaces(tokenizer):
        texts = [("".join(read.replace("▁", " ").split()), text) for read, text in texts]
    return sorted(texts)


def _comparable(text: str, family: Family, tokenizer: PreTrainedTokenizerFast) -> str:
    if family.strips:
        text = text.lstrip()
    return "".join(text.replace("▁", " ").split()) if _writes_spaces(tokenizer) else text


def _writes_spaces(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether it puts spaces of its own into what it encodes."""
    return "".join(tokenizer.convert_ids_to_tokens(tokens(tokenizer, "a"))) != "a"
