"""The command line: what it prints, where, and its exit codes."""

import json
import subprocess
import sys

import pytest
from conftest import rows_of, write_rows

import lorakit
from lorakit.cli import main
from lorakit.registry import EXPORTERS


@pytest.fixture
def lorakit_run(capsys, monkeypatch):
    """Run a command line in process: exit code, standard output, standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lorakit", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        code = ended.value.code
        return (0 if code is None else code), out, err

    return run


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"], ["check", "RECIPE"], ["schema"]])
def test_commands_that_load_no_model_load_no_torch(recipe_file, command):
    arguments = [str(recipe_file()) if word == "RECIPE" else word for word in command]
    code = (
        f"import sys; sys.argv = {['lorakit', *arguments]!r}\n"
        "from lorakit.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'datasets', 'numpy', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_check_prints_the_resolved_recipe_and_every_auto_with_its_reason(recipe_file, lorakit_run):
    code, out, _ = lorakit_run("check", recipe_file(train={"learning_rate": "auto"}))
    assert code == 0
    assert "\n  learning_rate: 0.013\n" in out
    for key in ("model.dtype", "model.attention", "train.micro_batch", "train.learning_rate"):
        assert f"# {key}: auto is " in out


def test_check_as_json(recipe_file, lorakit_run):
    code, out, _ = lorakit_run("check", recipe_file(), "--json", "--set", "train.seed=7")
    facts = json.loads(out)
    assert code == 0 and facts["valid"] and facts["recipe"]["train"]["seed"] == 7
    assert {"path", "value", "reason"} == facts["auto"][0].keys()


def test_ten_mistakes_give_ten_errors_and_exit_code_2(recipe_file, lorakit_run, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text(
        "model:\n  base: a/b\n  dtype: float8\n  quantisation: nf4\n  quantization: fn4\n"
        "adapter:\n  rank: 0\n  kind: lroa\n  dropout: 1.5\n"
        "data:\n  train: train.jsonl\n  max_length: '512'\n"
        "train:\n  batch_size: 8\n  micro_batch: 16\n  learning_rate: 1e-4\n  warmup: -1\nlr: 3\n"
    )
    code, out, err = lorakit_run("check", bad)
    lines = [line for line in err.splitlines() if "bad.yaml:" in line]
    assert code == 2 and out == ""
    assert len(lines) == 10
    assert len({line.split(": ")[0] for line in lines}) == 10
    code, out, _ = lorakit_run("check", bad, "--json")
    assert code == 2
    assert len(json.loads(out)["problems"]) == 10


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["check", "nowhere.yaml"], "nowhere.yaml"),
        (["eval", "nowhere"], "nowhere: there is no such run"),
        (["merge", "nowhere"], "nowhere: there is no such run"),
        (["train", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_wrong_arguments_are_one_message_and_exit_code_2(lorakit_run, arguments, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = lorakit_run(*arguments)
    assert (code, out) == (2, "")
    assert reason in err and "Traceback" not in err


def test_version(lorakit_run):
    assert lorakit_run("--version")[:2] == (0, f"lorakit {lorakit.__version__}\n")


def test_train_eval_and_merge_end_to_end(recipe_file, lorakit_run, tmp_path):
    path, folder = recipe_file(output={"merged": True}), tmp_path / "run"
    code, out, err = lorakit_run("train", path, "-o", folder, "--json")
    assert code == 0, err
    assert json.loads(out)["steps"] == 12
    assert "model.dtype: auto is" in err
    assert (folder / "merged" / "merge.json").is_file()
    code, out, _ = lorakit_run("eval", folder, "--quiet")
    assert code == 0
    assert "json-fields.topic" in out and "base" in out and "adapter" in out
    code, out, err = lorakit_run("merge", folder, "--quiet")
    assert code == 2 and "--overwrite" in err
    code, out, _ = lorakit_run("merge", folder, "--quiet", "--overwrite", "--json")
    assert code == 0
    assert json.loads(out)["proof"]["positions"] > 0
    code, _, err = lorakit_run("train", path, "-o", folder)
    assert code == 2 and "--resume" in err and "--overwrite" in err


def test_dry_run_shows_an_example_and_writes_nothing(recipe_file, lorakit_run, tmp_path):
    code, out, _ = lorakit_run("train", recipe_file(), "-o", tmp_path / "run", "--dry-run")
    assert code == 0
    assert '⟦{"topic": "apples", "number": 0}<|im_end|>⟧' in out
    assert not (tmp_path / "run").exists()


def test_a_broken_row_is_named_by_file_and_line(recipe_file, lorakit_run, tmp_path):
    path = recipe_file()
    write_rows(tmp_path / "train.jsonl", [*rows_of(3), {"messages": [{"role": "user", "content": "no answer"}]}])
    code, _, err = lorakit_run("train", path, "-o", tmp_path / "run", "--quiet")
    assert code == 2
    assert "train.jsonl:4" in err and "data.broken: drop" in err
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_the_recipes_table_of_flags_excludes(recipe_file, lorakit_run):
    code, _, err = lorakit_run("train", recipe_file(), "--resume", "--overwrite")
    assert code == 2 and "exclude" in err


def test_memory_is_told_before_a_run_and_what_will_not_fit_is_warned_of(recipe_file, lorakit_run, monkeypatch):
    from dataclasses import replace

    from lorakit import prepare
    from lorakit.hardware.machine import processor

    _, _, err = lorakit_run("train", recipe_file(), "--dry-run")
    assert "memory: the longest micro-batch is predicted to take 0.6 GiB of" in err and "may run out" not in err
    monkeypatch.setattr(prepare, "usable_machine", lambda progress: replace(processor(), memory=600 << 20))
    _, _, err = lorakit_run("train", recipe_file(train={"micro_batch": 4}), "--dry-run")
    assert "it may run out. lorakit plan says what would fit" in " ".join(err.split())


def test_the_help_of_export_names_every_target(lorakit, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = lorakit("export", "--help")
    assert code == 0 and all(name in out for name in EXPORTERS.names())
