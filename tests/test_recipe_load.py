"""A loaded recipe holds what was written and the defaults; dumped, it loads again as the same recipe."""

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recipe_files import SMALL, loaded, write

from lorakit.errors import UserError
from lorakit.recipe.load import RecipeErrors, load, to_yaml
from lorakit.recipe.schema import Recipe
from lorakit.recipe.schema_introspection import keys

FULL = """\
extends: base.yaml
name: full
model: {base: org/model, quantization: nf4, double_quant: false, chat_template: chat.jinja}
adapter: {rank: 8, targets: [q_proj, v_proj], exclude: ['lm_head']}
data:
  train: [train.jsonl, {path: more.jsonl, format: messages, columns: {prompt: "1e-4", "no": "yes"}}]
  eval: 0.1
  system: "1e-4"
train: {steps: 10, learning_rate: 1e-5, warmup: 0, early_stopping: {patience: 2}}
evaluate: {metrics: [], rows: 5}
"""


def folder_with_files(folder):
    write(folder, "train: {seed: 5}\n", "base.yaml")
    (folder / "chat.jinja").touch()
    return folder


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("debian-json.yaml", "debian-json"),
        ("my task/recipe.yaml", "my-task"),
        ("é.yaml", "recipe"),
        ("a.b.yaml", "a.b"),
    ],
)
def test_the_name_is_the_files_or_its_folders(tmp_path, file, name):
    recipe = load(write((tmp_path / file).parent, SMALL, Path(file).name)).recipe
    assert recipe.name == name
    assert recipe.output.dir == f"runs/{name}"


def test_what_is_written_stays(tmp_path):
    recipe = loaded(tmp_path, f"name: mine\n{SMALL}output: {{dir: out}}\n").recipe
    assert (recipe.name, recipe.output.dir) == ("mine", "out")
    assert loaded(tmp_path, f"name: mine\n{SMALL}").recipe.output.dir == "runs/mine"


def test_steps_replace_the_default_epochs(tmp_path):
    assert loaded(tmp_path, SMALL).recipe.train.epochs == 3
    train = loaded(tmp_path, SMALL + "train: {steps: 10}\n").recipe.train
    assert (train.epochs, train.steps) == (None, 10)
    train = loaded(tmp_path, SMALL + "train: {steps: 10, epochs: null}\n").recipe.train
    assert (train.epochs, train.steps) == (None, 10)


def test_a_dumped_recipe_loads_as_the_same_recipe(tmp_path):
    recipe = loaded(folder_with_files(tmp_path), FULL).recipe
    run = tmp_path / "runs" / "full"
    again = load(write(run, to_yaml(recipe, run), "recipe.yaml")).recipe
    assert again == recipe
    assert again.data.train[1].columns == {"prompt": "1e-4", "no": "yes"}
    assert again.train.learning_rate == 1e-5


def test_a_dump_holds_every_key_and_no_absolute_path(tmp_path):
    recipe = loaded(folder_with_files(tmp_path), FULL).recipe
    text = to_yaml(recipe, tmp_path / "runs")
    written = load(write(tmp_path / "runs", text, "again.yaml")).places.keys()
    # Keys of a source, of an entry's settings and of a spectrum are written where there are some.
    elsewhere = ("data.train.", "data.eval.", "data.format.", "adapter.kind.", "adapter.layers.")
    expected = {key for key in keys(Recipe) if not key.startswith(elsewhere)}
    assert expected - written == set()
    assert str(tmp_path) not in text
    assert list(Recipe.model_fields) == [line[:-1].split(":")[0] for line in text.splitlines() if line[0].isalpha()]


def test_double_quant_is_dumped_only_where_it_is_read(tmp_path):
    recipe = loaded(tmp_path, SMALL).recipe
    assert "double_quant" not in to_yaml(recipe, tmp_path)
    assert load(write(tmp_path, to_yaml(recipe, tmp_path))).recipe == recipe


texts = st.text(
    st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\t\n'\"#:-{}[]&*!|>%@`,?~"), max_size=30
)


@settings(max_examples=60, deadline=None)
@given(
    system=texts | st.sampled_from(["no", "1e-4", "0o17", "~", "null", ".inf", "010", "<<", "=", "- a", "a: b", ""]),
    column=texts,
    rate=st.floats(min_value=1e-300, max_value=1e300),
    seed=st.integers(min_value=0, max_value=2**32 - 1),
    warmup=st.integers(min_value=0, max_value=10**9) | st.floats(min_value=0, max_value=1, exclude_max=True),
)
def test_any_recipe_survives_dump_and_load(system, column, rate, seed, warmup):
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "model": {"base": "org/model"},
            "data": {"train": "org/data", "system": system, "columns": {"text": column}},
            "train": {"learning_rate": rate, "seed": seed, "warmup": warmup},
            "output": {"dir": "runs/x"},
        }
    )
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "x.yaml"
        path.write_text(to_yaml(recipe, Path(name)), encoding="utf-8")
        again = load(path).recipe
    assert again == recipe
    assert type(again.train.warmup) is type(recipe.train.warmup)


def outcome(raw: bytes, *overrides: str) -> Recipe | RecipeErrors:
    """What loading gives; anything but a recipe or RecipeErrors fails the test."""
    with tempfile.TemporaryDirectory() as name:
        path = folder_with_files(Path(name)) / "x.yaml"
        path.write_bytes(raw)
        try:
            return load(path, overrides).recipe
        except RecipeErrors as error:
            assert error.problems
            assert str(error).count("\n") == len(error.problems)
            return error


pieces = st.sampled_from(
    [*"[]{}:-\"'!|>#%?,~\n\t\r\u2028\ufeffaé", ": ", "- ", "  ", "---", "<<", "&a ", "*a"]
) | st.sampled_from(["model", "data", "train", "extends", "1e-4", ".inf", "null", "\\x"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(pieces, max_size=40).map(lambda parts: "".join(parts).encode()) | st.binary(max_size=60))
def test_garbage_never_raises_anything_but_recipe_errors(raw):
    outcome(raw)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, len(FULL) - 1), st.integers(0, 12), pieces | st.text(max_size=3).filter(str.isprintable))
def test_a_mutated_recipe_never_raises_anything_but_recipe_errors(start, length, inserted):
    outcome((FULL[:start] + inserted + FULL[start + length :]).encode())


@settings(max_examples=100, deadline=None)
@given(
    st.text(max_size=10) | st.sampled_from(keys(Recipe)),
    st.text(max_size=10) | st.lists(pieces, max_size=5).map("".join),
)
def test_a_garbage_set_never_raises_anything_but_recipe_errors(name, value):
    outcome(FULL.encode(), f"{name}={value}")


values = st.recursive(
    st.sampled_from(
        ["null", "true", "0", "-1", "1.5", "1e-4", "x", "''", "'3'", "auto", "[]", "{}", "9" * 30, "train.jsonl"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | st.dictionaries(st.sampled_from(["path", "a", "Source", "patience", "0"]), inner, max_size=3).map(
            lambda pairs: "{" + ", ".join(f"{key!r}: {value}" for key, value in pairs.items()) + "}"
        )
    ),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(keys(Recipe)), values)
def test_any_value_at_any_key_is_a_recipe_or_recipe_errors_that_name_the_key(key, value):
    found = outcome(FULL.encode(), f"{key}={value}")
    if isinstance(found, RecipeErrors):
        assert all(os.linesep not in str(problem) for problem in found.problems)
        assert all(problem.place.setting for problem in found.problems if problem.path.startswith(f"{key}."))


def test_only_an_error_about_a_key_gets_the_keys_place(tmp_path):
    """Files have names with dots too, and lie in folders that are called as sections are."""
    recipe = loaded(tmp_path, SMALL)
    for text, place in (
        ("data.train: no rows left", "x.yaml:4:10: "),
        ("data.train[1].path: there is none", "x.yaml:4:10: "),
        ("model.dtype: cannot be", "x.yaml:2:3: "),
        ("train.steps: too many", "x.yaml: "),
        ("train.jsonl: the file is one JSON list", ""),
        ("data: is a folder", ""),
        ("adapter.safetensors: damaged", ""),
        ("runs/a: holds another run's results", ""),
    ):
        with pytest.raises(UserError) as told, recipe.locating():
            raise UserError(text)
        assert str(told.value).endswith(place + text) and (str(told.value) == text) is not bool(place), text


def test_two_dots_lead_out_of_the_folder_itself_however_it_is_reached(tmp_path):
    """As the system reads them: `cat link/../x` is beside what the link leads to."""
    folder = tmp_path / "deep" / "task"
    path = write(folder, SMALL.replace("train: train.jsonl", "train: ../rows.jsonl"))
    (tmp_path / "deep" / "rows.jsonl").touch()
    (tmp_path / "link").symlink_to(folder)
    first, second = load(path).recipe, load(tmp_path / "link" / path.name).recipe
    assert first.data == second.data and first.data.train == str(tmp_path / "deep" / "rows.jsonl")
    assert to_yaml(second, tmp_path / "link") == to_yaml(first, folder)
