"""A source that is a hub dataset: its configuration, its files, a part of a split. A folder below the working directory
whose name is the dataset's id is read by the library `datasets` as the hub's repository would be."""

import pytest
from conftest import rows_of, write_rows

from lorakit.data.sources import open_source, source_name
from lorakit.errors import UserError
from lorakit.recipe.load import RecipeErrors, load
from lorakit.recipe.schema import Source

CARD = """---
configs:
- config_name: plain
  data_files: plain.jsonl
- config_name: long
  data_files: long.jsonl
---
"""


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "someone" / "rows"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    for name, rows in (("plain", 3), ("long", 20), ("other", 7)):
        write_rows(folder / f"{name}.jsonl", rows_of(rows))
    return "someone/rows"


def count(source: Source) -> int:
    return sum(1 for block in open_source(source).blocks for _ in block.rows())


@pytest.mark.parametrize(
    ("facts", "rows", "name"),
    [
        ({"subset": "plain"}, 3, "someone/rows[plain, train]"),
        ({"subset": "long", "split": "train[:25%]"}, 5, "someone/rows[long, train[:25%]]"),
        ({"subset": "long", "split": "train[15:]"}, 5, "someone/rows[long, train[15:]]"),
        ({"data_files": "other.jsonl"}, 7, "someone/rows[other.jsonl, train]"),
        ({"data_files": ["other.jsonl", "plain.jsonl"]}, 10, "someone/rows[other.jsonl, plain.jsonl, train]"),
    ],
)
def test_the_rows_of_a_hub_dataset_are_those_that_the_source_names(dataset, facts, rows, name):
    source = Source(path=dataset, **facts)
    assert (count(source), source_name(source)) == (rows, name)


def test_a_configuration_that_is_not_there_is_an_error_with_the_librarys_reason(dataset):
    with pytest.raises(UserError, match=r"(?i)plan.*not found"):
        open_source(Source(path=dataset, subset="plan"))


def test_two_configurations_are_other_rows_and_a_file_on_disk_has_none(recipe_file, tmp_path):
    sources = [{"path": "a/b", "subset": "x"}, {"path": "a/b", "subset": "y"}, {"path": "a/b", "data_files": "c.csv"}]
    assert load(recipe_file(data={"train": sources, "eval": 0.1})).recipe.data.train[1].subset == "y"
    write_rows(tmp_path / "train.jsonl", rows_of(4))
    with pytest.raises(RecipeErrors, match=r"data\.train\.subset: it would be ignored"):
        load(recipe_file(data={"train": {"path": "train.jsonl", "subset": "x"}}))
