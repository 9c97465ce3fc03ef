"""Where a template rewrites history, a row becomes several examples, each as the model meets it; else it stays one."""

import pytest
from data_families import FAMILIES, TOOLS, Family, answer, call, chat, result
from data_masks import assert_exact, examples, refusal, trained_texts

from lorakit.data.chat_template import ChatTemplate, render
from lorakit.data.rows import Conversation

ASK = "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
TALK = chat("a", "b", "c", "d")


def made(template, **facts):
    family = Family(template, lambda message: message["content"] + "</s>", "</s>", "<s>", **facts)
    return family, family.tokenizer()


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("qwen 3", "qwen 3.5", "harmony")])
def test_a_row_whose_history_stays_is_one_example(name):
    family = FAMILIES[name]
    (rendered,) = render(Conversation(TALK), ChatTemplate(family.tokenizer(), stop_words=family.stops))
    assert len(rendered.spans) == 2


HIDES_HISTORY = """\
{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
  {{- m.role + ':' + (m.content if loop.index0 >= ns.last else '...') + eos_token -}}
{%- endfor -%}"""


def test_each_answer_is_trained_behind_the_history_that_the_model_meets():
    family, tokenizer = made(HIDES_HISTORY + ASK)
    found = examples(family, tokenizer, TALK)
    assert [tokenizer.decode(encoded.input_ids) for encoded in found] == [
        "user:a</s>assistant:b</s>",
        "user:...</s>assistant:...</s>user:c</s>assistant:d</s>",
    ]
    assert_exact(family, tokenizer, TALK, found)
    assert examples(family, tokenizer, TALK, "last") == found[1:]
    assert "write data.train_on: assistant" in refusal(family, TALK, "all")


def test_answers_that_end_in_another_way_when_they_are_the_last_end_as_the_last():
    """Behind earlier answers stands the next header, which is a special token too and ends nothing."""
    family, tokenizer = made(
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
        "{{ '<|assistant|>' if add_generation_prompt else eos_token }}",
        special=("<|user|>", "<|assistant|>"),
    )
    found = examples(family, tokenizer, TALK)
    assert [trained_texts(tokenizer, encoded) for encoded in found] == [["b</s>"], ["d</s>"]]
    assert_exact(family, tokenizer, TALK, found)


def test_gpt_oss_learns_to_return_and_reads_that_others_ended():
    """Its training format: <|return|> at the end of what is trained, <|end|> in what is read."""
    family = FAMILIES["harmony"]
    tokenizer = family.tokenizer()
    first, second = examples(family, tokenizer, TALK)
    final = "<|start|>assistant<|channel|>final<|message|>"
    assert tokenizer.decode(first.input_ids).endswith(f"{final}b<|return|>")
    assert f"{final}b<|end|>" in tokenizer.decode(second.input_ids)
    assert tokenizer.decode(second.input_ids).count("<|return|>") == 1


def test_answers_that_share_a_history_share_an_example():
    """Qwen 3 keeps thoughts since the last question: calls and the answers behind them are trained in one text."""
    family = FAMILIES["qwen 3"]
    tokenizer = family.tokenizer()
    round_of_calls = [
        answer(thinking="look", tool_calls=[call(city="Rome")]),
        result("20"),
        answer("It is 20.", thinking="ok"),
    ]
    talk = [*chat("Rome?"), *round_of_calls, *chat("Again?"), *round_of_calls]
    found = examples(family, tokenizer, talk, tools=TOOLS)
    assert [len(encoded.turns) for encoded in found] == [2, 2]
    assert_exact(family, tokenizer, talk, found, tools=TOOLS)


def test_a_template_that_drops_the_last_line_break():
    family, tokenizer = made(
        "{% for m in messages %}{{ m.role + ':' + m.content + eos_token + ('' if loop.last else '\\n') }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\nassistant:' }}{% endif %}"
    )
    (encoded,) = examples(family, tokenizer, TALK)
    assert trained_texts(tokenizer, encoded) == ["b</s>", "d</s>"]


def test_a_template_that_always_writes_the_next_header():
    family, tokenizer = made(
        "{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}{{ 'assistant:' }}"
    )
    (encoded,) = examples(family, tokenizer, TALK)
    assert_exact(family, tokenizer, TALK, [encoded])
