"""The format `template`: any columns in turns that the recipe writes, as Python's own str.format would fill them."""

import json
import math
import re
from collections import defaultdict
from datetime import date, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipe_files import errors, loaded, write

from lorakit.cli.options import _parse_format
from lorakit.data.formats import RowError, jinja_text, parse_record
from lorakit.data.formats.jinja_text import jinja_columns, render_jinja
from lorakit.data.formats.places import PlaceError, fill_places, parse_places
from lorakit.data.formats.template import Template
from lorakit.data.formats.text_columns import Classification
from lorakit.errors import UserError
from lorakit.recipe.load import load, to_yaml
from lorakit.registry import FORMATS

HEAD = "model: {base: org/model}\ndata:\n  train: train.jsonl\n  format: {template: "
QUESTION = {"user": "{q}", "assistant": "{a}"}


def turns(record, **settings):
    """The roles and texts of a row, `-` before the role of an answer that is not trained."""
    messages = parse_record("template", Template.model_validate({**QUESTION, **settings}), record).messages
    return [("-" if one.get("train") is False else "") + f"{one['role']}: {one['content']}" for one in messages]


def complaint(record, **settings):
    with pytest.raises(RowError) as caught:
        turns(record, **settings)
    return str(caught.value)


# places

NAMES = st.text(st.characters(exclude_characters=':![{}"', exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1)
PLAIN_NAMES = NAMES.filter(lambda name: name.strip() and name.isprintable() and "." not in name)
LITERALS = st.text(st.characters(exclude_categories=("Cs",)))


@given(st.lists(st.tuples(LITERALS, PLAIN_NAMES)), LITERALS, st.data())
def test_places_are_filled_as_by_pythons_own_format(pieces, end, data):
    double = {"{": "{{", "}": "}}"}
    doubled = ["".join(double.get(sign, sign) for sign in literal) for literal, _ in pieces]
    text = "".join(f"{literal}{{{name}}}" for literal, (_, name) in zip(doubled, pieces, strict=True)) + "".join(
        double.get(sign, sign) for sign in end
    )
    # Python takes a name of digits for a position.
    record = {name: data.draw(LITERALS) for _, name in pieces if not name.isdigit()}
    pieces = [name for _, name in pieces]
    if all(name in record for name in pieces):
        assert fill_places(text, record) == text.format_map(record)


@given(st.text("{}ab"))
def test_what_python_refuses_is_refused_and_nothing_else(text):
    try:
        expected = text.format_map(defaultdict(lambda: "X"))
    except (ValueError, IndexError):
        with pytest.raises(PlaceError):
            parse_places(text)
    else:
        record = defaultdict(lambda: "X", {name: "X" for _, name in parse_places(text) if name is not None})
        assert fill_places(text, record) == expected


@given(LITERALS, LITERALS)
def test_a_value_is_never_read_as_a_template(one, other):
    row = {"q": one, "a": other, "other": "SECRET"}
    assert fill_places("<{q}|{a}>", row) == f"<{one}|{other}>"
    assert render_jinja("<{{ q }}|{{ a }}>", row, {}) == f"<{one}|{other}>"


@pytest.mark.parametrize(
    "value", ["{other}", "{{", "}", "%s %(other)s", "{{ other }}", "{% raw %}", "$other", "{0.__class__}"]
)
def test_a_row_that_holds_template_syntax_changes_nothing(value):
    row = {"q": value, "a": value, "other": "SECRET"}
    assert turns(row) == [f"user: {value}", f"assistant: {value}"]
    assert turns(row, user={"jinja_text": "{{ q }}"}) == [f"user: {value}", f"assistant: {value}"]
    classified = parse_record(
        "classification", Classification(prompt="{text} {q}"), {"text": value, "label": "l", **row}
    )
    assert classified.messages[0]["content"] == f"{value} {value}"


@pytest.mark.parametrize(
    "name", ["Customer tier", "meta.title", "kb-context", "größe", "答え", "Is it ok?", "Driver's name", "0"]
)
def test_names_of_columns_are_taken_letter_by_letter(name):
    assert turns({name: "x", "q": "y", "a": "z"}, user=f"<{{{name}}}>")[0] == "user: <x>"


def test_a_dot_leads_into_an_object_where_no_column_has_the_whole_name():
    nested = {"meta": {"title": "inner", "deep": {"er": 1}}, "q": "q", "a": "a"}
    assert turns(nested, user="{meta.title} {meta.deep.er}")[0] == "user: inner 1"
    assert turns({**nested, "meta.title": "own"}, user="{meta.title}")[0] == "user: own"
    assert turns({"a.b": {"c": 1}, "a": "x"}, user="{a.b.c}")[0] == "user: 1"
    assert "did you mean 'meta.title'?" in complaint(nested, user="{meta.titel}")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("", ""), ("a\nb", "a\nb"), (3, "3"), (True, "true"), (False, "false"), (2.5, "2.5"), (1e30, "1e+30"),
        ([1, "ü", None], '[1, "ü", null]'), ({"a": {"b": []}}, '{"a": {"b": []}}'), ([], "[]"), ({}, "{}"),
        (date(2026, 1, 31), "2026-01-31"), (datetime(2026, 1, 31, 5), "2026-01-31T05:00:00"), (Decimal("1.50"), "1.50"),
        ([date(2026, 1, 31)], '["2026-01-31"]'),
    ],
)  # fmt: skip
def test_a_value_is_written_as_text_or_as_json(value, text):
    row = {"q": value, "a": "b"}
    assert turns(row)[0] == f"user: {text}"
    assert turns(row, user={"jinja_text": "{{ q }}"})[0] == f"user: {text}"


@pytest.mark.parametrize("value", [b"x", math.inf, [math.nan], {"a": {1, 2}}])
def test_a_value_that_is_neither_text_nor_json_is_an_error_of_the_row(value):
    assert "the column 'q' can be written neither as text nor as JSON" in complaint({"q": value, "a": "b"})


def test_what_is_missing_is_an_error_that_names_row_and_column_unless_the_recipe_says_what_stands_there():
    assert complaint({"qq": "x", "a": "b"}) == (
        "the row has no column 'q' (write missing: {q: ...} for what stands there then): there are 'qq', 'a'"
    )
    assert complaint({"question_text": "x", "a": "b"}, user="{question_tekst}").endswith(
        "did you mean 'question_text'?"
    )
    for null in (None, math.nan):
        assert complaint({"q": null, "a": "b"}).startswith("the column 'q' is null (write missing")
        assert turns({"q": null, "a": "b"}, missing={"q": "-"})[0] == "user: -"
    assert turns({"a": "b"}, missing={"q": ""})[0] == "user: "
    assert turns({"q": "", "a": "b"}, missing={"q": "-"})[0] == "user: "


# turns


def test_several_turns_and_fixed_examples_of_which_the_answers_are_not_trained():
    several = {
        "user": None,
        "assistant": None,
        "system": "Of {n}.",
        "examples": [{"user": "{{x}}", "assistant": "y"}],
        "turns": [{"user": "{q}", "assistant": "fixed", "train": False}, {"user": "{n}"}, {"assistant": "{a}"}],
    }
    expected = [
        "system: Of 3.",
        "user: {x}",
        "-assistant: y",
        "user: q",
        "-assistant: fixed",
        "user: 3",
        "assistant: a",
    ]
    assert turns({"q": "q", "a": "a", "n": 3}, **several) == expected


def test_the_columns_system_and_tools_are_read_as_in_other_formats_unless_a_text_names_them():
    row = {"q": "q", "a": "a", "system": "s", "tools": [{"name": "parcel"}]}
    settings = Template.model_validate(QUESTION)
    conversation = parse_record("template", settings, row)
    assert conversation.messages[0] == {"role": "system", "content": "s"}
    assert conversation.tools == [{"type": "function", "function": {"name": "parcel"}}]
    assert turns(row, system="own")[0] == "system: own"
    assert turns(row, user="{system} {tools}")[0] == 'user: s [{"name": "parcel"}]'
    assert turns({**row, "system": ""}, system="{system}")[0] == "user: q"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ('{user: "Say {\\"a\\": 1}", assistant: "{a}"}',
         ".user: character 5: {\"a\": 1} is no column's name, but looks like JSON or code. "
         "Write {column}, or {{ and }} for braces that are meant as they are."),
        ('{user: "a\\nb {\\"x\\": {\\"q\\": 1}}", assistant: "{a}"}',
         ".user: line 2, character 3: '{\"x\": {\"q\": 1}}' begins with a brace that has no partner. "
         "Write {column}, or {{ and }} for braces that are meant as they are."),
        ("{user: '{q', assistant: '{a}'}",
         ".user: character 1: '{q' begins with a brace that has no partner. "
         "Write {column}, or {{ and }} for braces that are meant as they are."),
        ("{user: '{q:.2f}', assistant: '{a}'}",
         ".user: character 1: {q:.2f} has a format after the colon, and a place holds a name alone. Write {q}, or "
         "{{ and }} for braces; a column with : in its name gets another by data.columns."),
        ("{user: 'x {}', assistant: '{a}'}",
         ".user: character 3: {} names no column. "
         "Write {column}, or {{ and }} for braces that are meant as they are."),
        ("{user: '{q}'}",
         ": assistant must be written, or turns. "
         "Write for example {template: {user: '{question}', assistant: '{answer}'}}."),
        ("{user: '{q}', assistant: a}",
         ".assistant: it names no column, so that every row would train the same answer. "
         "Write for example '{answer}'."),
        ("{user: '{quest}', assistant: '{a}', missing: {qest: ''}}",
         ".missing.qest: no text has a place for this column. Did you mean 'quest'?"),
        ("{user: '{q}', assistant: '{a}', turns: [{assistant: '{a}'}]}",
         ".user: turns are written besides. Write user and assistant, or turns."),
        ("{turns: [{user: '{q}', assistant: '{a}', train: false}]}",
         ".turns: no answer of these is trained. Write assistant, without train: false, in one of them."),
        ("{turns: [{user: '{q}', assistant: 'x', train: false}, {assistant: '{a}'}]}",
         ".turns[1]: an answer that is not trained stands before it. Write what is asked between them."),
        ("{user: {jinja: prompt.jinja}, assistant: '{a}'}",
         ".user.jinja: 'prompt.jinja' does not exist. Put the file into FOLDER, or correct the path."),
        ("{user: {jinja_text: '{% if %}'}, assistant: '{a}'}",
         ".user: not valid Jinja, line 1: Expected an expression, got 'end of statement block'. Correct the template."),
        ("{user: {jinja_text: \"{% include 'x' %}\"}, assistant: '{a}'}",
         ".user: line 1 asks for another file, and a Jinja text stands alone. Correct the template."),
        ("{user: {}, assistant: '{a}'}",
         ".user: it needs one of jinja and jinja_text. Write jinja: FILE, or jinja_text and the text itself."),
    ],
)  # fmt: skip
def test_a_mistake_in_the_settings_is_told_by_check(tmp_path, settings, expected):
    (error,) = errors(tmp_path, f"{HEAD}{settings}}}\n")
    assert error.partition("data.format.template")[2].replace(str(tmp_path), "FOLDER") == expected


def test_the_word_alone_is_an_error(tmp_path):
    (error,) = errors(tmp_path, f"{HEAD.partition('{template')[0]} template\n")
    assert "data.format: template needs settings. Write for example {template: {user:" in error


# Jinja


def test_a_jinja_text_has_conditions_and_loops():
    loop = "{% for one in list %}\n{{ loop.index }}. {{ one }}\n{% endfor %}\n"
    text = loop + "{% if kb is defined %}KB{% endif %}{{ row['A b'] }}"
    assert render_jinja(text, {"list": ["x", "{{ y }}"], "A b": 1}, {}) == "1. x\n2. {{ y }}\n1"
    assert render_jinja("{{ kb }}|{{ row.kb }}", {"kb": None}, {"kb": "-"}) == "-|-"


def test_the_columns_that_a_jinja_text_reads_are_known():
    read = jinja_columns(
        "{% set x = 1 %}{{ a }}{{ x }}{{ b | default('') }}{% if c is defined %}{{ c }}{% endif %}{{ row['d e'] }}"
    )
    assert (read.needed, read.optional, read.every) == ({"a", "d e"}, {"b", "c"}, False)
    assert jinja_columns("{% for k in row %}{{ k }}{% endfor %}").every


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ questoin }}", "the Jinja text reads what the row does not have: 'questoin' is undefined, "
         "did you mean 'question'?"),
        ("{{ question.x }}", "the Jinja text reads what the row does not have: 'str object' has no attribute 'x'"),
        ("{{ null }}", "the Jinja text writes a null (test for it, or write missing: {NAME: ...} for what stands there "
         "then): null here: 'null'"),
        ("{{ 1 / 0 }}", "the Jinja text fails: ZeroDivisionError: division by zero"),
        ("{{ question.__class__.__mro__ }}", "the Jinja text fails: SecurityError: "),
        ("{{ list.append(1) }}", "the Jinja text fails: SecurityError: "),
        ("{{ 9 ** 99999999 }}", "the Jinja text fails: OverflowError: a number of thousands of digits"),
    ],
)  # fmt: skip
def test_what_a_jinja_text_cannot_do_is_an_error_of_the_row(text, expected):
    with pytest.raises(RowError) as caught:
        render_jinja(text, {"question": "x", "null": None, "list": [1]}, {})
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    "text",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(t='x') %}{% for a in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
        "{{ 'x' * 9000000 }}",
    ],
)
def test_a_jinja_text_that_never_ends_is_stopped(text, monkeypatch):
    monkeypatch.setattr(jinja_text, "_SECONDS", 0.2)
    monkeypatch.setattr(jinja_text, "_MEMORY", 1 << 28)
    with pytest.raises(UserError, match=r"its Jinja text (takes more than|writes 9,000,000 characters)"):
        render_jinja(text, {}, {})


def test_the_resolved_recipe_holds_the_text_of_the_file(tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "p.jinja").write_text("Q: {{ q }}\n", encoding="utf-8")
    first = loaded(tmp_path, f"{HEAD}{{user: {{jinja: prompts/p.jinja}}, assistant: '{{a}}'}}}}\n")
    assert tmp_path / "prompts" / "p.jinja" in first.files
    text = to_yaml(first.recipe, tmp_path)
    (tmp_path / "prompts" / "p.jinja").unlink()
    elsewhere = write(tmp_path / "elsewhere", text)
    again = load(elsewhere).recipe
    assert again.data.format == first.recipe.data.format
    assert again.data.format.template.user.jinja_text == "Q: {{ q }}\n"


def test_a_text_and_a_file_replace_each_other_in_what_extends(tmp_path):
    (tmp_path / "p.jinja").write_text("Q: {{ q }}", encoding="utf-8")
    write(tmp_path, f"{HEAD}{{user: {{jinja_text: '{{{{ q }}}}'}}, assistant: '{{a}}'}}}}\n", "below.yaml")
    above = "extends: below.yaml\ndata: {format: {template: {user: {jinja: p.jinja}}}}\n"
    assert loaded(tmp_path, above).recipe.data.format.template.user.jinja_text == "Q: {{ q }}"
    text = "data.format.template.user={jinja_text: x}"
    assert loaded(tmp_path, above, text).recipe.data.format.template.user.jinja_text == "x"


def test_a_file_that_a_recipe_cannot_hold_is_an_error(tmp_path):
    for name, content in {"big": b"x" * 100_001, "empty": b"", "latin": "é".encode("latin-1")}.items():
        (tmp_path / f"{name}.jinja").write_bytes(content)
    text = (
        f"{HEAD}{{user: {{jinja: big.jinja}}, system: {{jinja: empty.jinja}}, assistant: {{jinja: latin.jinja}}}}}}\n"
    )
    found = errors(tmp_path, text)
    assert [one.partition("template.")[2].partition(":")[0] for one in found] == [
        "user.jinja",
        "system.jinja",
        "assistant.jinja",
    ]
    assert "more than 100,000 bytes" in found[0] and "is empty" in found[1] and "cannot be read" in found[2]


def test_the_option_format_takes_a_template_and_tells_its_mistakes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jinja").write_text("Q: {{ q }}", encoding="utf-8")
    given = _parse_format("{template: {user: {jinja: p.jinja}, assistant: '{a}'}}")
    assert given.template.user.jinja_text == "Q: {{ q }}"
    for text, expected in {
        "template": "--format: data.format: template needs settings",
        "{template: {user: '{q', assistant: '{a}'}}": "--format: data.format.template.user: character 1: '{q' begins",
        "{template: {user: {jinja: no.jinja}, assistant: '{a}'}}": "'no.jinja' does not exist",
    }.items():
        with pytest.raises(UserError, match=re.escape(expected)):
            _parse_format(text)


# a prompt of `classification`


def test_the_prompt_of_classification_takes_columns_too(tmp_path):
    settings = Classification(labels=["a", "b"], prompt="{subject} ({n}): {text} of {labels}")
    row = {"text": "t", "label": 0, "subject": "s", "n": 2}
    assert parse_record("classification", settings, row).messages[0]["content"] == "s (2): t of a, b"
    with pytest.raises(RowError, match=r"the row has no column 'subject': did you mean 'subjekt'\?"):
        parse_record("classification", settings, {"text": "t", "label": 0, "subjekt": "s", "n": 1})


def test_no_row_is_taken_for_a_template_by_itself():
    assert FORMATS["template"].columns == ()


def test_a_template_survives_as_json_of_the_recipe():
    written = Template.model_validate({**QUESTION, "missing": {"q": "-"}})
    assert Template.model_validate(json.loads(written.model_dump_json())) == written
