"""Templates get conversations in the form that each reads, at little cost; texts are trained whole."""

import pickle
from dataclasses import fields

import pytest
from data_families import FAMILIES, TOKENIZERS, TOOLS, Family, answer, call, chat, result
from data_masks import assert_exact, example, tokens, trained_texts

from lorakit.data.chat_template import ChatTemplate, render
from lorakit.data.rows import Conversation, Text
from lorakit.data.tokenize import Encoder

CALLS = [
    *chat("How is the weather in Rome?"),
    answer(tool_calls=[call(city="Rome à la mer")]),
    result('{"t": 20}'),
    answer("It is 20 degrees."),
]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_text_is_trained_whole_with_the_token_that_ends_it(kind):
    family = FAMILIES["zephyr"]
    tokenizer = family.tokenizer(kind)
    (encoded,) = Encoder(tokenizer).encode(render(Text("Un été\n à la mer"), ChatTemplate(tokenizer)))
    assert encoded.input_ids == [*tokens(tokenizer, "Un été\n à la mer"), tokenizer.eos_token_id]
    assert encoded.labels == encoded.input_ids


def test_a_text_begins_as_the_tokenizer_begins_texts():
    from tokenizers import processors

    tokenizer = FAMILIES["zephyr"].tokenizer("pieces, space first")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    (encoded,) = Encoder(tokenizer).encode(render(Text("Hello"), ChatTemplate(tokenizer)))
    assert encoded.input_ids == [*tokenizer("Hello")["input_ids"], tokenizer.eos_token_id]
    assert encoded.input_ids[0] == tokenizer.bos_token_id


def test_a_template_goes_to_another_process_without_what_it_found_out():
    family = FAMILIES["qwen 3"]
    template = ChatTemplate(family.tokenizer(), "last", "Be brief.", family.stops)
    before = render(Conversation(CALLS, TOOLS), template)
    copy = pickle.loads(pickle.dumps(template))  # noqa: S301 - our own
    assert set(vars(copy)) == {field.name for field in fields(ChatTemplate)}
    assert render(Conversation(CALLS, TOOLS), copy) == before


@pytest.mark.parametrize(("name", "times"), [("smollm 2", 0), ("gemma 3", 0), ("qwen 3", 2), ("llama 2", 2)])
def test_a_plain_row_costs_two_renderings_or_none_once_its_shape_is_known(name, times, monkeypatch):
    template = ChatTemplate(FAMILIES[name].tokenizer(), system="Answer in one short sentence.")
    talk = Conversation(chat("Hello", "Hello there!"))
    render(talk, template)
    written, write = [], ChatTemplate.write
    monkeypatch.setattr(ChatTemplate, "write", lambda *given, **more: written.append(1) or write(*given, **more))
    render(talk, template)
    assert len(written) == times


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("c.function.arguments | tojson", '{"city": "Rome"}'),
        ("c.function.arguments", '{"city": "Rome"}'),
        ("'[' + c.function.arguments + ']'", '[{"city": "Rome"}]'),
    ],
)
@pytest.mark.parametrize("content", ["m.content", "(m.content or '')", "('' if m.content is none else m.content)"])
def test_a_template_gets_arguments_and_content_as_it_reads_them(arguments, said, content):
    template = (
        "{% for m in messages %}{{ m.role + ':' + (" + content + ") }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name + ' ' }}{{ " + arguments + " }}{% endfor %}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    family = Family(template, str, "</s>")
    tokenizer = family.tokenizer()
    talk = [*chat("Weather?"), answer(tool_calls=[call(city="Rome")]), result("20"), answer("20.")]
    assert trained_texts(tokenizer, example(family, tokenizer, talk)) == [f"weather {said}</s>", "20.</s>"]


@pytest.mark.parametrize(
    "thought",
    [
        "m.reasoning_content",
        "m.thinking",
        "m.reasoning",
        "(m.thinking or m.reasoning_content)",
        "(m.thinking or '') + (m.reasoning_content or '')",
    ],
)
def test_thinking_is_written_once_under_whatever_name_a_template_reads(thought):
    template = (
        "{% for m in messages %}{{ m.role + ':' }}{% if m.role == 'assistant' %}{{ '<' + (THOUGHT or '') + '>' }}"
        "{% endif %}{{ m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    ).replace("THOUGHT", thought)
    family = Family(template, str, "</s>")
    tokenizer = family.tokenizer()
    talk = [*chat("Hello"), answer("b", thinking="hm"), *chat("And?"), answer("d", thinking=" ")]
    assert trained_texts(tokenizer, example(family, tokenizer, talk)) == ["<hm>b</s>", "<>d</s>"]


def test_a_tokenizer_with_a_template_for_tools_uses_it_for_them():
    family = FAMILIES["qwen 2.5"]
    tokenizer = family.tokenizer()
    tokenizer.chat_template = {"default": FAMILIES["chatml"].template, "tool_use": family.template}
    encoded = example(family, tokenizer, CALLS, tools=TOOLS)
    assert_exact(family, tokenizer, CALLS, [encoded], tools=TOOLS)
    talk = chat("Hello", "Paris.")
    assert example(family, tokenizer, talk) == example(FAMILIES["chatml"], FAMILIES["chatml"].tokenizer(), talk)
