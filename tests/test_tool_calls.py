"""The metric of tool calls reads calls as the chat templates of published models write them, and compares them as
JSON."""

import pytest
import real_templates
from data_families import FAMILIES, TOOLS, answer, call, chat

from lorakit.data.chat_template import ChatTemplate
from lorakit.data.rows import RowError
from lorakit.evaluate.metric import row_scores
from lorakit.evaluate.metrics.json_answers import canonical
from lorakit.evaluate.metrics.tool_calls import ToolCall, form_of

CALLS = [call(city="Rome à la mer", days=3, with_sea=True), call(city='the "old" town, north: yes')]


def decoded(tokenizer, message):
    """An answer as eval has it: what the template writes after the prompt, without special tokens."""
    template = ChatTemplate(tokenizer)
    question = [template.adapt(one) for one in chat("How is the weather?")]
    prompt = template.write(question, ask=True, tools=TOOLS)
    text = template.write([*question, template.adapt(message)], tools=TOOLS)
    same = next((at for at, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), len(prompt))
    return tokenizer.decode(tokenizer(text[same:], add_special_tokens=False)["input_ids"], skip_special_tokens=True)


def writes_calls(name):
    source = (real_templates.FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return "tool_calls" in source and name != "deepseek_r1_distill"  # which leaves them out of the last answer


WITH_CALLS = {
    name: (lambda name=name: real_templates.tokenizer_of(name)) for name in filter(writes_calls, real_templates.NAMES)
}
# Not glm 4, whose arguments are written in a way of our tests' own.
WITH_CALLS |= {
    f"family {name}": family.tokenizer for name, family in FAMILIES.items() if family.tools and name != "glm 4"
}


@pytest.mark.parametrize("name", WITH_CALLS)
def test_calls_are_read_as_the_template_writes_them(name):
    tokenizer = WITH_CALLS[name]()
    plain = decoded(tokenizer, answer("It is mild, I think."))
    for calls in ([CALLS[0]], [CALLS[1]], CALLS):
        for said in ("", "Let me see."):
            try:
                text = decoded(tokenizer, answer(said, tool_calls=calls))
            except RowError:
                assert len(calls) > 1  # Llama 3.1 refuses more than one
                continue
            if name in ("gptoss", "family harmony"):
                calls = calls[:1]
            read = form_of([plain, text])
            functions = [one["function"] for one in calls]
            assert read(text) == [ToolCall(one["name"], canonical(one["arguments"])) for one in functions], text
            assert read(plain) == []


def hermes(*calls, said=""):
    return said + "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in calls)


SHOW = '{"name": "show", "arguments": {"package": "vim", "lines": 3}}'
SAME = '{"arguments": {"lines": 3.0, "package": "vim"}, "name": "show"}'
OTHER = '{"name": "show", "arguments": {"package": "vi", "lines": 3}}'
LIST = '{"name": "list", "arguments": {"package": "vim", "lines": 3}}'


@pytest.mark.parametrize(
    ("answer", "reference", "scores"),
    [
        (hermes(SAME), hermes(SHOW), {"": 1, "called": 1, "name": 1, "arguments": 1}),
        (hermes(OTHER), hermes(SHOW), {"": 0, "called": 1, "name": 1, "arguments": 0}),
        (hermes(LIST), hermes(SHOW), {"": 0, "called": 1, "name": 0, "arguments": 1}),
        (hermes(LIST, SHOW), hermes(SHOW, LIST), {"": 1, "called": 1, "name": 1, "arguments": 1}),
        (hermes(SHOW, SHOW), hermes(SHOW), {"": 0, "called": 1, "name": 0, "arguments": 0}),
        (hermes(SHOW, said="I look.\n"), hermes(SHOW), {"": 1, "called": 1, "name": 1, "arguments": 1}),
        (SHOW, hermes(SHOW), {"": 0, "called": 0, "name": 0, "arguments": 0}),  # no server would take it for a call
        (hermes(SHOW[:-9]), hermes(SHOW), {"": 0, "called": 1, "name": 0, "arguments": 0}),
        ("Which package?", hermes(SHOW), {"": 0, "called": 0, "name": 0, "arguments": 0}),
        ("Which one?", "Which package?", {"": 1, "called": 1}),
        (hermes(SHOW), "Which package?", {"": 0, "called": 0}),
        (SHOW, "Which package?", {"": 0, "called": 0}),
        ("", "", {"": 1, "called": 1}),
    ],
)
def test_calls_are_compared_as_json_in_any_order(answer, reference, scores):
    found = row_scores(["tool-calls"], [answer], [reference])
    assert {name.removeprefix("tool-calls").lstrip("."): measure.value for name, measure in found.items()} == scores


def test_names_and_arguments_are_of_the_rows_whose_reference_calls():
    scores = row_scores(["tool-calls"], [hermes(SHOW), "No.", hermes(SHOW)], [hermes(SHOW), "Which?", "Which?"])
    values = {name: measure.value for name, measure in scores.items()}
    assert values["tool-calls"] == values["tool-calls.called"] == pytest.approx(2 / 3)
    assert values["tool-calls.name"] == values["tool-calls.arguments"] == 1


def test_true_is_not_one_in_arguments():
    one, true = (f'{{"name": "f", "parameters": {{"a": {value}}}}}' for value in ("1", "true"))
    assert row_scores(["tool-calls"], [true], [one])["tool-calls"].value == 0


def test_text_with_json_is_no_call_where_the_references_call_otherwise():
    text = 'Write this:\n```json\n{"name": "vim", "arguments": {}}\n```'
    scores = row_scores(["tool-calls"], [hermes(SHOW), text], [hermes(SHOW), text])
    assert scores["tool-calls.called"].value == 1


@pytest.mark.parametrize(
    "text", ["[" * 5000, "<tool_call>" * 500, "[f(" * 300, '{"a":' * 2000, "call:f{" * 500, "[f(a=" + "9" * 5000 + ")]"]
)
def test_what_is_no_call_is_read_without_a_fault(text):
    for reference in (text, hermes(SHOW), "[f(a=1)]", SHOW, "call:f{a:1}", 'f{"a": 1}', "<function=f></function>"):
        row_scores(["tool-calls"], [text], [reference])
