"""Templates whose prompt opens a thought, or that drop thoughts: what the model must say behind it is trained."""

import json
from dataclasses import replace

import pytest
from conftest import CHATML, rows_of
from data_families import FAMILIES, Family, answer, call, chat, result
from data_masks import examples, refusal, trained_texts

from lorakit.data.answers import decode_answer
from lorakit.data.chat_template import ChatTemplate, render
from lorakit.data.rows import Conversation
from lorakit.data.tokenize import Encoder

HEADER = "{% for m in messages %}{{ '[' + m.role + ']' }}{% if m.role == 'assistant' %}ANSWER{{ eos_token }}{% else %}"
HEADER += "{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}PROMPT{% endif %}"


def family(written, prompt):
    """A template that writes answers as `written` behind a header, and asks for them with the header and `prompt`."""
    return Family(HEADER.replace("ANSWER", written).replace("PROMPT", prompt), str, "</s>")


LAST = "{% set c = m.content %}{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}{{ c | trim }}"
THINKING = "{% if m.reasoning_content %}{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}"
KINDS = {
    # the manner of the template: what an answer without a thought, and one with, is trained to say
    "drops thoughts, as DeepSeek R1": (
        family(LAST, "{{ '<think>\\n' }}"),
        "\n</think>\n\nParis.</s>",
        "hm\n</think>\n\nParis.</s>",
    ),
    "opens without a line break": (family(LAST, "{{ '<think>' }}"), "</think>Paris.</s>", "hm</think>Paris.</s>"),
    "writes content as it is": (
        family("{{ m.content }}", "{{ '<think>\\n' }}{# </think> #}"),
        "\n</think>\n\nParis.</s>",
        "hm\n</think>\n\nParis.</s>",
    ),
    "writes thoughts where there are some": (
        family(THINKING + "{{ m.content }}", "{{ '<think>\\n' }}"),
        "\n</think>\n\nParis.</s>",
        "hm\n</think>\n\nParis.</s>",
    ),
    "another word": (
        family("{{ m.content.split('</thought>')[-1] | trim }}", "{{ '<thought>\\n' }}"),
        "\n</thought>\n\nParis.</s>",
        "hm\n</thought>\n\nParis.</s>",
    ),
    "brackets": (
        family("{{ m.content.split('[/THINK]')[-1] }}", "{{ '[THINK]' }}"),
        "[/THINK]Paris.</s>",
        "hm[/THINK]Paris.</s>",
    ),
    "a beginning and an end": (
        family("{{ m.content.split('<|END_THINKING|>')[-1] }}", "{{ '<|START_THINKING|>' }}"),
        "<|END_THINKING|>Paris.</s>",
        "hm<|END_THINKING|>Paris.</s>",
    ),
}


def said(found, tokenizer):
    return [text for one in found for text in trained_texts(tokenizer, one)]


@pytest.mark.parametrize("kind", KINDS)
def test_behind_a_prompt_that_opens_a_thought_an_answer_without_one_closes_it(kind):
    made, plain, _ = KINDS[kind]
    tokenizer = made.tokenizer()
    talk = chat("Hello", "Paris.", "And?", "Paris.")
    found = examples(made, tokenizer, talk)
    assert said(found, tokenizer) == [plain, plain]
    for at, one in zip((1, 3), found, strict=True):
        prompt = tokenizer.apply_chat_template(talk[:at], add_generation_prompt=True)["input_ids"]
        assert one.input_ids[: one.turns[0][0]] == prompt, "the prompt that every server writes"


@pytest.mark.parametrize("kind", KINDS)
def test_behind_a_prompt_that_opens_a_thought_a_thought_is_gone_on_with(kind):
    made, _, thoughtful = KINDS[kind]
    tokenizer = made.tokenizer()
    apart = [chat("Hello")[0], answer("Paris.", thinking="hm")]
    assert said(examples(made, tokenizer, apart), tokenizer) == [thoughtful]
    opens = {"another word": "<thought>", "brackets": "[THINK]", "a beginning and an end": "<|START_THINKING|>"}
    mark = opens.get(kind, "<think>")
    closes = thoughtful.removeprefix("hm").partition("Paris")[0].strip()
    for inside in (f"{mark}\nhm\n{closes}\n\nParis.", f"{mark}hm{closes}Paris.", f"hm\n{closes}\n\nParis."):
        (text,) = said(examples(made, tokenizer, chat("Hello", inside)), tokenizer)
        assert "".join(text.split()) == "".join(thoughtful.split())


def test_what_the_prompt_wrote_of_an_answer_is_counted():
    """Not thoughts alone: an answer may begin with whatever the prompt ends with."""
    made = family("{{ m.content }}", "{{ 'Answer: ' }}")
    tokenizer = made.tokenizer()
    assert said(examples(made, tokenizer, chat("Hello", "Answer: Paris.")), tokenizer) == ["Paris.</s>"]
    assert "cannot be rendered turn by turn" in refusal(made, chat("Hello", "Paris."))


def test_behind_a_prompt_with_an_empty_thought_that_answers_lack_the_answer_alone_is_trained():
    skip = "{{ '<think>\\n' }}{{ '\\n</think>\\n\\n' if not think }}"
    made = family(
        "{% if m.reasoning_content %}{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}"
        "{{ m.content }}",
        skip,
    )
    tokenizer = made.tokenizer()
    talk = chat("Hello", "Paris.", "And?", "Lyon.")
    found = examples(made, tokenizer, talk)
    assert said(found, tokenizer) == ["Paris.</s>", "Lyon.</s>"]
    prompt = tokenizer.apply_chat_template(talk[:1], add_generation_prompt=True)["input_ids"]
    assert found[0].input_ids[: found[0].turns[0][0]] == prompt
    thoughtful = [*chat("Hello"), answer("Paris.", thinking="hm")]
    assert "write model.template_variables: {think: true}" in refusal(made, thoughtful)


SWITCHED = [
    (
        "{% if not (thinking | default(true)) %}{{ '</think>' }}{% else %}{{ '<think>' }}{% endif %}",
        {"thinking": False},
    ),
    ("{% if mode == 'fast' %}{{ '</think>' }}{% else %}{{ '<think>' }}{% endif %}", {"mode": "fast"}),
    ("{% if mode in ['off', 'none'] %}{{ '</think>' }}{% else %}{{ '<think>' }}{% endif %}", {"mode": "off"}),
    ("{% if skip_thinking %}{{ '</think>' }}{% else %}{{ '<think>' }}{% endif %}", {"skip_thinking": True}),
]


@pytest.mark.parametrize(("prompt", "variables"), SWITCHED)
def test_where_a_variable_closes_the_prompts_thought_answers_without_one_are_trained_with_it(prompt, variables):
    """As GLM 4.7 and Nemotron 3: the text of an answer without a thought has the closing mark alone."""
    with_thoughts = "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content }}{% endif %}{{ '</think>' }}"
    made = family(with_thoughts + "{{ m.content }}", prompt)
    tokenizer = made.tokenizer()
    talk = [*chat("Hello"), answer("Paris.", thinking="hm"), *chat("And?", "Lyon."), *chat("Bye", "Bye!")]
    found = examples(made, tokenizer, talk)
    assert said(found, tokenizer) == ["hm</think>Paris.</s>", "Lyon.</s>", "Bye!</s>"]
    template = ChatTemplate(tokenizer)
    assert template.without_thoughts == variables
    assert "".join(tokenizer.decode(one.input_ids) for one in found).count("[assistant]</think>Lyon.") == 1
    own = ChatTemplate(tokenizer, variables=variables)
    (with_them,) = Encoder(tokenizer).encode(render(Conversation(talk[-2:]), own))
    (without,) = Encoder(tokenizer).encode(render(Conversation(talk[-2:]), template))
    assert with_them == without and with_them.turns == without.turns


def test_thoughts_that_a_template_writes_only_before_calls_stand_before_answers_likewise():
    """As Gemma 4's first templates, whose last one writes them before answers too."""
    thoughts = "{% if m.reasoning_content and m.tool_calls %}{{ '<|channel>' + m.reasoning_content + '<channel|>' }}"
    thoughts += "{% endif %}"
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name + (c.function.arguments | tojson) }}{% endfor %}"
    made = family(thoughts + calls + "{{ m.content }}", "")
    tokenizer = made.tokenizer()
    talk = [*chat("Hello"), answer("Paris.", thinking="hm"), *chat("And?", "Lyon.")]
    assert said(examples(made, tokenizer, talk), tokenizer) == ["<|channel>hm<channel|>Paris.</s>", "Lyon.</s>"]


def test_how_answers_without_thoughts_are_trained_is_told_once_a_row():
    for kind in ("drops thoughts, as DeepSeek R1", "writes thoughts where there are some"):
        template = ChatTemplate(KINDS[kind][0].tokenizer())
        notes = [one.note for one in render(Conversation(chat("Hello", "Paris.")), template)]
        assert notes == [
            "answers without thinking: the prompt opens a thought with <think>, and the model is trained to close it "
            "at once with </think>"
        ]
        thoughtful = Conversation([*chat("Hello"), answer("Paris.", thinking="hm")])
        assert [one.note for one in render(thoughtful, template)] == [""]
    closed = ChatTemplate(family("{{ '</think>' + m.content }}", SWITCHED[0][0]).tokenizer())
    (one,) = render(Conversation(chat("Hello", "Paris.")), closed)
    assert "{thinking: false}" in one.note and one.note == closed.note_without_thoughts
    (again,) = render(Conversation(chat("Bye", "Bye.")), closed)
    assert again.note == one.note, "a known shape of conversation has the note too"


@pytest.mark.parametrize(
    "content",
    [
        "{% for part in m.content %}{{ part.text if part.type == 'text' }}{% endfor %}",
        "{{ m['content'][0]['text'] }}",
        "{% if m.content is string %}{{ raise_exception('parts!') }}{% endif %}{{ m.content[0].text }}",
        "{{ m.content if m.role == 'assistant' else m.content[0].text }}",
        "{{ m.content[0].text if m.role == 'user' else m.content }}",
        "{% if m.role == 'user' %}{% for part in m.content %}{{ part.text }}{% endfor %}"
        "{% else %}{{ m.content }}{% endif %}",
    ],
)
def test_content_is_given_in_parts_where_the_template_wants_parts(content):
    template = (
        "{% for m in messages %}{{ m.role + ': ' }}" + content + "{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    made = Family(template, str, "</s>")
    tokenizer = made.tokenizer()
    talk = chat("Hello", "Paris.", "And?", "", system="Be brief.")
    (one,) = examples(made, tokenizer, talk)
    assert said([one], tokenizer) == ["Paris.</s>", "</s>"]
    assert "system: Be brief.</s>user: Hello</s>" in tokenizer.decode(one.input_ids)


def test_rows_in_parts_keep_the_fast_way(monkeypatch):
    template = ChatTemplate(
        replace(
            FAMILIES["zephyr"],
            template=(
                "{% for m in messages %}{{ m.role + ': ' }}{% for part in m.content %}{{ part['text'] }}{% endfor %}"
                "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
            ),
        ).tokenizer()
    )
    render(Conversation(chat("Hello", "Paris.")), template)
    written, write = [], ChatTemplate.write
    monkeypatch.setattr(ChatTemplate, "write", lambda *given, **more: written.append(1) or write(*given, **more))
    (one,) = render(Conversation(chat("And?", "Lyon.")), template)
    assert not written and one.text.endswith("assistant: Lyon.</s>")


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_compare_answers_without_their_thoughts(kind):
    made, plain, thoughtful = KINDS[kind]
    tokenizer = made.tokenizer()
    for text in (plain, thoughtful, "Paris.</s>"):
        tokens = tokenizer(text.removesuffix("</s>"), add_special_tokens=False)["input_ids"]
        assert decode_answer(tokens, tokenizer) == "Paris."


def test_a_thought_that_is_closed_by_a_special_token_is_no_part_of_the_answer():
    made = replace(KINDS["a beginning and an end"][0], special=("<|START_THINKING|>", "<|END_THINKING|>"))
    tokenizer = made.tokenizer()
    ids = tokenizer("hm<|END_THINKING|> Paris.</s>", add_special_tokens=False)["input_ids"]
    assert decode_answer(ids, tokenizer) == "Paris."


def test_metrics_compare_answers_without_the_name_of_their_channel():
    made = FAMILIES["harmony"]
    tokenizer = made.tokenizer()
    for talk in (chat("Hello", "Paris."), [*chat("Hello"), answer("Paris.", thinking="hm")]):
        (text,) = said(examples(made, tokenizer, talk), tokenizer)
        ids = tokenizer(text.removesuffix("<|return|>"), add_special_tokens=False)["input_ids"]
        assert decode_answer(ids, tokenizer) == "Paris."


def test_behind_what_a_tool_gave_a_thought_begins_as_that_prompt_has_it():
    """As DeepSeek R1, whose prompt opens a thought behind a question and none behind what a tool gave."""
    tool = "{% if messages[-1].role != 'tool' %}{{ '<think>\\n' }}{% endif %}"
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name + (c.function.arguments | tojson) }}{% endfor %}"
    made = family(calls + LAST, tool)
    tokenizer = made.tokenizer()
    talk = [*chat("Hello"), answer(tool_calls=[call(city="Rome")]), result("20"), answer("Paris.")]
    plain = examples(made, tokenizer, talk)
    assert said(plain, tokenizer) == ['\n</think>\n\nweather{"city": "Rome"}</s>', "Paris.</s>"]
    thoughtful = [message | {"thinking": "hm"} if message["role"] == "assistant" else message for message in talk]
    assert said(examples(made, tokenizer, thoughtful), tokenizer) == [
        'hm\n</think>\n\nweather{"city": "Rome"}</s>',
        "<think>\nhm\n</think>\n\nParis.</s>",
    ]


def test_a_thought_in_the_text_stands_behind_no_empty_one():
    """Qwen 3.8: it writes an empty thought where `reasoning_content` has none, and the content as it is behind that."""
    written = "{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' + m.content }}"
    for made in (family(written, "{{ '<think>\\n' }}"), family(written, "")):
        tokenizer, template = made.tokenizer(), ChatTemplate(made.tokenizer())
        talk = chat("Hello", "<think>\nhm\n</think>\n\nParis.", "And?", "<think>\n\n</think>\n\nLyon.")
        texts = [one.text for one in render(Conversation(talk), template)]
        assert [text.count("<think>") for text in texts] == [2] and "hm\n</think>\n\nParis." in texts[0]
        (one,) = examples(made, tokenizer, talk)
        assert [text.removeprefix("<think>\n") for text in said([one], tokenizer)] == [
            "hm\n</think>\n\nParis.</s>",
            "\n</think>\n\nLyon.</s>",
        ]


def test_a_base_whose_prompt_opens_a_thought_is_trained_and_scored_on_plain_rows(recipe_file, lorakit, tmp_path):
    source = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}").replace(
        "message['content']", "message['content'].split('</think>')[-1]"
    )
    (tmp_path / "own.jinja").write_text(source)
    steps = {"epochs": ..., "steps": 2, "eval_every": 2, "save_every": 2}
    recipe = recipe_file(model={"chat_template": "own.jinja"}, train=steps, evaluate={"metrics": ["json-valid"]})
    code, out, told = lorakit("data", recipe)
    assert code == 0 and "22 rows: answers without thinking: the prompt opens a thought with <think>" in out, told
    assert "<think>\n⟦\n</think>\n\n" in out, "what the prompt wrote is not trained, what closes it is"
    code, _, told = lorakit("train", recipe, "--output", "run")
    assert code == 0 and "close it at once with </think>" in told
    code, _, told = lorakit("eval", "run")
    assert code == 0, told
    rows = [json.loads(line) for line in next((tmp_path / "run" / "eval").glob("*.jsonl")).read_text().splitlines()]
    references = [row["messages"][-1]["content"] for row in rows_of(40)[30:]]
    assert [row["reference"] for row in rows] == references
