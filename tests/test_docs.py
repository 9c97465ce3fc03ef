"""The documents state what is: their commands, recipes, links and snippets are those of this code."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from recipe_files import write

from lorakit.cli import app
from lorakit.data.formats import detect, parse_record
from lorakit.recipe.load import RecipeErrors, load
from lorakit.recipe.schema import Recipe
from lorakit.recipe.schema_introspection import keys
from lorakit.registry import ADAPTERS, FORMATS, METRICS, QUANTIZERS
from lorakit.run_dir import Run

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/*.md"), *ROOT.glob("recipes/**/README.md")]
LAUNCHERS = ("torchrun", "accelerate", "srun")
PROGRAM = typer.main.get_command(app)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, *languages: str) -> list[str]:
    """The fenced blocks of these languages."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [body for language, body in fences if language in languages]


def command_lines(text: str) -> list[list[str]]:
    """Every command of a page: the lines of bash blocks, what follows `$` in console blocks, and `lorakit ...`."""
    lines = [line for block in blocks(text, "bash", "sh") for line in block.splitlines()]
    lines += [line[2:] for block in blocks(text, "console") for line in block.splitlines() if line.startswith("$ ")]
    words = [shlex.split(line, comments=True) for line in lines]
    words += [shlex.split(span) for span in re.findall(r"`(lorakit [^`\n]+)`", text)]
    return [line for line in words if line]


def commands_of(program: str) -> list[list[str]]:
    """What follows the name of a program, wherever a document says it."""
    lines = [line for path in PAGES for line in command_lines(path.read_text(encoding="utf-8"))]
    started = [line[line.index(program) :] for line in lines if line[0] in LAUNCHERS and program in line]
    return [line[1:] for line in [*lines, *started] if line[0].rpartition("/")[2] == program]


def test_every_lorakit_command_of_the_documents_is_one():
    found = commands_of("lorakit")
    assert {line[0] for line in found} >= set(PROGRAM.commands)
    for name, *arguments in found:
        if name.startswith("-"):
            assert name in {"--help", *(option for parameter in PROGRAM.params for option in parameter.opts)}
        else:
            assert name in PROGRAM.commands, f"no such command: lorakit {name}"
            command = PROGRAM.commands[name]
            if arguments and hasattr(command, "commands"):
                command = command.commands[arguments.pop(0)]
            if arguments:
                context = command.make_context(name, arguments)  # raises for what it does not take
                for override in context.params.get("overrides", []):
                    assert override.partition("=")[0] in keys(Recipe), override


def test_a_command_that_is_none_would_be_found():
    assert command_lines("```bash\nlorakit train x.yaml --resum\n```") == [["lorakit", "train", "x.yaml", "--resum"]]
    with pytest.raises(Exception, match="resum"):
        PROGRAM.commands["train"].make_context("train", ["x.yaml", "--resum"])


def test_every_make_target_of_the_documents_exists():
    targets = set(re.findall(r"^([a-z-]+):", page("Makefile"), re.MULTILINE))
    named = {line[0] for line in commands_of("make")}
    assert {"demo", "test"} <= named <= targets


def test_the_table_of_commands_is_whole():
    table = re.findall(r"^\| `lorakit (\w+)", page("README.md"), re.MULTILINE)
    assert sorted(table) == sorted(PROGRAM.commands)


def test_every_file_of_a_runs_folder_is_in_the_guide():
    files = {path.name for path in Run(Path("run")).results()}
    table = re.findall(r"^\| `([\w.]+)/?` \|", page("docs/guide.md"), re.MULTILINE)
    assert files == set(table)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith("#"):
            assert (path.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("path", [*ROOT.glob("recipes/**/*.yaml")], ids=name_of)
def test_every_shipped_recipe_is_valid(path):
    load(path)


def recipe_block(first_line: str) -> str:
    (block,) = [block for block in blocks(page("docs/guide.md"), "yaml") if block.startswith(first_line)]
    return block


def test_the_recipe_of_the_guide_is_valid_and_names_what_the_tables_hold(tmp_path):
    block = recipe_block("# yaml-language-server")
    (tmp_path / "data").mkdir()
    for name in ("train.jsonl", "refusals.csv"):
        (tmp_path / "data" / name).touch()
    recipe = load(write(tmp_path, block)).recipe
    assert recipe.name == "support-answers"
    for table in (FORMATS, ADAPTERS, QUANTIZERS, METRICS):
        assert all(word in block for word in table.names())


def test_the_errors_of_the_guide_are_those_of_its_bad_recipe(tmp_path, monkeypatch):
    path = write(tmp_path, recipe_block("# bad.yaml"), "bad.yaml")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeErrors) as caught:
        load(path)
    (shown,) = [
        block for block in blocks(page("docs/guide.md"), "console") if block.startswith("$ lorakit check bad.yaml")
    ]
    assert shown.partition("\n")[2].strip() == str(caught.value)


def test_the_run_that_the_readme_trains_is_the_one_that_it_scores_and_merges(tmp_path):
    text = page("README.md").partition("## Your own data")[2].partition("\n## ")[0]
    (block,) = blocks(text, "yaml")
    (tmp_path / "train.jsonl").touch()
    folder = load(write(tmp_path, block, "recipe.yaml")).recipe.output.dir
    runs = [word for line in command_lines(text) for word in line if word.startswith("runs/")]
    assert runs and {str(folder)} == set(runs)


def test_the_rows_of_the_readme_are_of_one_format_each():
    (block,) = blocks(page("README.md"), "json")
    rows = [json.loads(line) for line in block.splitlines()]
    formats = [detect([row], "README.md")[0] for row in rows]
    assert len(set(formats)) == len(rows)
    for name, row in zip(formats, rows, strict=True):
        assert parse_record(name, None, row).messages[-1]["role"] == "assistant"


def test_the_table_of_layers_is_the_contract():
    contracts = tomllib.loads(page("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    layers = [layer.split(" | ") for contract in contracts for layer in contract.get("layers", [])]
    table = page("docs/architecture.md").partition("| may import everything below |")[2].partition("\n\n")[0]
    rows = [re.findall(r"`(lorakit\.\w+)`", line.split("|")[1]) for line in table.splitlines() if "`lorakit." in line]
    assert rows == layers


ENTRIES = {
    "A format": "data.format={}",
    "An adapter kind": "adapter.kind={}",
    "A metric": "evaluate.metrics=[{}]",
    "An export target": "output.export=[{}]",
}


@pytest.mark.slow
def test_the_entries_of_contributing_work(tmp_path):
    """In a process of its own, which imports the entries as it would import those of another package."""
    path = write(tmp_path, "model: {base: org/model}\ndata: {train: train.jsonl}\n")
    plugins = []
    for number, (title, key) in enumerate(ENTRIES.items()):
        section = page("CONTRIBUTING.md").partition(f"\n### {title}\n")[2].partition("\n### ")[0]
        entry, check = blocks(section, "python")
        word = re.search(r'register\("([a-z-]+)"', entry)[1]
        check += "\n\ndef test_a_recipe_takes_the_word():\n    from lorakit.recipe.load import Path, load\n\n"
        check += f"    assert load(Path({str(path)!r}), [{key.format(word)!r}])\n"
        (tmp_path / f"entry_{number}.py").write_text(entry)
        (tmp_path / f"test_entry_{number}.py").write_text(check)
        plugins += ["-p", f"entry_{number}"]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, "-p", "conftest", str(tmp_path)]
    folders = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": folders}, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("." * 2 * len(ENTRIES)), done.stdout + done.stderr
