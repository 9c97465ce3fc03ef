"""A recipe is the file, what it extends and `--set`; later wins, and every error names the writing that is wrong."""

import pytest
from recipe_files import SMALL, errors, loaded, write

from lorakit.recipe.compose import LONGEST_CHAIN
from lorakit.recipe.load import load, to_yaml
from lorakit.recipe.paths import is_path


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_mappings_merge_lists_and_scalars_replace(tmp_path):
    write(tmp_path, "train: {batch_size: 4, seed: 1}\nevaluate: {metrics: [exact-match, json-valid]}\n", "base.yaml")
    text = f"extends: base.yaml\n{SMALL}train: {{seed: 2}}\nevaluate: {{metrics: [json-fields]}}\n"
    recipe = loaded(tmp_path, text).recipe
    assert (recipe.train.batch_size, recipe.train.seed) == (4, 2)
    assert recipe.evaluate.metrics == ["json-fields"]


def test_later_parents_win_and_the_extending_file_wins_over_all(tmp_path):
    write(tmp_path, "train: {seed: 1, keep: 1, batch_size: 1}\n", "a.yaml")
    write(tmp_path, "train: {seed: 2, keep: 3}\n", "b.yaml")
    recipe = loaded(tmp_path, f"extends: [a.yaml, b.yaml]\n{SMALL}train: {{seed: 3}}\n").recipe
    assert (recipe.train.seed, recipe.train.keep, recipe.train.batch_size) == (3, 3, 1)


def test_null_sets_null(tmp_path):
    write(tmp_path, "data: {system: You answer.}\n", "base.yaml")
    text = "extends: base.yaml\nmodel: {base: a/b}\ndata: {train: a/b, system: null}\n"
    assert loaded(tmp_path, text).recipe.data.system is None


def test_null_takes_away_what_another_file_says_where_the_key_takes_no_null(tmp_path):
    write(tmp_path, "adapter: {rank: 8, alpha: 16, targets: mlp}\n", "base.yaml")
    text = f"extends: base.yaml\n{SMALL}adapter: {{kind: none, rank: null, alpha: null}}\n"
    found = loaded(tmp_path, text)
    assert (found.recipe.adapter.rank, found.recipe.adapter.targets) == (16, "mlp")
    assert "adapter.rank" not in found.places
    again = load(write(tmp_path, f"{SMALL}adapter: {{rank: 8}}\n"), ["adapter.rank=null"])
    assert again.recipe.adapter.rank == 16
    assert errors(tmp_path, f"{SMALL}adapter: {{rank: null}}\n")  # over nothing it is a mistake


def test_a_source_merges_with_a_source_and_replaces_a_path(tmp_path):
    write(tmp_path, "data: {train: {path: train.jsonl, format: messages}}\n", "source.yaml")
    write(tmp_path, "data: {train: train.jsonl}\n", "path.yaml")
    override = "data: {train: {split: x}}\nmodel: {base: a/b}\n"
    merged = loaded(tmp_path, f"extends: source.yaml\n{override}").recipe.data.train
    assert (merged.format, merged.split, merged.path) == ("messages", "x", str(tmp_path / "train.jsonl"))
    assert "data.train.path: this key must be written" in errors(tmp_path, f"extends: path.yaml\n{override}")[0]


def test_paths_are_relative_to_the_file_that_says_them(tmp_path):
    write(tmp_path / "parts", "data: {train: train.jsonl}\n", "base.yaml")
    (tmp_path / "here.jinja").touch()
    text = "extends: parts/base.yaml\nmodel: {base: a/b, chat_template: here.jinja}\n"
    recipe = loaded(tmp_path, text).recipe
    assert recipe.data.train == str(tmp_path / "parts" / "train.jsonl")
    assert recipe.model.chat_template == str(tmp_path / "here.jinja")


def test_set_paths_are_relative_to_the_working_directory(tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere, "")
    path = write(tmp_path, SMALL)
    monkeypatch.chdir(elsewhere)
    assert load(path, ["data.train=more.jsonl"]).recipe.data.train == str(elsewhere / "more.jsonl")


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert loaded(tmp_path, SMALL, "data.train=~/more.jsonl").recipe.data.train == str(tmp_path / "more.jsonl")


def test_an_existing_folder_is_a_path_and_anything_else_a_hub_id(tmp_path):
    (tmp_path / "gpt2").mkdir()
    assert loaded(tmp_path, SMALL, "model.base=gpt2").recipe.model.base == str(tmp_path / "gpt2")
    hub = loaded(tmp_path, SMALL, "model.base=gpt3").recipe.model.base
    assert hub == "gpt3"
    assert is_path(str(tmp_path / "gpt2"))
    assert not is_path(hub)


@pytest.mark.parametrize(
    ("written", "path"),
    [
        ("data/", "data"),
        ("data", "data"),
        ("org/name", "org/name"),
        (".", ""),
        ("data/*.jsonl", "data/*.jsonl"),
        ("**/rows.TSV", "**/rows.TSV"),
        ("rows.tsv", "rows.tsv"),
        ("data/rows.jsonl.GZ", "data/rows.jsonl.GZ"),
        ("odd[1]*.csv", "odd[1]*.csv"),
    ],
)
def test_data_is_a_file_a_folder_or_a_pattern_beside_the_recipe(tmp_path, written, path):
    for name in ("data/a.jsonl", "data/rows.jsonl.GZ", "rows.tsv", "data/rows.TSV", "org/name/a.txt", "odd[1]*.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    recipe = loaded(tmp_path, SMALL, f'data.train="{written}"').recipe
    assert recipe.data.train == str(tmp_path / path)
    again = load(write(tmp_path / "runs", to_yaml(recipe, tmp_path / "runs"))).recipe
    assert again.data.train == recipe.data.train


def test_a_pattern_begins_in_the_recipes_folder_whatever_its_name(tmp_path):
    recipe = loaded(tmp_path / "run[1]", SMALL.replace("train.jsonl", '"*.jsonl"')).recipe
    assert recipe.data.train == str(tmp_path / "run[1]" / "*.jsonl")


def test_a_word_that_is_no_folder_is_a_hub_dataset(tmp_path):
    assert loaded(tmp_path, SMALL, "data.train=org/name").recipe.data.train == "org/name"


def test_an_error_in_an_inherited_file_names_that_file(tmp_path):
    write(tmp_path / "parts", "train:\n  batch_size: 0\n", "base.yaml")
    found = errors(tmp_path, f"extends: parts/base.yaml\n{SMALL}train: {{seed: x}}\n")
    assert [line.split(": ")[:2] for line in found] == [
        ["x.yaml:6:15", "train.seed"],
        ["parts/base.yaml:2:15", "train.batch_size"],
    ]


def test_a_mistake_that_is_overridden_is_none(tmp_path):
    write(tmp_path, "train:\n  batch_size: 0\n", "base.yaml")
    assert errors(tmp_path, f"extends: base.yaml\n{SMALL}train: {{batch_size: 2}}\n") == []


@pytest.mark.parametrize(
    ("extends", "start"),
    [
        ("bsae.yaml", "x.yaml:1:10: extends: there is no file bsae.yaml. Did you mean base.yaml?"),
        ("[base.yaml, none.yaml]", "x.yaml:1:22: extends[1]: there is no file none.yaml."),
        ("x.yaml", "x.yaml:1:10: extends: the files extend each other: x.yaml -> x.yaml"),
        ("5", "x.yaml:1:10: extends: 5 is not a path or a list of paths"),
        ("[{a: b}]", "x.yaml:1:11: extends[0]: a mapping is not a path"),
        ("https://example.org/x.yaml", "x.yaml:1:10: extends: 'https://example.org/x.yaml' is an address"),
        ("parts", "x.yaml:1:10: extends: parts is a folder"),
    ],
)
def test_a_parent_that_cannot_be_read_is_one_error_at_extends(tmp_path, extends, start):
    write(tmp_path, "train: {seed: 1}\n", "base.yaml")
    (tmp_path / "parts").mkdir()
    found = errors(tmp_path, f"extends: {extends}\ntrain: {{seed: 2}}\n")
    assert len(found) == 1
    assert found[0].startswith(start)


def test_a_cycle_names_the_round_trip_where_it_closes(tmp_path):
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    write(tmp_path, "extends: x.yaml\n", "b.yaml")
    found = errors(tmp_path, f"extends: a.yaml\n{SMALL}")
    assert len(found) == 1
    assert found[0].startswith(
        "b.yaml:1:10: extends: the files extend each other: x.yaml -> a.yaml -> b.yaml -> x.yaml."
    )


def test_two_ways_to_one_parent_are_no_cycle(tmp_path):
    write(tmp_path, "train: {seed: 7}\n", "root.yaml")
    write(tmp_path, "extends: root.yaml\n", "a.yaml")
    write(tmp_path, "extends: root.yaml\n", "b.yaml")
    assert loaded(tmp_path, f"extends: [a.yaml, b.yaml]\n{SMALL}").recipe.train.seed == 7


def test_parents_that_double_at_every_step_are_read_once_each(tmp_path):
    write(tmp_path, "train: {seed: 7}\n", "0.yaml")
    for depth in range(1, LONGEST_CHAIN - 1):
        write(tmp_path, f"extends: [{depth - 1}.yaml, {depth - 1}.yaml]\n", f"{depth}.yaml")
    assert loaded(tmp_path, f"extends: {LONGEST_CHAIN - 2}.yaml\n{SMALL}").recipe.train.seed == 7


def test_a_chain_has_a_longest_length(tmp_path):
    write(tmp_path, "train: {seed: 7}\n", "0.yaml")
    for depth in range(1, 600):
        write(tmp_path, f"extends: {depth - 1}.yaml\n", f"{depth}.yaml")
    found = errors(tmp_path, f"extends: 599.yaml\n{SMALL}")
    assert len(found) == 1
    assert f"more than {LONGEST_CHAIN} deep" in found[0]


def test_set_wins_over_every_file(tmp_path):
    write(tmp_path, "train: {seed: 1}\n", "base.yaml")
    found = loaded(tmp_path, f"extends: base.yaml\n{SMALL}train: {{seed: 2}}\n", "train.seed=3", "train.seed=4")
    assert found.recipe.train.seed == 4


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.learning_rate=1e-4", 1e-4),
        ("train.learning_rate=auto", "auto"),
        ("evaluate.metrics=[json-valid]", ["json-valid"]),
        ("train.early_stopping={patience: 2, min_delta: 0.5}", {"patience": 2, "min_delta": 0.5}),
        ("data.system=a=b", "a=b"),
        ("data.system=", None),
        ("data.columns.prompt=question", "question"),
    ],
)
def test_a_set_value_is_read_as_yaml(tmp_path, override, value):
    data = loaded(tmp_path, SMALL, "data.eval=eval.jsonl", override).recipe.model_dump()
    for part in override.partition("=")[0].split("."):
        data = data[part]
    assert data == value


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "train.batch_size=0",
            "train.batch_size: expected a positive whole number, got 0. Write for example 16.",
        ),
        ("learning_rate=1", "learning_rate: there is no such key. Did you mean train.learning_rate?"),
        ("train.learning_rat=1", "train.learning_rat: there is no such key. Did you mean train.learning_rate?"),
        ("tarin.seed=1", "tarin: there is no such key. Did you mean train?"),
        ("seed", "this is not of the form key=value. Write for example --set train.learning_rate=1e-4."),
        ("=1", "this is not of the form key=value. Write for example --set train.learning_rate=1e-4."),
        ("train..seed=1", "this is not of the form key=value. Write for example --set train.learning_rate=1e-4."),
        ("data.train[0]=x", "one item of a list cannot be set. Set the whole list: data.train=[...]."),
        ("extends=a.yaml", "extends is a key of files. Write it into the recipe."),
        ("train.seed=[1", "train.seed: this list lacks a comma or its closing `]`. Write the missing one."),
        ("train.seed=.inf", "train.seed: .inf is not a finite number. Write a finite number."),
    ],
)
def test_a_set_has_errors_of_the_same_form(tmp_path, override, line):
    assert errors(tmp_path, SMALL, override) == [f"--set {override}: {line}"]


def test_what_a_section_lacks_belongs_in_the_file_also_beside_a_set(tmp_path):
    found = errors(tmp_path, "name: x\nmodel: {dtype: auto}\n", "model.revision=main")
    assert [line.split(": ")[:2] for line in found] == [["x.yaml:1:1", "data"], ["x.yaml:2:1", "model.base"]]


def test_where_tells_who_said_it(tmp_path):
    write(tmp_path, "train:\n  keep: 1\n", "base.yaml")
    found = loaded(tmp_path, f"extends: base.yaml\n{SMALL}", "train.seed=3")
    assert found.where("model.base") == "x.yaml:3:9"
    assert found.where("train.keep") == "base.yaml:2:9"
    assert found.where("train.seed") == "--set train.seed=3"
    assert found.where("train.steps") == "default"
    assert {"model.base", "train.keep", "train.seed"} <= found.places.keys()
    assert "train.steps" not in found.places
    assert "extends" not in found.places


def test_a_path_is_shown_from_the_working_directory(tmp_path, monkeypatch):
    path = write(tmp_path / "recipes", SMALL)
    assert load(path).where("data.train") == "recipes/x.yaml:4:10"
    assert load(path).path == path


def test_parts_that_come_with_lorakit_are_extended_by_name(tmp_path):
    loaded_part = loaded(tmp_path, f"extends: hardware/8gb\n{SMALL}")
    assert loaded_part.recipe.model.quantization == "nf4"
    (problem,) = errors(tmp_path, f"extends: hardware/7gb\n{SMALL}")
    assert "Write one of: hardware/6gb, hardware/8gb, hardware/12gb" in str(problem)
    (tmp_path / "hardware").mkdir()
    write(tmp_path / "hardware", "model: {quantization: q8}\n", "8gb")
    assert loaded(tmp_path, f"extends: hardware/8gb\n{SMALL}").recipe.model.quantization == "q8"
    (problem,) = errors(tmp_path, f"extends: hardware/9gb\n{SMALL}")
    assert "there is no file hardware/9gb" in str(problem)
    assert "Did you mean hardware/8gb?" in str(problem)
