"""Promises of `lorakit lock` and `train --locked`: what is locked trains; what differs is named before."""

import json
import shutil

import pytest
import yaml
from conftest import CHATML, rows_of, write_rows
from eval_runs import edit_json, make_run

from lorakit.errors import UserError
from lorakit.progress import Silent
from lorakit.recipe.load import load
from lorakit.run_dir import Run
from lorakit.share.lock import lock_file, lock_of_run, read_lock, refuse_differences, write_lock


@pytest.fixture
def locked(recipe_file, tmp_path, tiny_base):
    """A recipe that reads a file of each kind, on a base of its own, and its lock."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (tmp_path / "own.jinja").write_text(CHATML)
    (tmp_path / "part.yaml").write_text("train: {seed: 3}\n")
    path = recipe_file(model={"base": "base", "chat_template": "own.jinja"}, train={"epochs": ..., "steps": 2})
    path.write_text("extends: part.yaml\n" + path.read_text())
    write_lock(load(path), Silent())
    return path


def refusal(path, *overrides):
    with pytest.raises(UserError) as caught:
        refuse_differences(load(path, overrides), Silent())
    return [line.removeprefix("  - ") for line in str(caught.value).splitlines()[1:-1]]


def test_a_lock_names_every_file_by_a_relative_path(locked, tmp_path):
    content = yaml.safe_load(lock_file(locked).read_text())
    assert content["format"] == 1 and content["recipe"]["train"]["seed"] == 3
    assert content["data"]["files"].keys() == {"./train.jsonl", "./eval.jsonl"}
    assert content["inputs"].keys() == {"./own.jinja"} and content["extends"].keys() == {"./part.yaml"}
    assert content["base"]["name"] == "./base" and "model.safetensors" in content["base"]["sha256"]
    assert "torch" in content["versions"] and str(tmp_path) not in lock_file(locked).read_text()


def test_what_is_locked_is_trained_also_in_another_place(locked, tmp_path, command, monkeypatch):
    refuse_differences(load(locked), Silent())
    shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-moved")
    monkeypatch.chdir(tmp_path.parent / f"{tmp_path.name}-moved")
    code, _, err = command("train", "tiny.yaml", "--locked", "--dry-run")
    assert code == 0 and "everything is as locked in tiny.lock.yaml" in err


def test_each_file_that_differs_is_named(locked, tmp_path, tiny_base):
    write_rows(tmp_path / "train.jsonl", rows_of(21))
    assert refusal(locked) == ["train.jsonl: other content, by sha256"]
    write_rows(tmp_path / "train.jsonl", rows_of(22))
    (tmp_path / "own.jinja").write_text(CHATML + "{# #}")
    assert refusal(locked) == [
        "the tokenizer of the base, or the chat template, is another one by sha256",
        "own.jinja: other content, by sha256",
    ]
    (tmp_path / "own.jinja").write_text(CHATML)
    (tmp_path / "part.yaml").write_text("train: {seed: 4}\n")
    assert refusal(locked) == [
        "train.seed: 3 locked, 4 now (part.yaml:1:15)",
        "part.yaml: other content, by sha256",
    ]
    (tmp_path / "part.yaml").write_text("train: {seed: 3}\n")
    edit_json(tmp_path / "base" / "generation_config.json", max_length=77)
    (line,) = refusal(locked)
    assert line.startswith("model.base: generation_config.json of ") and line.endswith("differ by sha256")
    shutil.copy(tiny_base / "generation_config.json", tmp_path / "base")
    shutil.move(tmp_path / "train.jsonl", tmp_path / "renamed.jsonl")
    refuse_differences(load(locked, ["data.train=renamed.jsonl"]), Silent())


def test_keys_and_versions_that_differ_are_named(locked):
    assert refusal(locked, "train.learning_rate=0.1") == [
        "train.learning_rate: 0.05 locked, 0.1 now (--set train.learning_rate=0.1)"
    ]
    refuse_differences(load(locked, ["output.dir=elsewhere"]), Silent())
    path = lock_file(locked)
    content = yaml.safe_load(path.read_text())
    content["versions"] |= {"torch": "1.0", "gone": "2.0"}
    path.write_text(yaml.safe_dump(content))
    gone, torch = sorted(refusal(locked))
    assert torch.startswith("torch: 1.0 locked, ") and gone == "gone: 2.0 locked, not installed now"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: path.unlink(), "there is no lock of tiny.yaml. lorakit lock tiny.yaml writes one"),
        (lambda path: path.write_text(path.read_text()[:-300] + "\n x: ["), "damaged: "),
        (
            lambda path: path.write_text("format: 1\nrecipe: {name: tiny}\n"),
            "damaged: it has no versions, base.sha256, data",
        ),
        (
            lambda path: path.write_text(path.read_text().replace("./own.jinja: ", "./own.jinja: [x] #")),
            "has no inputs",
        ),
        (lambda path: path.write_text("- 1\n"), "damaged: "),
        (lambda path: path.write_text("format: 7\n"), "has the format 7, of a later lorakit; this one reads 1"),
        (lambda path: path.write_text("format: one\n"), "damaged: its format is one"),
        (lambda path: path.write_text(path.read_text().replace("name: tiny", "name: big")), "lock of the recipe big"),
    ],
)
def test_a_lock_that_cannot_be_held_to_is_refused(locked, change, reason):
    change(lock_file(locked))
    with pytest.raises(UserError, match=r"tiny\.lock\.yaml") as caught:
        refuse_differences(load(locked), Silent())
    assert reason in str(caught.value)


def test_locking_again_tells_what_changed_and_replaces_no_other_file(locked, command, tmp_path):
    write_rows(tmp_path / "train.jsonl", rows_of(21))
    code, out, err = command("lock", locked)
    assert code == 0 and "changed: train.jsonl: other content, by sha256" in out, err
    assert "2 data files, 6 base files, 2 other files" in out and f"next: lorakit train {locked} --locked" in out
    code, out, _ = command("lock", locked, "--json")
    assert json.loads(out)["changed"] == [] and json.loads(out)["format"] == 1
    lock_file(locked).write_text(lock_file(locked).read_text()[:60] + "\n[")
    assert command("lock", locked)[0] == 0
    read_lock(lock_file(locked), load(locked))
    lock_file(locked).write_text("mine: 1\n")
    code, _, err = command("lock", locked)
    assert code == 2 and "is not a lock that lorakit wrote" in err and lock_file(locked).read_text() == "mine: 1\n"


def test_nothing_is_touched_where_something_differs(locked, command, tmp_path):
    write_rows(tmp_path / "eval.jsonl", rows_of(40)[31:])
    code, _, err = command("train", locked, "--locked", "-o", tmp_path / "run")
    assert code == 2 and "eval.jsonl: other content" in err and not (tmp_path / "run").exists()


def test_a_run_is_trained_again_from_its_manifest_and_what_differs_is_named(tmp_path, tiny_base, command):
    run = make_run(tmp_path, tiny_base, train={"steps": 2, "eval_every": 2, "save_every": 2, "learning_rate": "auto"})
    assert lock_of_run(run).keys["train.learning_rate"] == 0.013
    code, _, err = command("train", "--locked", run.folder, "-o", tmp_path / "again")
    assert code == 0, err
    again = Run(tmp_path / "again")
    assert again.read_manifest()["adapter_sha256"] == run.read_manifest()["adapter_sha256"]
    assert refusal(run.recipe, "train.seed=7") == ["train.seed: 42 locked, 7 now (--set train.seed=7)"]
    text = run.recipe.read_text()
    run.recipe.write_text(text.replace("seed: 42", "seed: 8"))
    assert refusal(run.recipe)[0].startswith("train.seed: 42 locked, 8 now (")
    run.recipe.write_text(text)
    edit_json(run.manifest, recipe=None)
    refuse_differences(load(run.recipe), Silent())
    write_rows(tmp_path / "train.jsonl", rows_of(3))
    code, _, err = command("train", "--locked", run.folder, "-o", tmp_path / "third")
    assert code == 2 and "train.jsonl: other content, by sha256" in err and not (tmp_path / "third").exists()
    edit_json(run.manifest, versions=["torch"])
    with pytest.raises(UserError, match="damaged: it has no versions"):
        lock_of_run(run)
    code, _, err = command("train", "--locked", tmp_path)
    assert code == 2 and "not a run folder" in err
