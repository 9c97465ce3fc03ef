"""Every mistake of a recipe is reported in one pass, at its place, with what to write instead."""

import json
import subprocess
import sys

import pytest
from recipe_files import SMALL, errors, loaded, write

from lorakit.recipe.key_aliases import KEY_ALIASES
from lorakit.recipe.load import STAND_INS, RecipeErrors, load
from lorakit.recipe.rules import RULES
from lorakit.recipe.schema import Recipe
from lorakit.recipe.schema_introspection import fields, keys, section_of

TEN_MISTAKES = """\
name: "-x"
model:
  base: org/model
  quantization: fn4
  double_quant: "true"
  lora_r: 8
data:
  train: [train.jsonl, {path: 3}]
  eval: 1.5
train:
  batch_size: 0
  learning_rate: "1e-4"
  epochs: 1
  epochs: 2
  seed: .inf
"""


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_ten_mistakes_give_ten_errors_each_with_its_position(tmp_path):
    assert errors(tmp_path, TEN_MISTAKES) == [
        "x.yaml:1:7: name: expected a name of letters, digits, `.`, `_` and `-` that begins with a letter or digit, or "
        "null, got '-x'. Write for example my-run.",
        f"x.yaml:4:17: model.quantization: expected {accepted('model.quantization')}, got 'fn4'. Did you mean nf4?",
        "x.yaml:5:17: model.double_quant: expected true or false, got 'true'. Remove the quotes: true.",
        "x.yaml:6:3: model.lora_r: there is no such key. Did you mean adapter.rank?",
        "x.yaml:8:31: data.train[1].path: expected a path or a hub id, got 3. Put quotes around it: '3'.",
        f"x.yaml:9:9: data.eval: expected {accepted('data.eval')}, got 1.5. Write for example 0.1.",
        "x.yaml:11:15: train.batch_size: expected a positive whole number, got 0. Write for example 16.",
        "x.yaml:12:18: train.learning_rate: expected a positive number, or auto, got '1e-4'. Remove the quotes: 1e-4.",
        "x.yaml:14:3: train.epochs: already written at line 13, column 3. Remove one of the two.",
        "x.yaml:15:9: train.seed: .inf is not a finite number. Write a finite number.",
    ]


def accepted(name):
    from lorakit.recipe.schema_introspection import annotation_at, describe

    return describe(annotation_at(Recipe, tuple(name.split("."))))


def test_the_report_is_one_line_a_problem_and_a_count(tmp_path):
    with pytest.raises(RecipeErrors) as caught:
        load(write(tmp_path, TEN_MISTAKES))
    lines = str(caught.value).split("\n")
    assert lines[-1] == "10 problems."
    assert lines[:-1] == [str(problem) for problem in caught.value.problems]


def test_a_problem_is_plain_data_for_json(tmp_path):
    with pytest.raises(RecipeErrors) as caught:
        load(write(tmp_path, SMALL + "train: {batch_size: 0}\n"))
    fact = caught.value.problems[0].to_dict()
    assert json.loads(json.dumps(fact)) == {
        "file": str(tmp_path / "x.yaml"),
        "line": 5,
        "column": 21,
        "set": None,
        "path": "train.batch_size",
        "value": "0",
        "reason": "expected a positive whole number, got 0",
        "remedy": "Write for example 16.",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: x\n", ["x.yaml:1:1: model: the section is missing. ", "x.yaml:1:1: data: the section is missing. "]),
        ("data: {train: a/b}\nmodel:\n  dtype: auto\n", ["x.yaml:2:1: model.base: this key must be written. "]),
        ("model: {base: a/b}\ndata: {train: [{split: x}]}\n", ["x.yaml:2:16: data.train[0].path: this key must"]),
    ],
)
def test_a_missing_key_is_reported_at_its_section(tmp_path, text, expected):
    found = errors(tmp_path, text)
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("learning_rate: 1e-4", "Did you mean train.learning_rate?"),
        ("Model: {base: x}", "Did you mean model?"),
        ("trian: {epochs: 1}", "Did you mean train?"),
        ("lr: 1", "Did you mean train.learning_rate?"),
        ("load_in_4bit: true", "Did you mean model.quantization: nf4?"),
        ("gradient_accumulation_steps: 4", "effective batch"),
        ("adapter: {batch-size: 4}", "Did you mean train.batch_size?"),
        ("train: {batch-size: 4}", "Did you mean train.batch_size?"),
        ("train: {eval: x}", "Did you mean data.eval?"),
        ("train: {extends: x}", "Did you mean extends?"),
        ("train: {warmpu: 1}", "Did you mean train.warmup?"),
        ("train: {epochs:3}", "Put a space after the colon."),
        ("sweep: {prune: none}", "This is the file of a sweep: lorakit sweep takes it."),
        ("train.steps: 3", "Write steps under train. In the file of a sweep, which lorakit sweep takes, it is right."),
        ("output: {qqqqqq: 1}", "The keys of output are dir, merged, export."),
    ],
)
def test_an_unknown_key_names_the_one_that_was_meant(tmp_path, line, remedy):
    found = errors(tmp_path, f"{SMALL}{line}\n")
    assert len(found) == 1
    assert found[0].startswith("x.yaml:5:")
    assert "there is no such key" in found[0]
    assert remedy in found[0]


@pytest.mark.parametrize(
    "text",
    [
        "base_model: a/b\ndatasets: [c/d]\n",
        "modle: {base: a/b}\ndta: {train: c/d}\n",
        "model: {bsae: a/b}\ndata: {trian: c/d}\n",
    ],
)
def test_a_required_key_under_another_name_is_one_mistake(tmp_path, text):
    found = errors(tmp_path, text)
    assert len(found) == 2
    assert all("there is no such key. Did you mean" in line for line in found)


def test_a_key_that_is_needed_is_missing_whatever_other_key_is_misnamed(tmp_path):
    found = errors(tmp_path, "load_in_4bit: true\ndata: {train: a/b}\n")
    assert [line.split(": ")[1] for line in found] == ["load_in_4bit", "model"]


def test_every_foreign_name_leads_to_a_key_that_exists():
    ours = keys(Recipe)
    assert [name for name, (target, _) in KEY_ALIASES.items() if target.partition(":")[0] not in ours] == []
    # LLaMA-Factory's word for a chat template, and ours for a format.
    assert [name for name in KEY_ALIASES if name in {key.rpartition(".")[2] for key in ours}] == ["template"]


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ('train: {batch_size: "3"}', "Remove the quotes: 3."),
        ('train: {gradient_checkpointing: "false"}', "Remove the quotes: false."),
        ("train: {gradient_checkpointing: yes}", "Write true: YAML 1.2 reads yes"),
        ("train: {batch_size: 1_000}", "Write 1000."),
        ("train: {batch_size: 16.0}", "Write 16."),
        ("train: {batch_size: [4]}", "Write one value, 4."),
        ("train: {micro_batch: atuo}", "Did you mean auto?"),
        ("train: {keep: null}", "Write for example 2, or remove the line for the default."),
        ("train: {early_stopping: 3}", "Write for example {patience: 3}."),
        ("train: {warmup: 1.0}", "Write for example 0.03."),
        ("train: {schedule: Cosine}", "Did you mean cosine?"),
        ("name: 2024", "Put quotes around it: '2024'."),
        ("evaluate: {metrics: exact-match}", "Write it as a list: [exact-match]."),
        ("evaluate: {metrics: [exact_match]}", "Did you mean exact-match?"),
        ("evaluate: {rows: none}", "Write for example all."),
        ("output: {dir: {a: b}}", "Write for example"),
        ("adapter:", "or remove the line"),
    ],
)
def test_a_wrong_value_comes_with_what_to_write(tmp_path, line, remedy):
    found = errors(tmp_path, f"{SMALL}{line}\n")
    assert len(found) == 1
    assert remedy in found[0]


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("train: {epochs: 2, steps: 10}", "x.yaml:5:17: train.epochs: the run cannot last both 2 epochs and 10 steps"),
        ("train: {epochs: null}", "x.yaml:5:17: train.epochs: the run has no end"),
        ("train: {batch_size: 4, micro_batch: 8}", "x.yaml:5:37: train.micro_batch: 8 rows in memory"),
        ("train: {early_stopping: {patience: 2}}", "x.yaml:5:25: train.early_stopping: there are no held-out rows"),
        ("evaluate: {metrics: [exact-match, exact-match]}", "x.yaml:5:35: evaluate.metrics[1]: 'exact-match' is"),
        ("adapter: {targets: 'q_proj('}", "x.yaml:5:20: adapter.targets: 'q_proj(' is not a regular expression"),
        ("adapter: {targets: all_linear}", "x.yaml:5:20: adapter.targets: 'all_linear' is not one of all-linear"),
        ("adapter: {exclude: [ok, '*bad']}", "x.yaml:5:25: adapter.exclude[1]: '*bad' is not a regular expression"),
    ],
)
def test_a_combination_that_cannot_work_is_an_error(tmp_path, text, start):
    found = errors(tmp_path, f"{SMALL}{text}\n")
    assert len(found) == 1
    assert found[0].startswith(start)


@pytest.mark.parametrize(
    ("text", "start"),
    [
        (
            "train: [train.jsonl, {path: ./train.jsonl}]",
            "x.yaml:2:24: data.train[1]: train.jsonl is already data.train[0]",
        ),
        ("train: train.jsonl\n  eval: ./train.jsonl", "x.yaml:3:9: data.eval: train.jsonl is trained on as data.train"),
        ("train: a/b\n  eval: [eval.jsonl, a/b]", "x.yaml:3:22: data.eval[1]: a/b is trained on as data.train"),
        ("train: rows/\n  eval: rows/b.csv", "x.yaml:3:9: data.eval: rows/b.csv is trained on as data.train"),
        ("train: rows\n  eval: '*/b.*'", "x.yaml:3:9: data.eval: rows/b.csv is trained on as data.train"),
        ("train: [rows/b.csv, rows]", "x.yaml:2:23: data.train[1]: rows/b.csv is already data.train[0]"),
    ],
)
def test_rows_are_neither_doubled_nor_leaked(tmp_path, monkeypatch, text, start):
    (tmp_path / "rows").mkdir()
    for name in ("a.jsonl", "b.csv"):
        (tmp_path / "rows" / name).touch()
    monkeypatch.chdir(tmp_path)
    found = errors(tmp_path, f"data:\n  {text}\nmodel: {{base: org/model}}\n")
    assert len(found) == 1
    assert found[0].removeprefix(f"{tmp_path}/").startswith(start)


def test_a_share_of_training_rows_is_held_out_where_it_is_left_out_of_the_training(tmp_path):
    text = "data:\n  train: a/b\n  eval: {path: a/b, take: 0.1}\n{}model: {base: org/model}\n"
    (problem,) = errors(tmp_path, text.replace("{}", ""))
    assert "is trained on as data.train. Write other rows, or clean: {leakage: fix}, which trains on none" in problem
    assert errors(tmp_path, text.replace("{}", "  clean: {leakage: fix}\n")) == []
    assert errors(tmp_path, text.replace(", take: 0.1", "").replace("{}", "  clean: {leakage: fix}\n"))


def test_another_split_of_a_hub_dataset_is_other_rows(tmp_path):
    text = "data: {train: a/b, eval: {path: a/b, split: test}}\nmodel: {base: org/model}\n"
    assert errors(tmp_path, text) == []


def test_double_quant_needs_four_bits(tmp_path):
    text = "data: {train: a/b}\nmodel:\n  base: org/model\n  double_quant: true\n"
    assert errors(tmp_path, text)[0].startswith("x.yaml:4:17: model.double_quant: it would be ignored")
    assert errors(tmp_path, text + "  quantization: nf4\n  dtype: float16\n") == []


def test_rules_run_beside_field_errors_unless_their_fields_are_wrong(tmp_path):
    beside = errors(tmp_path, "train: {batch_size: 4, micro_batch: 8, seed: x}\n")
    assert len([line for line in beside if "train.micro_batch" in line]) == 1
    assert len([line for line in beside if "train.seed" in line]) == 1
    assert len([line for line in beside if "is missing" in line]) == 2
    silenced = errors(tmp_path, SMALL + "train: {batch_size: 0, micro_batch: 8}\n")
    assert len(silenced) == 1
    assert "train.batch_size" in silenced[0]


def test_rules_read_fields_that_exist_and_stand_ins_cover_what_is_required():
    known = keys(Recipe)
    assert [name for _, reads in RULES for name in reads if name not in known] == []
    required = {
        section: [name for name, info in section_of(annotation).model_fields.items() if info.is_required()]
        for section, annotation in fields(Recipe).items()
        if section_of(annotation) and Recipe.model_fields[section].is_required()
    }
    assert required == {section: list(stand_ins) for section, stand_ins in STAND_INS.items()}


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("tran.jsonl", "'tran.jsonl' does not exist. Did you mean train.jsonl?"),
        ("./sub/x.jsonl", "There is no folder sub"),
        ("https://example.org/x.jsonl", "is an address"),
        ("a/b/c", "neither a path that exists nor a hub id"),
        ("what is this", "neither a path that exists nor a hub id"),
        ('"a\\0.jsonl"', "neither a path that exists nor a hub id"),
        ("~nobody-here/x.jsonl", "does not exist"),
        (
            "empty",
            "'empty' is a folder without data files. Theirs end in .jsonl, .ndjson, .json, .csv, .tsv, .txt, .md",
        ),
        ("notes.docx", "'notes.docx' is not a data file. The name of one ends in .jsonl"),
        ("emty/", "'emty/' does not exist. Did you mean empty?"),
        ("tran.JSONL.gz", "'tran.JSONL.gz' does not exist. Did you mean train.jsonl?"),
        ("sub/rows.tsv", "There is no folder sub"),
        ('"*.csv"', "'*.csv' matches no data file. There is for example eval.jsonl."),
        (
            '"empty/*.csv"',
            "'empty/*.csv' matches no data file. There is no data file in empty; data files' names end in",
        ),
        ('"emty/*.csv"', "'emty/*.csv' matches no data file. Did you mean empty/*.csv?"),
        ('"emty/**/*.csv"', "Did you mean empty/**/*.csv?"),
    ],
)
def test_a_reference_that_leads_nowhere_is_an_error(tmp_path, written, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.docx").touch()
    found = errors(tmp_path, f"model: {{base: org/model}}\ndata:\n  train: {written}\n")
    assert len(found) == 1
    assert found[0].startswith("x.yaml:3:10: data.train: ")
    assert words in found[0]


def test_a_recipe_error_is_the_users_error(tmp_path):
    with pytest.raises(RecipeErrors) as caught:
        load(tmp_path / "none.yaml")
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith("none.yaml: there is no file none.yaml.")


def test_control_characters_of_a_recipe_do_not_reach_the_terminal(tmp_path):
    found = errors(tmp_path, SMALL + 'train: {"\\e[31m": 1, schedule: "\\e[31m\\n\\L"}\n"\\e": 1\n')
    assert len(found) == 3
    assert all(line.isprintable() for line in found)


def test_loading_imports_no_torch(tmp_path):
    path = write(tmp_path, SMALL + "evaluate: {metrics: [exact-match]}\nadapter: {kind: lora}\ntrain: {lr: 1}\n")
    code = (
        "import sys; from pathlib import Path; from lorakit.recipe.load import load, RecipeErrors\n"
        f"try: load(Path({str(path)!r}))\nexcept RecipeErrors as error: assert 'train.lr' in str(error)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'trl', 'rich', 'typer'} & set(sys.modules)\n"
        "assert 'lorakit.evaluate.metrics' in sys.modules\nprint(sorted(heavy))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_a_key_named_like_a_part_of_the_schema_is_an_unknown_key(tmp_path):
    found = errors(tmp_path, SMALL + "  eval: {Source: []}\n")
    assert [line.split(": ")[1] for line in found] == ["data.eval.path", "data.eval.Source"]


def test_a_good_recipe_has_no_errors(tmp_path):
    recipe = loaded(tmp_path, SMALL).recipe
    assert recipe.data.train == str(tmp_path / "train.jsonl")
    assert recipe.model.base == "org/model"


@pytest.mark.parametrize("value", ["'\\x1b]0;x\\x07'", "a" * 5000, "'a\\nb'"])
@pytest.mark.parametrize("key", ["data", "model", "extends", "adapter", "output", "evaluate: {metrics"])
def test_no_message_holds_a_long_text_or_one_that_commands_a_terminal(tmp_path, key, value):
    quoted = value.replace("'", '"')
    text = f"{key}: {quoted}" + ("}" if "{" in key else "")
    for problem in errors(tmp_path, f"model: {{base: a/b}}\n{text}\n" if key != "model" else f"{text}\n"):
        assert problem.isprintable() and len(problem) < 1500, problem[:300]
