"""Overwriting deletes what lorakit wrote, and neither what the user has there nor what the new result is made from."""

import json
import shutil

import pytest
from conftest import rows_of, write_rows
from runs_of_tests import run_recipe
from test_cli import lorakit_run as lorakit_run

from lorakit.run_dir import CLEARED, Run

EXTENSION = {"manifest_version": 3, "name": "Read aloud", "version": "1.2"}


@pytest.fixture
def finished(recipe_file, tmp_path):
    path = recipe_file(train={"steps": 1, "epochs": None, "save_every": 1})
    run, _ = run_recipe(path, tmp_path / "run")
    return path, run


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("manifest", [EXTENSION, [], "{", {"base": {}, "data": {}}])
def test_a_manifest_of_another_program_makes_no_run(recipe_file, tmp_path, lorakit_run, manifest):
    path = recipe_file(train={"steps": 1, "epochs": None})
    project = tmp_path / "extension"
    (project / "model").mkdir(parents=True)
    (project / "model" / "precious.bin").write_text("years")
    (project / "manifest.json").write_text(manifest if manifest == "{" else json.dumps(manifest))
    before = content(project)
    for flags in ([], ["--overwrite"], ["--resume"]):
        code, _, err = lorakit_run("train", path, "-o", project, *flags)
        assert code == 2 and "manifest.json is not a run's" in " ".join(err.split())
    assert lorakit_run("train", path, "-o", project / "runs" / "tiny", "--quiet")[0] == 0  # it lies inside no run
    shutil.rmtree(project / "runs")
    assert content(project) == before


def test_overwriting_leaves_every_file_that_the_run_did_not_write(finished, lorakit_run):
    path, run = finished
    mine = [run.folder / "notes.txt", run.checkpoints / "plan.txt", run.evaluations / "ratings-ann.json"]
    for file in mine:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    scores = run.evaluations / "20260101T000000.json"
    scores.write_text("{}")
    assert lorakit_run("train", path, "-o", run.folder, "--overwrite", "--quiet")[0] == 0
    assert all(file.read_text() == "mine" for file in mine) and not scores.exists()


@pytest.mark.parametrize("name", ["adapter/notes.txt", "merged/precious.bin", "model/config.json"])
def test_overwriting_refuses_a_result_folder_with_files_of_the_users(finished, lorakit_run, name):
    path, run = finished
    (run.folder / name).parent.mkdir(exist_ok=True)
    (run.folder / name).write_text("mine")
    before = content(run.folder)
    code, _, err = lorakit_run("train", path, "-o", run.folder, "--overwrite")
    assert code == 2 and str(run.folder / name.split("/")[0]) in " ".join(err.split())
    assert content(run.folder) == before


@pytest.mark.parametrize("what", ["extended file", "rows", "rows in a folder by a link", "adapter", "template"])
def test_overwriting_refuses_what_the_new_run_is_made_from(finished, lorakit_run, tmp_path, what):
    path, run = finished
    recipe = path.read_text()
    if what == "extended file":
        recipe = f"extends: {run.recipe}\nname: next\n"
    elif what == "rows":
        rows = write_rows(run.adapter / "rows.jsonl", rows_of(22))
        recipe = recipe.replace("train: train.jsonl", f"train: {rows}")
    elif what == "rows in a folder by a link":
        (tmp_path / "rows").mkdir()
        (tmp_path / "rows" / "train.jsonl").symlink_to(write_rows(run.checkpoints / "rows.jsonl", rows_of(22)))
        recipe = recipe.replace("train: train.jsonl", f"train: {tmp_path / 'rows'}")
    elif what == "adapter":
        recipe = recipe.replace("  rank: 4\n", f"  from: {run.folder}\n").replace("  alpha: 8\n", "")
    else:
        template = run.adapter / "chat_template.jinja"
        recipe = recipe.replace("model:\n", f"model:\n  chat_template: {template}\n")
    path.write_text(recipe)
    before = content(run.folder)
    code, _, err = lorakit_run("train", path, "-o", run.folder, "--overwrite")
    reason = "the folder that this run writes to" if what == "adapter" else "Copy it elsewhere first"
    assert code == 2 and reason in err
    assert content(run.folder) == before


def test_a_clearing_that_was_killed_leaves_a_run_that_can_begin_again(finished, lorakit_run, monkeypatch):
    path, run = finished

    def killed(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lorakit.run_dir.remove_folder", killed)
        assert lorakit_run("train", path, "-o", run.folder, "--overwrite")[0] == 130
    assert run.read_manifest()["status"] == CLEARED
    assert lorakit_run("eval", run.folder)[0] == 2
    assert lorakit_run("train", path, "-o", run.folder, "--resume", "--quiet")[0] == 0
    assert run.read_manifest()["status"] == "complete"


@pytest.mark.parametrize(
    "facts",
    [
        '{"format": 1}',
        "[]",
        "{",
        '{"merge": true}',
        '{"format": 1, "versions": {}}',
        '{"format": 1, "versions": {}, "files": 3}',
    ],
)
def test_a_merge_replaces_no_folder_with_another_programs_merge_json(finished, lorakit_run, tmp_path, facts):
    _, run = finished
    output = tmp_path / "out"
    output.mkdir()
    (output / "merge.json").write_text(facts)
    before = content(output)
    code, _, err = lorakit_run("merge", run.folder, "-o", output, "--overwrite")
    assert code == 2 and "lorakit did not write it" in " ".join(err.split())
    assert content(output) == before


def test_a_merge_replaces_no_folder_with_files_of_the_users(finished, lorakit_run, tmp_path):
    _, run = finished
    output = tmp_path / "out"
    assert lorakit_run("merge", run.folder, "-o", output, "--quiet")[0] == 0
    (output / "thesis.txt").write_text("years")
    code, _, err = lorakit_run("merge", run.folder, "-o", output, "--overwrite")
    assert code == 2 and "thesis.txt" in err and (output / "thesis.txt").read_text() == "years"


def test_a_merge_does_not_replace_the_template_that_it_is_made_with(finished, lorakit_run, tmp_path):
    path, run = finished
    output = tmp_path / "out"
    assert lorakit_run("merge", run.folder, "-o", output, "--quiet")[0] == 0
    template = output / "chat_template.jinja"
    path.write_text(path.read_text().replace("model:\n", f"model:\n  chat_template: {template}\n"))
    second, _ = run_recipe(path, tmp_path / "second")
    code, _, err = lorakit_run("merge", second.folder, "-o", output, "--overwrite")
    assert code == 2 and template.exists() and "would overwrite an input" in err


def test_a_merged_model_that_is_missing_is_all_that_resuming_makes(finished, lorakit_run):
    path, run = finished
    before = content(run.adapter)
    assert lorakit_run("train", path, "-o", run.folder, "--resume")[0] == 2
    flags = ["--set", "output.merged=true", "--resume", "--json"]
    code, out, _ = lorakit_run("train", path, "-o", run.folder, *flags)
    facts = json.loads(out)
    assert code == 0 and facts["merged"] == str(run.merged) and facts["steps"] == 1
    assert content(run.adapter) == before and Run(run.folder).merged.is_dir()
