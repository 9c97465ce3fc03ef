"""The chat templates of published models: conversations are trained exactly, or refused with a remedy that works."""

import json
from functools import lru_cache

import pytest
from conftest import some_of
from data_families import TOOLS, answer, call, chat, result
from data_masks import trained_texts
from jinja2 import TemplateError
from real_templates import NAMES, stop_words, tokenizer_of

from lorakit.data.chat_template import ChatTemplate, render
from lorakit.data.rows import Conversation, RowError
from lorakit.data.tokenize import Encoder

THOUGHTS = [
    *chat("Hello"),
    answer("Paris.", thinking="hm, let me see"),
    *chat("And the sea?"),
    answer("Un été.", thinking="so it is"),
]
CALLS = [
    *chat("How is the weather in Rome?"),
    answer(tool_calls=[call(city="Rome")]),
    result("20"),
    answer("It is 20 degrees."),
]
CASES = {
    "plain": (chat("Hello", "Paris."), None),
    "system": (chat("Hello", "Paris.", system="Speak French."), None),
    "several turns": (chat("Hello", "Paris.", "And the sea?", "Un été 😀.", "Bye", "Bye now."), None),
    "thoughts": (THOUGHTS, None),
    "tools": (CALLS, TOOLS),
}
ALL = [(name, case) for name in NAMES for case in CASES]


def system_in_question(talk):
    return [talk[1] | {"content": f"{talk[0]['content']}\n\n{talk[1]['content']}"}, *talk[2:]], None, {}


def thoughts_as_text(talk):
    said = [f"({one['thinking']}) {one['content']}" if "thinking" in one else one["content"] for one in talk]
    return [{"role": one["role"], "content": text} for one, text in zip(talk, said, strict=True)], None, {}


def calls_as_text(talk):
    calls = answer(json.dumps(talk[1]["tool_calls"][0]["function"]))
    return [talk[0], calls, {"role": "user", "content": talk[2]["content"]}, talk[3]], None, {}


# What to do instead of what is refused, by the words of the refusal.
REMEDIES = {
    "put it into the first user message": system_in_question,
    "write model.template_variables: {enable_thinking: true}": lambda talk: (talk, None, {"enable_thinking": True}),
    "write it into the content": thoughts_as_text,
    "write them into the content": calls_as_text,
    "put them into the system prompt": lambda talk: (
        [{"role": "system", "content": json.dumps(TOOLS)}, *talk],
        None,
        {},
    ),
}


@lru_cache
def template_of(name, **variables):
    return ChatTemplate(tokenizer_of(name), stop_words=stop_words(name), variables=variables)


def examples_of(name, talk, tools=None, variables=None):
    tokenizer, template = tokenizer_of(name), template_of(name, **(variables or {}))
    found = []
    for one in Encoder(tokenizer).encode(render(Conversation(talk, tools), template)):
        if isinstance(one, RowError):
            raise one
        found.append(one)
    return found


def turns_of(name, found):
    """The prompt and the text of each trained turn."""
    tokenizer = tokenizer_of(name)
    return [
        (tokenizer.decode(one.input_ids[:start]), text)
        for one in found
        for (start, _), text in zip(one.turns, trained_texts(tokenizer, one), strict=True)
    ]


def sent(message, parts, as_text):
    """A message as a server hands it to the template."""
    message = dict(message)
    if message.get("thinking"):
        message["reasoning_content"] = message["thinking"]
    if parts:
        message["content"] = [{"type": "text", "text": message["content"]}]
    if "tool_calls" in message and as_text:
        functions = [one["function"] for one in message["tool_calls"]]
        texts = [one | {"arguments": json.dumps(one["arguments"])} for one in functions]
        message |= {"content": None, "tool_calls": [{"type": "function", "function": text} for text in texts]}
    return message


def applied(name, tokenizer, talk, tools=None, marks=False, **options):
    """The token ids that transformers makes of messages, in the first form in which the template writes them down, and
    the `marks` of what is generated."""
    for parts, as_text in ((False, False), (True, False), (False, True)):
        messages = [sent(one, parts, as_text) for one in talk]
        try:
            text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)
        except (TypeError, ValueError, TemplateError):
            continue  # the template wants another form
        if talk[0]["content"] in text:
            found = tokenizer.apply_chat_template(
                messages, tools=tools, return_dict=True, return_assistant_tokens_mask=marks, **options
            )
            return (found["input_ids"], found["assistant_masks"]) if marks else found["input_ids"]
    raise AssertionError(f"{name} writes no form of {talk}")


def test_the_templates_are_there():
    assert len(NAMES) >= 41


@pytest.mark.parametrize(("name", "case"), some_of(ALL, every=2))
def test_every_conversation_is_exact_or_refused_with_a_remedy_that_works(name, case):
    talk, tools = CASES[case]
    variables = {}
    try:
        found = examples_of(name, talk, tools)
    except RowError as error:
        plain = case in ("plain", "system", "several turns")
        assert not plain or (name, case) == ("gemma", "system"), error
        remedy = next(change for words, change in REMEDIES.items() if words in str(error))
        talk, tools, variables = remedy(talk)
        found = examples_of(name, talk, tools, variables)
    assert_exact(name, talk, tools, variables, found)


THINKING = [name for name in NAMES if "enable_thinking" in template_of(name).reads.constants]


@pytest.mark.parametrize(
    ("name", "case", "value"),
    some_of([(name, case, value) for name in THINKING for case in CASES for value in (True, False)], every=3),
)
def test_every_conversation_is_exact_with_thinking_on_and_off(name, case, value):
    talk, tools = CASES[case]
    variables = {"enable_thinking": value}
    try:
        found = examples_of(name, talk, tools, variables)
    except RowError as error:
        assert case == "thoughts", error
        if "does not write thinking" in str(error):
            return  # as without the variable, see above
        leave_out = "leave out model.template_variables.enable_thinking" in str(error)
        variables = {} if leave_out else {"enable_thinking": True}
        assert leave_out or "write model.template_variables: {enable_thinking: true}" in str(error)
        found = examples_of(name, talk, tools, variables)
    assert_exact(name, talk, tools, variables, found)


def assert_exact(name, talk, tools, variables, found):
    """Each answer is trained once, to its end, and nothing else; an example begins as the prompt of inference."""
    tokenizer = tokenizer_of(name)
    answers = [index for index, message in enumerate(talk) if message["role"] == "assistant"]
    stops = tuple(template_of(name).stops)
    turns = turns_of(name, found)
    assert len(turns) == len(answers)
    for index, (_, text) in zip(answers, turns, strict=True):
        assert text.endswith(stops) and sum(text.count(stop) for stop in stops) == 1
        message = talk[index]
        for said in (message["content"], message.get("thinking", ""), "Rome" if "tool_calls" in message else ""):
            assert text.count(said) == 1 or not said
    firsts = [0]
    for one in found:
        inside = {at for start, end in one.turns for at in range(start, end)}
        assert all((label != -100) == (at in inside) for at, label in enumerate(one.labels))
        before = talk[: answers[firsts[-1]]]
        firsts.append(firsts[-1] + len(one.turns))
        if name.startswith("deepseek") and any("tool_calls" in message for message in before):
            continue  # they want a content of None, which transformers leaves out
        ways = [variables, {"enable_thinking": False}]
        prompts = [applied(name, tokenizer, before, tools, add_generation_prompt=True, **way) for way in ways]
        assert one.input_ids[: one.turns[0][0]] in prompts


# Where what is trained is not what trl marks. DeepSeek R1's and V3's prompts open a thought that the texts of answers
# lack: trl trains behind a header that no server writes, ours is what the model must say behind the prompt. Diffusion
# Gemma's prompt behind a tool's answer ends with it: the header of the turn, and the token at which the model stops to
# wait for the tool, are the model's to write.
APART = {
    ("deepseek_r1_distill", "plain"),
    ("deepseek_r1_distill", "system"),
    ("deepseek_r1_distill", "several turns"),
    ("deepseek_r1_distill", "thoughts"),
    ("deepseekv3", "plain"),
    ("deepseekv3", "system"),
    ("deepseekv3", "several turns"),
    ("deepseekv3", "thoughts"),
    ("diffusion_gemma", "tools"),
}
# They have no twin: their marks would be the originals' own, and they have none.
UNMARKED = {name for name in NAMES if tokenizer_of(name, marked=True) is None}


@pytest.mark.parametrize(("name", "case"), some_of([pair for pair in ALL if pair[0] not in UNMARKED], every=3))
def test_what_is_trained_is_what_trl_marks_without_what_the_prompt_wrote(name, case):
    talk, tools = CASES[case]
    try:
        turns = turns_of(name, examples_of(name, talk, tools))
    except RowError:
        pytest.skip("refused, with a remedy")
    answers = [index for index, message in enumerate(talk) if message["role"] == "assistant"]
    agree = []
    for index, (prompt, text) in zip(answers, turns, strict=True):
        marked = last_marked(name, talk[: index + 1], tools)
        # Line breaks and end tokens behind the one at which the model stops are never reached.
        marked = marked.partition(text)
        rest = marked[2].replace("<|endoftext|>", "").strip()
        agree.append(marked[1] and not rest and prompt.endswith(marked[0]))
    assert all(agree) != ((name, case) in APART)


def last_marked(name, talk, tools):
    """What trl's twin marks last as generated."""
    tokenizer = tokenizer_of(name, marked=True)
    ids, mask = applied(name, tokenizer, talk, tools, marks=True)
    end = len(mask) - mask[::-1].index(1)
    start = end
    while start and mask[start - 1]:
        start -= 1
    return tokenizer.decode(ids[start:end])
