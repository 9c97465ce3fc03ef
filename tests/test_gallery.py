"""The gallery: every folder of `recipes/` is a task that is valid, copied, trained, and better than its base."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from gallery_sources import SOURCES
from runs_of_tests import losses

from lorakit.recipe.load import load
from lorakit.run_dir import Run
from lorakit.share.gallery import files_of_task, first_sentence, gallery_folder, task_names

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
TASKS = task_names()


def longest_row(task: str) -> int:
    return load(RECIPES / task / "recipe.yaml").recipe.data.max_length


def readme(task: str) -> str:
    return (RECIPES / task / "README.md").read_text(encoding="utf-8")


def main_metric(task: str) -> str:
    """The first of the recipe's metrics, as a report names it; the loss where nothing is generated."""
    metrics = load(RECIPES / task / "recipe.yaml").recipe.evaluate.metrics
    first = metrics[0] if metrics else "loss"
    return first if isinstance(first, str) else str(next(iter(first.model_dump(exclude_none=True))))


def test_the_gallery_is_that_of_the_checkout():
    assert gallery_folder() == RECIPES and {path.parent.name for path in RECIPES.glob("*/README.md")} == set(TASKS)


@pytest.mark.smollm2
@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_valid_fits_a_small_machine_and_loses_no_row(users_cache, command, task):
    recipe = RECIPES / task / "recipe.yaml"
    code, _, err = command("check", recipe)
    assert code == 0, err
    code, out, err = command("plan", recipe, "--gpu", "6GB", "--json")
    assert code == 0 and json.loads(out)["fits"] == "yes", err
    code, out, err = command("data", recipe, "--json")
    assert code == 0, err
    for side in (json.loads(out)["train"], json.loads(out)["held_out"]):
        assert side["kept"] == side["read"] > 0


@pytest.mark.parametrize("task", TASKS)
def test_every_task_can_be_copied_and_checked(tmp_path, monkeypatch, command, tiny_base, task):
    monkeypatch.chdir(tmp_path)
    code, out, err = command("new", "mine", "--from", task, "--base", tiny_base, "--json")
    assert code == 0, err
    source, facts = gallery_folder() / task, json.loads(out)
    assert facts["from"] == task and {"recipe.yaml", "README.md"} < set(facts["files"])
    assert not any(name.endswith(".py") for name in facts["files"])
    original, copy = load(source / "recipe.yaml").recipe, load(tmp_path / "mine/recipe.yaml").recipe
    assert copy.name == "mine" and copy.model.base == str(tiny_base)
    assert (copy.train, copy.adapter, copy.evaluate) == (original.train, original.adapter, original.evaluate)
    rows = [path for path in files_of_task(source)[1] if path.suffix == ".jsonl"]
    assert rows and all(
        (tmp_path / "mine" / path.relative_to(source)).read_bytes() == path.read_bytes() for path in rows
    )
    page = (tmp_path / "mine/README.md").read_text(encoding="utf-8")
    assert f"runs/{task}" not in page and "](../" not in page
    code, _, err = command("check", "mine/recipe.yaml")
    assert code == 0, err


def test_the_gallery_is_listed_with_what_it_holds(command):
    code, out, _ = command("new", "--list", "--json")
    tasks = {task["name"]: task for task in json.loads(out)["tasks"]}
    assert code == 0 and list(tasks) == TASKS
    assert (tasks["debian-json"]["train_rows"], tasks["debian-json"]["eval_rows"]) == (2433, 258)
    assert all(task["summary"].endswith(".") and task["base"] for task in tasks.values())
    shown = command("new", "--list")[1]
    assert all(task["summary"] in shown for task in tasks.values())
    assert first_sentence("# Title\n\nOne of 1.5 kinds.\nTwo.\n\nThree.") == "One of 1.5 kinds."


def test_the_wheel_has_the_gallery_where_it_is_looked_for():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert build["force-include"][gallery_folder().name] == "lorakit/gallery"


@pytest.mark.parametrize("task", TASKS)
def test_every_readme_names_its_licence_its_commands_and_the_scores_to_expect(task):
    page = readme(task)
    assert re.search(r"\blicen[cs]e", page)
    _, _, scores = page.partition("\n## Scores to expect\n")
    assert f"lorakit train recipes/{task}/recipe.yaml\nlorakit eval runs/{task}\n" in scores
    header, line = re.search(r"^\|.*\bbase\b.*\badapter\b.*\|$", scores, re.MULTILINE), main_metric(task)
    assert header and re.search(rf"^\|.*\b{re.escape(line)}\b.*\d.*\|$", scores[header.end() :], re.MULTILINE)


def test_the_page_of_the_gallery_has_a_line_for_every_task():
    page = (RECIPES / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| \[([\w-]+)\]\(\1/README\.md\) \|", page, re.MULTILINE)) == TASKS


@pytest.mark.parametrize("task", TASKS)
def test_the_same_source_builds_the_same_rows_and_no_row_is_on_both_sides(tmp_path, task):
    arguments, built = SOURCES[task](tmp_path), []
    for seed in ("1", "2"):
        command = [sys.executable, str(RECIPES / task / "build.py"), *arguments, "--out", str(tmp_path / seed)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONHASHSEED": seed}
        )
        assert done.returncode == 0, done.stderr
        built.append({path.name: path.read_bytes() for path in (tmp_path / seed).iterdir()})
    assert built[0] == built[1] and built[0].keys() == {"train.jsonl", "eval.jsonl"}
    train, held_out = ({*built[0][f"{side}.jsonl"].splitlines()} for side in ("train", "eval"))
    assert train and held_out and not train & held_out


@pytest.mark.parametrize("task", TASKS)
def test_a_builder_without_its_source_says_what_to_give(tmp_path, task):
    arguments = SOURCES[task](tmp_path)
    Path(arguments[1]).write_text("nothing\n", encoding="utf-8")
    command = [sys.executable, str(RECIPES / task / "build.py"), *arguments, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("build.py: ") and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.smollm2
@pytest.mark.parametrize("task", sorted(TASKS, key=longest_row)[:2])
def test_the_tasks_of_the_shortest_rows_learn_in_their_first_steps(users_cache, tmp_path, monkeypatch, command, task):
    monkeypatch.chdir(tmp_path)
    shorter = [f"--set=train.{key}" for key in ("steps=4", "warmup=0", "save_every=4", "batch_size=2")]
    # The same two rows in each step: others may be harder by more than four steps gain.
    few = (RECIPES / task / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:2]
    (tmp_path / "few.jsonl").write_text("".join(few), encoding="utf-8")
    rows = [f"--set=data.train={tmp_path / 'few.jsonl'}", "--set=data.eval=null"]
    code, _, err = command("train", RECIPES / task / "recipe.yaml", "--output", "run", *rows, *shorter)
    assert code == 0, err
    first, *_, last = losses(Run(tmp_path / "run"))
    assert last < first


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.parametrize("task", TASKS)
def test_every_task_trained_is_better_than_its_base(users_cache, tmp_path, monkeypatch, command, task):
    monkeypatch.chdir(tmp_path)
    code, _, err = command("train", RECIPES / task / "recipe.yaml")
    assert code == 0, err
    code, out, err = command("eval", f"runs/{task}", "--json")
    assert code == 0, err
    verdicts = [one["scores"][main_metric(task)]["verdict"] for one in json.loads(out)["comparisons"]]
    assert verdicts == ["better"]
