"""What is known of a conversation by its shape is what rendering it in full gives."""

import pytest
from data_families import FAMILIES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import _compile_jinja_template

from lorakit.data.chat_template import ChatTemplate, render
from lorakit.data.chat_template.render import prepare_row, render_in_full
from lorakit.data.chat_template.skeletons import logs_every_look, watch
from lorakit.data.rows import Conversation, RowError

PIECES = [
    "\n",
    " ",
    "a",
    "Hello",
    "é",
    "你好",
    "\t",
    "{",
    '"',
    "<",
    "</think>",
    "<think>",
    "&",
    "'",
    "\x0b",
    "<|im_end|>",
    "\ud83d",
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
TURNS = st.lists(st.tuples(TEXTS, TEXTS, st.booleans()), min_size=1, max_size=3)
TEMPLATES = {
    (name, train_on): ChatTemplate(family.tokenizer(), train_on, stop_words=family.stops)
    for name, family in FAMILIES.items()
    for train_on in ("assistant", "all")
}


def result(work):
    try:
        return work()
    except RowError as error:
        return str(error)


@pytest.mark.parametrize(("name", "train_on"), TEMPLATES)
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(turns=TURNS, system=st.none() | TEXTS)
def test_a_known_shape_gives_what_rendering_in_full_gives(name, train_on, turns, system):
    template = TEMPLATES[name, train_on]
    messages = [] if system is None else [{"role": "system", "content": system}]
    for asked, said, trained in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said, "train": trained}]
    in_full = result(lambda: render_in_full(prepare_row(Conversation(messages), template)))
    assert result(lambda: render(Conversation(messages), template)) == in_full


def test_most_templates_write_contents_as_they_are():
    known = set()
    for (name, train_on), template in TEMPLATES.items():
        if train_on == "assistant":
            result(lambda template=template: render(
                Conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]), template
            ))  # fmt: skip
            known |= {name for found in template.skeletons.values() if found}
    assert known >= {"chatml", "smollm 2", "llama 3", "mistral", "gemma 2", "gemma 3", "phi 3", "zephyr", "command r"}
    assert not known & {"qwen 3", "llama 2"}


@pytest.mark.parametrize(
    ("expression", "looks"),
    [
        ("m.content", False),
        ("'a' + m.content + 'b'", False),
        ("m.content ~ '!'", False),
        ("m.content | trim", False),
        ("m.content.strip()", False),
        ("(m.content + 'x').strip()", True),
        ("'x' in m.content", True),
        ("m.content == 'x'", True),
        ("m.content | length", True),
        ("m.content.split('x')[0]", True),
        ("m.content[:1]", True),
        ("'y' if m.content else 'n'", True),
        ("m.content is string", False),
        ("m.content | first", True),
        ("(m.content | trim) == ''", True),
    ],
)
def test_a_look_into_a_content_is_noted(expression, looks):
    source = "{% for m in messages %}{{ " + expression + " }}{% endfor %}"
    compiled = _compile_jinja_template(source)
    assert logs_every_look(compiled.environment, source)
    noted: list[str] = []
    compiled.render(messages=[{"role": "user", "content": watch(" hi ", noted)}])
    assert bool(noted) is looks


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ 'y' if m.content in 'yes no' else 'n' }}{% endfor %}",
        "{% for m in messages %}{{ 'a b'.split(m.content) }}{% endfor %}",
        "{% for m in messages %}{{ 'a b' | replace(m.content, 'x') }}{% endfor %}",
        "{% for m in messages %}{% set x = m.content ~ '' %}{{ x | length }}{% endfor %}",
        "{% for m in messages %}{% set x %}{{ m.content }}{% endset %}{{ x | length }}{% endfor %}",
        "{% for m in messages %}{{ ('%s' % m.content) | trim }}{% endfor %}",
        "{% macro f(x) %}{{ x }}{% endmacro %}{% for m in messages %}{{ f(m.content) | trim }}{% endfor %}",
        "{% for m in messages %}{{ (m.content | tojson) == 'x' }}{% endfor %}",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{{ messages | map(attribute='content') | join('') }}",
    ],
)
def test_templates_that_could_look_unnoted_are_rendered_in_full(source):
    assert not logs_every_look(_compile_jinja_template(source).environment, source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ '!' if m.content is in 'yes no' }}{% endfor %}",
        "{% for m in messages | selectattr('content', 'in', 'yes no') %}x{% endfor %}",
        "{% for m in messages %}{{ '!' if m.content is sameas 'a' }}{% endfor %}",
        "{% for m in messages %}{{ strftime_now(m.content) }}{% endfor %}",
        "{% macro dict(x) %}{{ x }}{% endmacro %}{% set t = dict(messages[0].content) %}{{ t == 'yes' }}",
        "{% macro f(x) %}{{ x }}{% endmacro %}{% set dict = f %}{{ dict(messages[0].content) == 'yes' }}",
        "{% macro f(x) %}{{ messages[0].content }}{% endmacro %}{% set n = namespace(f=f) %}{{ n.f('') == 'yes' }}",
    ],
)
def test_looks_that_a_review_found_are_rendered_in_full(source):
    assert not logs_every_look(_compile_jinja_template(source).environment, source)


def test_a_content_shows_a_template_nothing_of_its_own():
    compiled = _compile_jinja_template("{{ messages[0].content.looks is defined }}{{ messages[0].content._looks }}")
    assert "False" in compiled.render(messages=[{"role": "user", "content": watch("hi", [])}])
