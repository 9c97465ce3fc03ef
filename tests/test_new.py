"""`lorakit new`: a folder that can be checked and trained at once, from nothing, from rows, or from the gallery."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import rows_of, write_rows

from lorakit.errors import UserError
from lorakit.recipe.load import load
from lorakit.recipe.schema import Data, Model, Recipe
from lorakit.share import new
from lorakit.share.row_shape import held_out_share, look_at_rows

ROOT = Path(__file__).parent.parent


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(folder: Path) -> dict:
    return yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))


def test_a_new_folder_has_a_recipe_rows_a_readme_and_the_schema(here, command):
    code, out, err = command("new", "tasks/answers")
    assert code == 0, err
    folder = here / "tasks/answers"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {"recipe.yaml", "README.md", "data/train.jsonl", "recipe.schema.json"}
    recipe = load(folder / "recipe.yaml").recipe
    assert (recipe.name, recipe.model.base) == ("answers", new.default_base())
    assert new.default_base() in out and "lorakit check tasks/answers/recipe.yaml" in out
    assert command("check", "tasks/answers/recipe.yaml")[0] == 0


def test_the_comments_are_the_schemas_own_words(here):
    new.start_recipe(Path("a"), None, None)
    text = (here / "a/recipe.yaml").read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    said = " ".join(re.sub(r"^\s*# ?", "", text, flags=re.MULTILINE).split())
    for section, key in [(Recipe, "name"), (Model, "base"), (Data, "eval"), (Data, "max_length")]:
        assert " ".join(section.model_fields[key].description.split()) in said


def test_the_readme_has_the_commands_to_type(here):
    new.start_recipe(Path("a"), None, None)
    page = (here / "a/README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^(lorakit .*?)(?:  #.*)?$", page, re.MULTILINE)
    wanted = ["check recipe.yaml", "data recipe.yaml", "train recipe.yaml", "eval runs/a"]
    assert [line.split(None, 1)[1].strip() for line in lines] == wanted


QUESTIONS = [{"question": f"How far is town {i}?", "answer": f"{i * 7} miles."} for i in range(60)]
TICKETS = [
    {
        "ticket_id": f"T{i}",
        "kb_context": f"Shelf {i}." if i % 3 else None,
        "asked": f"Where is {i}?",
        "final_answer": f"{i}",
    }
    for i in range(60)
]
SHAPES = {
    "messages": (rows_of(60), "auto", {}),
    "question-answer": (QUESTIONS, "auto", {}),
    "other letters": (
        [{"Question": row["question"], "Answer": row["answer"]} for row in QUESTIONS],
        "auto",
        {"question": "Question", "answer": "Answer"},
    ),
    "messages by another name": (
        [{"dialogue": row["messages"], "id": number} for number, row in enumerate(rows_of(60))],
        "auto",
        {"messages": "dialogue"},
    ),
    "alpaca with the rendered text besides": (
        [{"instruction": f"Do {i * i}.", "input": "", "output": f"did {i}", "text": f"### Do {i}"} for i in range(60)],
        "alpaca",
        {},
    ),
    "a text and its class in other letters": (
        [{"Text": f"thing {i * i}", "Category": "ab"[i % 2], "Source": "mail"} for i in range(60)],
        {"template": {"user": "{Text}", "assistant": "{Category}"}},
        {},
    ),
    "own columns": (
        TICKETS,
        {
            "template": {
                "user": "Kb context: {kb_context}\nAsked: {asked}",
                "assistant": "{final_answer}",
                "missing": {"kb_context": ""},
            }
        },
        {},
    ),
    "an answer that is an object": (
        [{"context": f"c{i * i}", "query": f"q{i}", "final_answer": {"sure": True, "n": i}} for i in range(60)],
        {"template": {"user": "Context: {context}\nQuery: {query}", "assistant": "{final_answer}"}},
        {},
    ),
    "a text before what is asked": (
        [{"body": f"b{i * i}", "ask": f"a{i}"} for i in range(60)],
        {"template": {"user": "{ask}", "assistant": "{body}"}},
        {},
    ),
    "names that no place can hold": (
        [{"What is {it}?": f"thing {i}", "Out:put": f"o{i * i}"} for i in range(60)],
        {"template": {"user": "{What_is_it}", "assistant": "{Out_put}"}},
        {"What_is_it": "What is {it}?", "Out_put": "Out:put"},
    ),
}


@pytest.mark.parametrize(("rows", "row_format", "columns"), SHAPES.values(), ids=SHAPES)
def test_the_rows_say_format_and_columns_and_the_recipe_passes_check_and_data(
    here, command, tiny_base, rows, row_format, columns
):
    write_rows(here / "rows.jsonl", rows)
    code, out, err = command("new", "task", "--data", "rows.jsonl", "--base", tiny_base, "--json")
    assert code == 0, err
    data = written(here / "task")["data"]
    assert data["train"] == "../rows.jsonl" and data["eval"] == 0.2
    assert data["format"] == row_format and data.get("columns", {}) == columns
    shape = json.loads(out)["data"]
    assert shape["rows"] == 60 and shape["exact"]
    notes = " ".join(shape["notes"])
    assert ("guess" in notes) == (row_format != "auto")
    assert command("check", "task/recipe.yaml")[0] == 0
    code, out, err = command("data", "task/recipe.yaml", "--json")
    assert code == 0, err


def test_a_guess_is_called_one_in_the_recipe_too(here):
    write_rows(here / "rows.jsonl", TICKETS)
    made = new.start_recipe(Path("task"), None, Path("rows.jsonl"))
    text = " ".join(re.sub(r"^\s*# ?", "", (here / "task/recipe.yaml").read_text(), flags=re.MULTILINE).split())
    assert "data.format is a guess" in text and "'final_answer' answers" in text
    assert made.shape and "ticket_id" in made.shape.why


def test_rows_that_cannot_be_trained_on_are_counted_and_left_out(here, command, tiny_base):
    rows = [{**row, "answer": None} if number % 6 == 0 else row for number, row in enumerate(QUESTIONS)]
    write_rows(here / "rows.jsonl", rows)
    made = new.start_recipe(Path("task"), str(tiny_base), Path("rows.jsonl"))
    assert written(here / "task")["data"]["broken"] == "drop"
    assert any("10 of 60 rows" in note and "rows.jsonl:1" in note for note in made.notes)
    assert command("data", "task/recipe.yaml")[0] == 0


def test_copies_of_one_row_are_not_held_out(here, command, tiny_base):
    write_rows(here / "rows.jsonl", [{"prompt": "one", "completion": "row"}] * 60)
    made = new.start_recipe(Path("task"), str(tiny_base), Path("rows.jsonl"))
    assert written(here / "task")["data"]["eval"] is None and "1 of 60" in " ".join(made.notes)
    assert command("data", "task/recipe.yaml")[0] == 0


def test_csv_rows_and_documents_are_looked_at_too(here):
    with (here / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["instruction", "output"], *([f"do {i}", f"done {i}"] for i in range(40))])
    assert look_at_rows(here / "rows.csv").why.startswith("alpaca: ")
    write_rows(here / "texts.jsonl", [{"text": f"A long text, number {i}."} for i in range(200)])
    new.start_recipe(Path("texts"), None, Path("texts.jsonl"))
    assert written(here / "texts")["evaluate"]["metrics"] == []


def test_answers_that_call_tools_are_scored_as_calls(here):
    call = {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": {"city": "Rome"}}]}
    rows = [{"messages": [{"role": "user", "content": f"Rome, {i}?"}, call]} for i in range(40)]
    write_rows(here / "calls.jsonl", rows)
    new.start_recipe(Path("calls"), None, Path("calls.jsonl"))
    assert written(here / "calls")["evaluate"]["metrics"] == ["tool-calls"]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"prompt": "q", "chosen": "a", "rejected": "b"}] * 3, "preference pairs"),
        ([{"query": "q", "response_a": "a", "response_b": "b", "winner": "a"}] * 3, "pairs of answers"),
        ([{"body": "one column"}] * 3, "no format fits the columns (body)"),
        ([{"question": "q", "answer": 3}] * 3, "none of 3 rows can be trained on"),
        ([], "no rows"),
    ],
)
def test_rows_that_no_recipe_fits_are_refused_and_no_folder_appears(here, command, rows, words):
    write_rows(here / "rows.jsonl", rows)
    code, _, err = command("new", "task", "--data", "rows.jsonl")
    assert code == 2 and words in err and "Traceback" not in err
    assert [path.name for path in here.iterdir()] == ["rows.jsonl"]


def test_the_share_that_is_held_out_goes_by_the_number_of_rows():
    assert [held_out_share(rows) for rows in (5, 50, 1000, 10_000, 10_000_000)] == [None, 0.2, 0.1, 0.05, 0.01]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["my task"], "Write for example my-task."),
        (["."], "does not end in a name"),
        (["new/../full"], "is not empty"),
        (["full"], "is not empty"),
        (["file.txt"], "is not a folder"),
        (["file.txt/task"], "cannot hold the new folder"),
        ([], "NAME is missing"),
        (["a", "--from", "debian-jsno"], "Did you mean debian-json?"),
        (["a", "--from", "debian-json", "--data", "file.txt"], "Leave one of them out"),
        (["a", "--data", "fill.txt"], "Did you mean file.txt?"),
        (["a", "--base", "./nowhere"], "--base: './nowhere' does not exist"),
        (["a", "--base", "./ful"], "Did you mean full?"),
        (["a", "--base", "./full"], "--base: "),
        (["a", "--base", "a b"], "neither a path that exists nor a hub id"),
        (["a", "--base", " "], "--base: is empty"),
        (["a", "--list"], "--list: "),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_touched(here, command, arguments, words):
    (here / "full").mkdir()
    (here / "full/mine").write_text("mine")
    (here / "file.txt").write_text("mine")
    code, out, err = command("new", *arguments)
    assert (code, out) == (2, "") and words in err and "draft" not in err, err
    assert sorted(path.name for path in here.rglob("*")) == ["file.txt", "full", "mine"]


def test_a_folder_that_fills_meanwhile_is_not_replaced(here):
    (here / "task").mkdir()
    with pytest.raises(UserError, match="is not empty"), new._new_folder(Path("task")) as draft:
        (draft / "ours").write_text("ours")
        (here / "task/theirs").write_text("theirs")
    assert [path.name for path in here.rglob("*")] == ["task", "theirs"]


def test_without_rows_to_look_at_no_torch_is_loaded(here):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\n"
        "from lorakit.share.new import start_from_gallery, start_recipe\n"
        "start_recipe(Path('a'), None, None)\n"
        "start_from_gallery(Path('b'), 'debian-json', None)\n"
        "assert not {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=here)
    assert done.returncode == 0, done.stderr


def test_the_rows_that_show_the_form_can_be_trained_on_and_held_out(here, command, tiny_base):
    new.start_recipe(Path("a"), str(tiny_base), None)
    code, out, err = command("data", "a/recipe.yaml", "--json")
    assert code == 0, err
    assert (json.loads(out)["train"]["kept"], json.loads(out)["held_out"]["kept"]) == (16, 4)
