"""Promises of `lorakit runs`: what is on disk is told, what is broken is named, and nothing heavy is loaded."""

import fcntl
import json
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from eval_runs import edit_json, evaluate, make_run
from runs_of_tests import run_recipe
from test_training import interrupted_after

from lorakit.atomic_io import LOCK
from lorakit.cli.runs import _first_to_go
from lorakit.errors import LorakitError
from lorakit.prepare import reopen_run
from lorakit.progress import Silent
from lorakit.run_dir import Run
from lorakit.share.runs import find_runs, short_data, sort_runs


@pytest.fixture(scope="module")
def scored_run(tmp_path_factory, tiny_base):
    """A finished run that was scored."""
    run = make_run(tmp_path_factory.mktemp("first"), tiny_base)
    evaluate(*reopen_run(run.folder, Silent()), Silent())
    return run


@pytest.fixture
def copied(scored_run, tmp_path, monkeypatch):
    """Copy the run to a place below `runs`, with changes of its manifest; the test runs beside."""
    monkeypatch.chdir(tmp_path)

    def copy(name, **changes):
        folder = tmp_path / "runs" / name
        shutil.copytree(scored_run.folder, folder)
        edit_json(folder / "manifest.json", **changes)
        return Run(folder)

    return copy


def summary(root):
    (one,), notes = find_runs(root)
    assert not notes
    return one


def test_a_run_is_told_as_its_files_say(copied):
    run = copied("first")
    manifest = run.read_manifest()
    scores = json.loads(run.list_evaluations()[0].read_text())
    one = summary(run.folder.parent)
    assert (one.folder, one.state, one.recipe) == (run.folder, "finished", "tiny")
    assert (one.base, one.rows) == (manifest["base"]["name"], 22)
    assert [Path(path).name for path in one.data] == ["train.jsonl"] and short_data(one) == "train.jsonl (22)"
    assert (one.steps_done, one.steps_planned) == (6, 6)
    assert one.best_loss == one.last_loss == manifest["result"]["eval_loss"] and one.best_step == 6
    assert one.metric == "exact-match"
    assert one.score == scores["models"]["adapter"]["scores"]["exact-match"]["value"]
    assert one.verdict == scores["comparisons"][0]["scores"]["exact-match"]["verdict"]
    assert (one.started, one.finished) == (manifest["started"], manifest["finished"])


def test_the_newest_scoring_of_this_run_counts(copied):
    run = copied("first")
    newest = json.loads(run.list_evaluations()[0].read_text())
    newest["settings"]["metrics"] = ["json-valid"]
    (run.evaluations / "29990101T000000.json").write_text(json.dumps(newest))
    (run.evaluations / "29990101T000000-2.json").write_text(json.dumps(newest | {"models": {}}))
    (run.evaluations / "tasks-29990102T000000.json").write_text(json.dumps(newest | {"models": {}}))
    assert summary(run.folder).metric == "json-valid"
    (run.evaluations / "29990101T000000-10.json").write_text("{")
    one = summary(run.folder)
    assert one.metric == "json-valid" and "29990101T000000-10.json" in one.notes[0]
    edit_json(run.manifest, adapter_sha256="0" * 64)
    assert summary(run.folder).metric is None


def test_an_interrupted_a_failed_and_a_killed_run_say_so(recipe_file, tmp_path, monkeypatch):
    path = recipe_file(train={"epochs": ..., "steps": 4, "eval_every": 4, "save_every": 1})
    with monkeypatch.context() as patch:
        interrupted_after(2, patch)
        with pytest.raises(LorakitError, match="stopped after step 2"):
            run_recipe(path, tmp_path / "runs" / "stopped")
    one = summary(tmp_path / "runs")
    assert (one.state, one.steps_done, one.steps_planned, one.best_loss) == ("interrupted", 2, 4, None)
    run, _ = run_recipe(path, tmp_path / "runs" / "stopped", resume=True)
    assert summary(tmp_path / "runs").state == "finished"

    monkeypatch.setattr("lorakit.train.run._outcome", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_recipe(path, tmp_path / "runs" / "failed")
    one = summary(tmp_path / "runs" / "failed")
    assert (one.state, one.reason, one.steps_done) == ("failed", "division by zero", 4)
    edit_json(run.manifest, status="running")
    assert summary(run.folder).state == "interrupted"
    with training(run):
        assert summary(run.folder).state == "running"


@contextmanager
def training(run):
    """The lock of the run's folder, as a training has it."""
    with (run.folder / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    (run.folder / LOCK).unlink()


def test_broken_runs_are_listed_with_the_reason_and_other_folders_are_not(copied, tmp_path, command):
    names = ("cut", "gone", "empty", "other", "weird", "lost")
    cut, gone, empty, other, weird, lost = (copied(f"deep/{name}") for name in names)
    cut.manifest.write_text(cut.manifest.read_text()[:200])
    gone.manifest.unlink()
    empty.manifest.write_text("")
    other.manifest.write_text('{"name": "a web page"}')
    edit_json(weird.manifest, steps="many", data={"files": {}, "train": []}, result=[], started=5)
    weird.log.write_text('{"step": 3, "loss": 1.0}\n[1]\n{"eval_loss": "x", "step": 4}\n{"step": 5, "eval_l')
    shutil.rmtree(lost.adapter)
    page = tmp_path / "runs" / "page"
    page.mkdir()
    (page / "manifest.json").write_text('{"name": "a web page"}')
    (tmp_path / "runs" / "recipes").mkdir()
    shutil.copy(lost.recipe, tmp_path / "runs" / "recipes" / "recipe.yaml")
    (tmp_path / "runs" / "linked").symlink_to(cut.folder)
    states = {one.folder.name: (one.state, one.reason) for one in find_runs(tmp_path / "runs")[0]}
    assert states.keys() == set(names)
    assert all(state == "broken" for name, (state, _) in states.items() if name != "weird")
    assert states["gone"][1] == "it has no manifest.json" and "damaged" in states["cut"][1]
    assert states["lost"][1] == "its adapter/ is gone"
    code, out, err = command("runs")
    assert code == 0 and "Traceback" not in err
    assert "runs/deep/gone: broken: it has no manifest.json" in out and "6 runs" in out
    assert command("runs", "--json")[0] == 0


def test_runs_are_sorted_and_a_wrong_key_is_named(copied, command):
    for number, name in enumerate("cab"):
        run = copied(name, started=f"2026-0{number + 1}-01T00:00:00+00:00", finished=None)
        log = run.log.read_text().splitlines()
        loss = {"step": 6, "eval_loss": 3 - number}
        run.log.write_text("\n".join([*log[:-1], json.dumps(loss)]))
    runs, _ = find_runs(run.folder.parent)
    assert [one.folder.name for one in sort_runs(runs, "date")] == ["b", "a", "c"]
    assert [one.folder.name for one in sort_runs(runs, "name")] == ["a", "b", "c"]
    assert [one.folder.name for one in sort_runs(runs, "loss")] == ["b", "a", "c"]
    for key in ("recipe", "base", "data", "steps", "metric", "verdict", "state"):
        assert len(sort_runs(runs, key)) == 3
    code, out, _ = command("runs", "--sort", "loss", "--json")
    assert code == 0 and [one["best_loss"] for one in json.loads(out)["runs"]] == [1, 2, 3]
    code, _, err = command("runs", "--sort", "los")
    assert code == 2 and "'los' is not something that runs are sorted by. Did you mean loss?" in err


def test_no_runs_is_a_sentence_and_a_wrong_folder_an_error(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    code, out, _ = command("runs")
    assert code == 0 and out.startswith("no runs in runs. lorakit train RECIPE makes one")
    (tmp_path / "runs").mkdir()
    assert command("runs", "runs")[0] == 0
    assert json.loads(command("runs", "--json")[1]) == {"folder": "runs", "sort": "date", "runs": []}
    code, _, err = command("runs", "rusn")
    assert code == 2 and "rusn: there is no such folder. Did you mean runs?" in err
    (tmp_path / "file").touch()
    assert "is a file, not a folder of runs" in command("runs", "file")[2]


def test_a_hundred_runs_are_read_in_a_second_and_two_recipes_compared_without_torch(copied, scored_run, tmp_path):
    run = copied("0")
    shutil.rmtree(run.checkpoints)
    for number in range(1, 100):
        shutil.copytree(run.folder, tmp_path / "runs" / str(number), ignore=shutil.ignore_patterns("*.safetensors"))
    start = time.process_time()
    assert len(find_runs(tmp_path / "runs")[0]) == 100
    assert time.process_time() - start < 1
    recipe = str(scored_run.folder.parent / "tiny.yaml")
    code = (
        "import sys\n"
        "from lorakit.cli import main\n"
        "def run(*arguments):\n"
        "    sys.argv = ['lorakit', *arguments]\n"
        "    try: main()\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        "run('runs')\n"
        "assert not {'torch', 'transformers', 'peft', 'datasets', 'numpy', 'scipy'} & set(sys.modules)\n"
        f"run('diff', {recipe!r}, {recipe!r})\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "100 runs" in done.stdout and "recipe: the same" in done.stdout, done.stderr


def test_a_narrow_terminal_goes_without_columns_and_names_them(copied, command, monkeypatch):
    copied("first")
    whole = command("runs")[1]
    monkeypatch.setattr("lorakit.cli.runs.sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "50")
    gone = _first_to_go({"run": ["runs/first"], "recipe": ["x" * 30], "state": ["finished"], "base": ["x" * 30]})
    assert gone == ["recipe", "base"] and "too narrow" not in whole


def test_runs_of_the_first_version_are_read():
    states = {one.folder.name: one for one in find_runs(Path(__file__).parent / "run_folders_of_0_1_0")[0]}
    assert (states["finished"].state, states["interrupted"].state) == ("finished", "interrupted")
    assert states["finished"].metric == "exact-match" and states["finished"].verdict == "cannot tell"
