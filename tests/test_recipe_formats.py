"""`format` in a recipe: a word, or a mapping of one format to its settings."""

import pickle
import subprocess
import sys

import pytest
from recipe_files import errors, loaded, write

from lorakit.data.formats.messages import Sharegpt
from lorakit.data.formats.text_columns import Classification
from lorakit.recipe import docs
from lorakit.recipe.fields import entry_name, entry_settings
from lorakit.recipe.load import load, to_yaml
from lorakit.recipe.schema import Recipe
from lorakit.recipe.schema_introspection import keys
from lorakit.registry import FORMATS

HEAD = "model: {base: org/model}\ndata:\n  train: train.jsonl\n"
SPAM = "{classification: {labels: [ham, spam], prompt: '{text}?'}}"


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def recipe_with(folder, value):
    return loaded(folder, f"{HEAD}  format: {value}\n").recipe


def errors_of(folder, value):
    return errors(folder, f"{HEAD}  format: {value}\n")


@pytest.mark.parametrize(
    ("value", "name", "settings"),
    [
        ("auto", "auto", None),
        ("messages", "messages", None),
        ("classification", "classification", Classification()),
        ("{classification: {}}", "classification", Classification()),
        (SPAM, "classification", Classification(labels=["ham", "spam"], prompt="{text}?")),
        ("{sharegpt: {roles: {customer: user, Agent: assistant}}}", "sharegpt",
         Sharegpt(roles={"customer": "user", "Agent": "assistant"})),
        ("{sharegpt: null, classification: {labels: [a]}}", "classification", Classification(labels=["a"])),
        ("{classification: {labels: [a], prompt: '{{\"text\": \"{text}\"}} of {labels}'}}", "classification",
         Classification(labels=["a"], prompt='{{"text": "{text}"}} of {labels}')),
    ],
)  # fmt: skip
def test_a_format_is_a_word_or_has_settings(tmp_path, value, name, settings):
    written = recipe_with(tmp_path, value).data.format
    assert (entry_name(written), entry_settings(FORMATS, written)) == (name, settings)


@pytest.mark.parametrize("value", ["auto", "tokens", "classification", "{classification: {}}", SPAM])
def test_a_format_survives_being_written_and_read(tmp_path, value):
    recipe = loaded(tmp_path, f"{HEAD}  format: {value}\n  eval: {{path: eval.jsonl, format: {value}}}\n").recipe
    text = to_yaml(recipe, tmp_path)
    assert "sharegpt" not in text
    assert load(write(tmp_path, text, "again.yaml")).recipe.data == recipe.data
    assert pickle.loads(pickle.dumps(recipe)) == recipe  # noqa: S301


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("{classification: {lables: [a]}}",
         "4:29: data.format.classification.lables: there is no such key. "
         "Did you mean data.format.classification.labels?"),
        ("{clasification: {}}",
         "4:12: data.format.clasification: there is no such key. Did you mean data.format.classification?"),
        ("{labels: [a]}",
         "4:12: data.format.labels: there is no such key. Did you mean data.format.classification.labels?"),
        ("{classification: {labels: []}}",
         "4:37: data.format.classification.labels: expected a list of at least one name, or null, got an empty list. "
         "Write for example [ham, spam]."),
        ("{classification: {labels: [a, 1]}}",
         "4:41: data.format.classification.labels[1]: expected a name, got 1. Put quotes around it: '1'."),
        ("{classification: {labels: [a, b, a]}}",
         "4:44: data.format.classification.labels[2]: 'a' is there twice. Remove one."),
        ("{classification: {prompt: '{text} {label}'}}",
         "4:37: data.format.classification.prompt: {label} is the answer, which the question would tell. "
         "Write {labels} for the list."),
        ("{classification: {prompt: '{text!r}{text}'}}",
         "4:37: data.format.classification.prompt: character 1: {text!r} has a conversion after !, and a place holds a "
         "name alone. Write {text}, or {{ and }} for braces; "
         "a column with ! in its name gets another by data.columns."),
        ("{classification: {prompt: 'what?'}}",
         "4:37: data.format.classification.prompt: {text} is not in it, so that every row would ask the same. "
         "Write {text} where the text belongs."),
        ("{classification: {prompt: '{text} {labels}'}}",
         "4:37: data.format.classification.prompt: there is no list of labels for {labels}. "
         "Write labels, for example labels: [ham, spam]."),
        ("{classification: {prompt: '{text'}}",
         "4:37: data.format.classification.prompt: character 1: '{text' begins with a brace that has no partner. "
         "Write {column}, or {{ and }} for braces that are meant as they are."),
        ("{sharegpt: {roles: {customer: usr}}}",
         "4:41: data.format.sharegpt.roles.customer: expected one of system, user, assistant, tool, got 'usr'. "
         "Did you mean user?"),
        ("{sharegpt: {roles: {Bot: user, bot: assistant}}}",
         "4:47: data.format.sharegpt.roles.bot: it is the same word as 'Bot', apart from case. Remove one."),
        ("{classification: {}, sharegpt: {}}",
         "4:11: data.format: sharegpt and classification are 2 formats. "
         "Write one, such as classification, or with settings {classification: {...}}."),
        ("{}", "4:11: data.format: it names no format. "
         "Write one, such as classification, or with settings {classification: {...}}."),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_have_one_error_at_their_place(tmp_path, value, expected):
    assert errors_of(tmp_path, value) == [f"x.yaml:{expected}"]


@pytest.mark.parametrize("value", ["3", "[classification]", "clasification", "null", "{classification: [a]}"])
def test_what_is_no_format_is_one_error(tmp_path, value):
    (error,) = errors_of(tmp_path, value)
    assert error.startswith("x.yaml:4:")
    assert "expected" in error


def test_a_format_without_settings_takes_none(tmp_path):
    (error,) = errors_of(tmp_path, "{messages: {}}")
    assert error.startswith("x.yaml:4:12: data.format.messages: there is no such key.")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("{train: [{path: train.jsonl, format: {classification: {prompt: x}}}]}",
         "x.yaml:2:70: data.train[0].format.classification.prompt: {text} is not in it"),
        ("{train: {path: train.jsonl, format: {classification: {labelz: [a]}}}}",
         "x.yaml:2:61: data.train.format.classification.labelz: there is no such key"),
        ("{train: train.jsonl, eval: {path: eval.jsonl, format: {}}}",
         "x.yaml:2:61: data.eval.format: it names no format"),
    ],
)  # fmt: skip
def test_a_sources_format_has_settings_too(tmp_path, data, expected):
    (error,) = errors(tmp_path, f"model: {{base: org/model}}\ndata: {data}\n")
    assert error.startswith(expected)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("{train: train.jsonl, format: text, system: s}", ["x.yaml:2:50: data.system: it would be ignored"]),
        ("{train: [{path: train.jsonl, format: tokens, system: s}]}",
         ["x.yaml:2:60: data.train[0].system: rows of the format tokens have no messages"]),
        ("{train: [{path: train.jsonl, format: text}, more.jsonl], system: s}", []),
        ("{train: [{path: train.jsonl, format: text}], eval: {path: eval.jsonl, format: messages}, system: s}", []),
        ("{train: train.jsonl, eval: 0.1, format: {classification: {}}, system: s}", []),
        ("{train: train.jsonl, eval: 0.1, system: s}", []),
    ],
)  # fmt: skip
def test_a_system_prompt_needs_conversations(tmp_path, data, expected):
    found = errors(tmp_path, f"model: {{base: org/model}}\ndata: {data}\n")
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True))


def test_settings_can_be_set_on_the_command_line(tmp_path):
    recipe = loaded(tmp_path, HEAD, "data.format.classification.labels=[a, b]").recipe
    assert entry_settings(FORMATS, recipe.data.format).labels == ["a", "b"]


def test_the_reference_and_the_json_schema_know_every_setting():
    names = [name for name in keys(Recipe) if name.startswith("data.format.")]
    assert {"data.format.classification.labels", "data.format.sharegpt.roles"} <= set(names)
    page, schema = docs.markdown(), docs.json_schema()["$defs"]
    for entry in FORMATS:
        if entry.settings:
            assert f"`data.format.{entry.name}` as a mapping" in page
            assert set(schema[entry.settings.__name__]["properties"]) == set(entry.settings.model_fields)
    assert set(schema["FormatSettings"]["properties"]) == {name.split(".")[2] for name in names}


@pytest.mark.parametrize("module", ["lorakit.data.formats", "lorakit.recipe.schema", "lorakit.recipe.fields"])
def test_the_settings_are_known_whatever_is_imported_first(module):
    code = (
        f"import sys, {module}; from lorakit.recipe.schema import FormatSettings\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules)\n"
        "print(sorted(FormatSettings.model_fields), sorted(heavy))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "['classification', 'sharegpt', 'template'] []"
