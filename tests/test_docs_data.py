"""docs/data.md: every row on the page is of the format it stands under, and becomes what stands below it."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from recipe_files import write

from lorakit.data.formats import detect, parse_record, required_columns
from lorakit.recipe.fields import entry_settings
from lorakit.recipe.load import load
from lorakit.registry import FORMATS

PAGE = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
RECIPE = "model: {base: org/model}\ndata:\n  train: train.jsonl\n"


def sections():
    """The text under each heading that names a format."""
    parts = re.split(r"^#{2,3} (.+)\n", PAGE, flags=re.MULTILINE)[1:]
    return {title.strip("`"): body for title, body in zip(parts[::2], parts[1::2], strict=True) if title[0] == "`"}


def rows():
    """Each row of the page: its format, the settings above it (YAML, or nothing), the row, and what it becomes."""
    found = []
    for name, body in sections().items():
        blocks = re.findall(r"^```(\w+)\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)
        settings = ""
        given = None
        for language, text in blocks:
            if language == "yaml":
                settings = text
            elif given is None:
                given = json.loads(text)
            else:
                found.append((name, settings, given, json.loads(text)))
                given = None
        assert given is None, f"a row of {name} does not say what it becomes"
    return found


def plain(found):
    return {key: value for key, value in asdict(found).items() if value is not None and key != "fixed"}


@pytest.mark.parametrize(("name", "settings", "row", "becomes"), rows())
def test_a_row_of_the_page_becomes_what_stands_below_it(name, settings, row, becomes, tmp_path):
    assert not FORMATS[name].columns or detect([row], "data.md")[0] == name
    indented = "".join(f"  {line}\n" for line in settings.splitlines())
    recipe = load(write(tmp_path, RECIPE + indented)).recipe
    assert plain(parse_record(name, entry_settings(FORMATS, recipe.data.format), row)) == becomes


def test_every_format_has_its_section_in_the_order_of_the_table():
    assert list(sections()) == FORMATS.names()
    assert {name for name, *_ in rows()} == set(FORMATS.names())


def test_the_table_of_formats_is_the_one_in_the_code():
    lines = re.findall(r"^\| \[`([\w-]+)`\]\(#[\w-]+\) \| (.+?) \| (.*?) ?\|$", PAGE, re.MULTILINE)
    assert [name for name, *_ in lines] == FORMATS.names()
    for name, columns, optional in lines:
        entry = FORMATS[name]
        needed = ", ".join(" or ".join(f"`{column}`" for column in names) for names in required_columns(entry))
        assert columns == (needed or "those that its settings name")
        assert optional == ", ".join(f"`{column}`" for column in entry.optional)


def test_every_setting_of_a_format_is_explained_in_its_section():
    for entry in FORMATS:
        for setting in getattr(entry.settings, "model_fields", ()):
            assert f"The setting `{setting}`" in sections()[entry.name]


def test_the_first_recipe_of_the_page_is_valid(tmp_path):
    (block,) = re.findall(r"^```yaml\n(model:.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert load(write(tmp_path, block)).recipe.data.train[1].format.classification.labels == ["ham", "spam"]
