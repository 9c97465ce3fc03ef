"""The reference is read from the schema: every key, word and default is in the page and in the JSON schema."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from lorakit.recipe import docs as reference
from lorakit.recipe.rules import RULES
from lorakit.recipe.schema import Recipe
from lorakit.recipe.schema_introspection import annotation_at, describe, keys
from lorakit.registry import ADAPTERS, FORMATS, METRICS, QUANTIZERS, TRACKERS

ROOT = Path(__file__).parent.parent


@pytest.fixture
def generate_docs():
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "tools" / "generate_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train.batch_size", "a positive whole number"),
        ("train.micro_batch", "a positive whole number, or auto"),
        ("train.epochs", "a positive number, or null"),
        ("train.seed", "a whole number of at least 0 and below 4294967296"),
        ("data.max_length", "a whole number of at least 8"),
        ("data.overlong", "one of drop, truncate, split, error"),
        ("model.double_quant", "true or false"),
        ("model.chat_template", "a name such as chatml, or a path, or null"),
        ("data.columns", "a mapping, each value a text"),
        ("train.warmup", "a fraction of the steps from 0 to below 1, or a whole number of steps"),
    ],
)
def test_a_field_is_described_in_plain_english(name, text):
    assert describe(annotation_at(Recipe, tuple(name.split(".")))) == text


def test_words_of_tables_are_read_from_the_tables():
    assert describe(annotation_at(Recipe, ("adapter", "kind"))).startswith(
        f"one of {', '.join(ADAPTERS.names())}, or a"
    )
    items = reference.json_schema()["$defs"]["Evaluate"]["properties"]["metrics"]["items"]
    assert items["anyOf"][0]["enum"] == METRICS.names()


def test_every_key_has_a_meaning_and_is_in_the_page():
    page = reference.markdown()
    for key in keys(Recipe):
        name = key.rpartition(".")[2]
        if key in Recipe.model_fields and key != "name":
            assert f"### `{key}`" in page
        else:
            assert re.search(rf"^\| `{name}` \| .+ \| .+ \| .+ \|$", page, re.MULTILINE), key


def test_every_word_of_a_table_is_in_the_page():
    page = reference.markdown()
    for table in (FORMATS, ADAPTERS, QUANTIZERS, METRICS, TRACKERS):
        assert all(f"| `{entry.name}` | {entry.summary} |" in page for entry in table)


def test_every_rule_is_in_the_page():
    page = reference.markdown()
    assert all(rule.__doc__ and f"- {rule.__doc__}" in page for rule, _ in RULES)


def test_the_json_schema_knows_every_key_and_no_other():
    schema = reference.json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert list(schema["properties"]) == ["extends", *Recipe.model_fields]
    sections = [schema, *schema["$defs"].values()]
    assert all(section["additionalProperties"] is False for section in sections)
    assert all("description" in key for section in sections[1:] for key in section["properties"].values())
    assert schema["$defs"]["Train"]["properties"]["batch_size"]["default"] == 16
    assert json.loads(json.dumps(schema)) == schema


def test_a_part_of_a_recipe_is_no_error_in_an_editor():
    schema = reference.json_schema()
    assert [name for name in ("Model", "Data") if "required" in schema["$defs"][name]] == []
    assert "required" not in schema


def test_check_names_what_is_not_current_and_writing_makes_it_current(tmp_path, capsys, generate_docs):
    assert generate_docs.main(["--check"], root=tmp_path) == 1
    assert "docs/recipe.md is not current" in capsys.readouterr().out
    assert generate_docs.main([], root=tmp_path) == 0
    assert generate_docs.main(["--check"], root=tmp_path) == 0
    page = tmp_path / "docs" / "recipe.md"
    page.write_text(page.read_text(encoding="utf-8") + "stale\n", encoding="utf-8")
    capsys.readouterr()
    assert generate_docs.main(["--check"], root=tmp_path) == 1
    assert capsys.readouterr().out == "docs/recipe.md is not current: run python tools/generate_docs.py\n"


def test_the_docs_of_this_repository_are_current(generate_docs):
    assert list(generate_docs.stale(ROOT, generate_docs.GENERATED)) == []
