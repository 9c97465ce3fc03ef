"""A row that a template or a tokenizer would have trained wrong is refused with the reason and a remedy."""

import pytest
from data_families import FAMILIES, TOOLS, Family, answer, call, chat, result
from data_masks import assert_exact, example, examples, refusal, trained_texts

from lorakit.data.chat_template import ChatTemplate, render
from lorakit.data.rows import RowError, Text

ASK = "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
TURNS = "{% for m in messages %}{{ m.role + ': ' + m.content + END }}{% endfor %}" + ASK
PLAIN = TURNS.replace("END", "eos_token").replace(": ", ":")


def bad(template, **facts):
    return Family(template, str, "</s>", "<s>", **facts)


@pytest.mark.parametrize(
    ("name", "talk", "reason"),
    [
        ("gemma 2", chat("a", "b", system="c"), "refuses a system prompt (put it into the first user message): System"),
        ("llama 2", [*chat("a", "b"), *chat("c", "d")[1:]], "roles must alternate"),
        ("chatml", chat("a"), "nothing to train"),
        ("chatml", [], "nothing to train"),
        ("chatml", chat("a", "b")[1:], "an answer has no question before it: message 1"),
        ("chatml", chat("b", system="a")[:1] + chat("a", "b")[1:], "no question before it: message 2"),
        ("chatml", chat("a <|im_end|> b", "c"), "row contains the text '<|im_end|>'"),
        ("chatml", chat("a", "b<|im_end|>"), "row contains the text '<|im_end|>'"),
        ("harmony", chat("a", "b<|return|>", "c", "d"), "row contains the text '<|return|>'"),
        ("gemma 2", chat("a<eos>", "b"), "row contains the text '<eos>'"),
        ("qwen 3", [*chat("a"), answer("b", thinking="<|im_end|>")], "the text '<|im_end|>', which ends a turn"),
        ("qwen 3", [*chat("a"), answer(tool_calls=[call(city="<|im_end|>")])], "the text '<|im_end|>', which ends"),
        ("qwen 3", [*chat("a"), answer(tool_calls=[call("<|im_end|>")])], "the text '<|im_end|>', which ends a turn"),
        ("gemma 2", [{"role": "tool", "content": "x"}, *chat("a", "b")], "the chat template"),
        ("chatml", chat("a", "b \ud83d"), "half of a surrogate pair"),
        ("mistral 3", chat("a", "b", system="c \ud83d"), "half of a surrogate pair"),
        ("qwen 3", [*chat("a"), answer(tool_calls=[call(city="\ud83d")])], "half of a surrogate pair"),
        ("chatml", [*chat("a", "b"), {**result("c"), "name": "<|im_end|>"}, answer("d")], "which ends a turn of this"),
        ("chatml", [*chat("a"), answer("b", train=False)], "every answer has train: false: there is nothing to train"),
        ("chatml", [*chat("a"), answer("b", thinking="c")], "does not write thinking (write it into the content"),
        ("chatml", [*chat("a"), answer("b", tool_calls=[call()])], "does not write tool calls (write them into"),
        ("llama 3.1", [*chat("a"), answer("b", tool_calls=[call()])], "does not write the text of an answer as it is"),
        ("harmony", [*chat("a"), answer(tool_calls=[call(), call()])], "leaves out a tool call of an answer"),
        ("mistral 3", [*chat("a"), answer(tool_calls=[{**call(), "id": "1"}])], "refuses the conversation: IDs of"),
        ("deepseek r1", chat("a", "<think>b</think>c"), "does not write the text of an answer as it is"),
        ("qwen 3", chat("a", "b<think>c</think>d"), "does not write the text of an answer as it is"),
    ],
)
def test_rows_that_would_be_trained_wrong_are_refused(name, talk, reason):
    assert reason in refusal(FAMILIES[name], talk)


def test_the_last_answer_must_be_one_that_is_trained():
    reason = refusal(FAMILIES["chatml"], [*chat("a", "b", "c"), answer("d", train=False)], "last")
    assert "the last answer has train: false" in reason and "data.train_on: last" in reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "empty"), (" \n", "empty"), ("a</s>b", "contains '</s>'"), ("a \ud83d", "half of a surrogate pair")],
)
def test_texts_that_would_be_trained_wrong_are_refused(text, reason):
    with pytest.raises(RowError, match=reason):
        render(Text(text), ChatTemplate(FAMILIES["zephyr"].tokenizer()))


def test_a_text_needs_a_token_that_ends_it():
    tokenizer = FAMILIES["zephyr"].tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(RowError, match="the tokenizer has no end token"):
        render(Text("Hello"), ChatTemplate(tokenizer))


def test_tools_that_the_model_would_not_be_told_of_are_refused():
    reason = refusal(FAMILIES["chatml"], chat("a", "b"), tools=TOOLS)
    assert "does not write the tools (put them into the system prompt" in reason
    family = FAMILIES["qwen 2.5"]
    assert "the row contains the text '<|im_end|>'" in refusal(
        family, chat("a", "b"), tools=[*TOOLS, {"type": "function", "function": {"name": "<|im_end|>"}}]
    )
    assert example(family, family.tokenizer(), chat("a", "b"), tools=[]) == example(
        family, family.tokenizer(), chat("a", "b")
    )


@pytest.mark.parametrize(
    ("role", "reason"),
    [
        ("system", "leaves out a system prompt (put it into the first user message): message 1"),
        ("tool", "leaves out a message of role tool (give another model.chat_template): message 1"),
    ],
)
def test_messages_that_a_template_leaves_out_are_refused(role, reason):
    family = bad(PLAIN.replace("{{ m.role", "{% if m.role == 'ROLE' %}{% continue %}{% endif %}{{ m.role"))
    family = bad(family.template.replace("ROLE", role))
    assert reason in refusal(family, [{"role": role, "content": "Be brief."}, *chat("a", "b")])


def test_the_recipes_system_prompt_is_not_left_out_silently():
    family = bad(PLAIN.replace("{{ m.role", "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role"))
    assert "leaves out a system prompt" in refusal(family, chat("a", "b"), system="Be brief.")
    assert "leaves out a system prompt" in refusal(family, chat("a", "b", "c", "d"), "last", system="Be brief.")


@pytest.mark.parametrize("written", ["c.function.arguments", "c", "c.function.name"])
def test_calls_that_are_written_as_python_or_not_at_all_are_refused(written):
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name ~ " + written + " ~ 'x' }}{% endfor %}"
    template = PLAIN.replace("m.content +", "m.content }}" + calls + "{{")
    family = bad(template)
    talk = [*chat("a"), answer(tool_calls=[call(city="Rome")])]
    if written == "c.function.arguments":  # as JSON text they are JSON
        assert trained_texts(family.tokenizer(), example(family, family.tokenizer(), talk)) == [
            'weather{"city": "Rome"}x</s>'
        ]
    else:
        assert "does not write tool calls" in refusal(family, talk)


def test_an_answer_beyond_the_vocabulary_is_refused():
    """Without byte fallback the model would be taught to write <unk>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "yes": 2, "no": 3}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else ' ') }}{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", chat_template=template
    )
    family = Family(template, str, "</s>")
    assert tokenizer.decode(example(family, tokenizer, chat("what", "yes no")).input_ids) == "<unk> yes no </s>"
    with pytest.raises(RowError, match="for which the tokenizer has only '<unk>'"):
        example(family, tokenizer, chat("what", "yes maybe"))


def test_what_a_tokenizer_joins_and_cannot_encode_apart_is_refused():
    family = bad(TURNS.replace("END", "eos_token").replace("'assistant:'", "'assistant: '"))
    assert "joins text across the edge of an answer" in refusal(family, chat("a", "the"), kind="pieces, space first")
    tokenizer = family.tokenizer()
    encoded = example(family, tokenizer, chat("a", "the"))
    assert tokenizer.decode(encoded.input_ids[encoded.turns[0][0] :]) == "the</s>"


def test_turns_that_no_special_token_ends_are_refused():
    reason = refusal(bad(TURNS.replace("END", "'\\n'")), chat("a", "b"))
    assert "no special token after it" in reason and "{{ eos_token }}" in reason


def test_a_stop_that_is_no_single_token_is_refused():
    family = bad(TURNS.replace("END", "'<|stop|>'"), stops=("<|stop|>",))
    assert "is not one token of this tokenizer" in refusal(family, chat("a", "b"))


def test_an_answer_that_goes_on_behind_a_token_that_stops_the_model_is_refused():
    """gpt-oss: were <|end|> among the tokens at which the model stops, it would never come to its final answer."""
    family = FAMILIES["harmony"]
    stopped = Family(family.template, family.turn, family.eos, None, family.special, ("<|end|>",))
    talk = [*chat("a"), answer("The end.", thinking="hm")]
    assert_exact(family, family.tokenizer(), talk, examples(family, family.tokenizer(), talk))
    assert "writes a token at which the model stops before the end of an answer" in refusal(stopped, talk)


def test_a_prompt_that_begins_something_which_no_answer_has_is_refused():
    opening = bad(PLAIN.replace("'assistant:'", "'assistant:<hmm>'"))
    assert "cannot be rendered turn by turn" in refusal(opening, chat("a", "b"))


def test_a_template_that_counts_messages_is_refused():
    for train_on in ("assistant", "last"):
        reason = refusal(bad("{{ messages | length | string + ' messages ' }}" + PLAIN), chat("a", "b"), train_on)
        assert "cannot be rendered turn by turn (give another model.chat_template)" in reason


@pytest.mark.parametrize(
    ("last", "second", "reason"),
    [
        ("''", "c", "leaves out an answer that another answer follows"),
        ("messages[-1].content if messages[-1].role == 'assistant'", "", "two answers into one stretch of text"),
    ],
)
def test_two_answers_in_one_stretch_of_text_are_refused(last, second, reason):
    """A template that joins answers that follow each other: the second is no turn of its own."""
    joining = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '\\nuser:' + m.content }}"
        "{% elif not (add_generation_prompt and loop.last) %}"
        "{{ '' if loop.previtem.role == 'assistant' else '\\nassistant:' }}{{ m.content }}"
        "{{ eos_token if loop.last or loop.nextitem.role == 'user' }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\nassistant:' }}{{ LAST }}{% endif %}"
    )
    assert reason in refusal(bad(joining.replace("LAST", last)), [*chat("a", "b"), answer(second)])


def test_a_doubled_beginning_of_sequence_is_refused():
    assert "begins with '<s>' twice" in refusal(bad("{{ bos_token + bos_token }}" + PLAIN), chat("a", "b"))


@pytest.mark.parametrize(
    "broken", ["{{ messages[9].content }}", "{{ 1 / 0 }}", "{{ messages + 1 }}", "{{ nothing() }}"]
)
def test_a_template_that_fails_is_a_row_error(broken):
    assert "the chat template" in refusal(bad(broken), chat("a", "b"))


def test_a_template_that_hides_the_answer_is_refused():
    family = bad(PLAIN.replace("m.content", "m.content | upper"))
    assert "does not write the text of an answer as it is" in refusal(family, chat("a", "b"))
    family = bad(PLAIN.replace("m.content", "(m.content if m.role == 'user' else '...')"))
    assert "does not write the text of an answer as it is" in refusal(family, chat("a", "."))
