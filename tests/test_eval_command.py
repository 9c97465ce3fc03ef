"""Promises of the command `lorakit eval`: what it prints, where, and its exit codes."""

import json
import sys
from pathlib import Path

import pytest
from conftest import rows_of, write_rows
from eval_runs import make_run
from rating_sheets import data_of, rated_file

from lorakit.cli import main
from lorakit.errors import UserError
from lorakit.evaluate.rating.sheet import Sheet
from lorakit.evaluate.report import FORMAT


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_base):
    return make_run(tmp_path_factory.mktemp("command"), tiny_base)


@pytest.fixture
def lorakit_eval(capsys, monkeypatch):
    """Run `lorakit eval` in process: exit code, standard output, standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["lorakit", "eval", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return call


def test_one_table_of_models_and_one_of_differences_with_verdicts(run, lorakit_eval):
    code, out, _ = lorakit_eval(run.folder)
    assert code == 0
    for word in (
        "tiny: 10 rows: the held-out rows of",
        "adapter against base",
        "95 % interval",
        "exact-match",
        "better",
    ):
        assert word in out, word
    assert "every answer: " in out
    path = out.rsplit("every answer: ", 1)[1].strip()
    assert json.loads(Path(path).read_text().splitlines()[0])["answers"].keys() == {"base", "adapter"}


def test_json_is_one_versioned_document_that_is_also_the_file(run, lorakit_eval):
    code, out, _ = lorakit_eval(run.folder, "--json", "--rows", 4, "--metrics", "contains,length-ratio", "--seed", 3)
    facts = json.loads(out)
    assert code == 0 and facts["format"] == FORMAT == 2
    assert facts["rows"]["count"] == 4 and facts["rows"]["available"] == 10
    assert facts["settings"] == {
        "metrics": ["contains", "length-ratio"],
        "turns": "last",
        "decoding": "greedy",
        "max_new_tokens": 8,
        "seed": 3,
    }
    assert facts["models"]["adapter"]["scores"].keys() >= {"loss", "perplexity", "contains", "length-ratio"}
    kept = json.loads(Path(facts["file"]).read_text())
    assert {key: facts[key] for key in kept if key not in ("taken", "answers")} == {
        key: kept[key] for key in kept if key not in ("taken", "answers")
    }
    lines = [json.loads(line) for line in Path(facts["file"] + "l").read_text().splitlines()]
    assert len(lines) == 4 and set(lines[0]) == {
        *("where", "source", "task", "prompt", "reference", "answers", "cut", "loss", "sums"),
    }


def test_two_evaluations_of_one_second_have_two_files(run, lorakit_eval, tmp_path):
    files = {json.loads(lorakit_eval(run.folder, "--json", "-o", tmp_path / "out")[1])["file"] for _ in range(3)}
    assert len(files) == 3 and len(list((tmp_path / "out").iterdir())) == 6


def test_the_baseline_is_the_base_else_the_first_else_the_named(run, lorakit_eval, tiny_base):
    for arguments, baseline in (
        ([run.folder], "base"),
        ([run.folder, tiny_base], "run"),
        ([run.folder, "--baseline", "adapter"], "adapter"),
        ([run.folder, tiny_base, "--baseline", tiny_base], tiny_base.name),
        ([run.folder, tiny_base, "--baseline", tiny_base.name], tiny_base.name),
    ):
        code, out, _ = lorakit_eval(*arguments, "--json")
        assert code == 0 and json.loads(out)["baseline"] == baseline


def test_fail_under_exits_with_1_and_says_why(run, lorakit_eval):
    good = ["--fail-under", "loss=9.5", "--fail-under", "exact-match=0", "--fail-under", "json-valid=0%"]
    assert lorakit_eval(run.folder, *good)[0] == 0
    code, out, err = lorakit_eval(run.folder, "--fail-under", "loss=0.0001", "--json")
    assert code == 1 and "adapter: loss is" in err and "above 0.0001" in err and "base:" not in err
    assert json.loads(out)["failed"][0].startswith("adapter: loss is")
    code, _, err = lorakit_eval(run.folder, "--fail-under", "exact-match=100%")
    assert code == 1 and "under 100.0%" in err


def test_without_a_run_nothing_is_kept_unless_it_is_said_where(tiny_base, lorakit_eval, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", rows_of(6))
    code, out, _ = lorakit_eval(tiny_base, "--data", rows)
    assert code == 0 and "not stored" in out and "exact-match" in out
    code, out, _ = lorakit_eval(
        tiny_base, "--data", rows, "--output", tmp_path / "out", "--json", "--max-new-tokens", 3
    )
    assert code == 0 and json.loads(out)["file"].startswith(str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "no model is named"),
        (["nowhere/run"], "nowhere/run"),
        (["FILE"], "is not a run, an adapter or a model: a file. Give the folder"),
        (["EMPTY"], "is not a run, an adapter or a model"),
        (["BASE"], "--data FILE"),
        (["RUN", "--data", "nowhere.jsonl"], "--data: nowhere.jsonl: there is no such file"),
        (["RUN", "--metrics", "exact-mach"], "Did you mean exact-match?"),
        (["RUN", "--metrics", "exact-match,exact-match"], "exact-match is there twice"),
        (["RUN", "--metrics", "regex"], "regex needs settings (pattern)"),
        (["RUN", "--metrics", ""], "'' is not a metric"),
        (["RUN", "--baseline", "other"], "--baseline: other: not one of the models"),
        (["RUN", "--fail-under", "exact-match"], "'exact-match' is not a score with its value"),
        (["RUN", "--fail-under", "exact-match=high"], "is not a score with its value"),
        (["RUN", "--fail-under", "bleu=3"], "'bleu' is not measured"),
        (["RUN", "--fail-under", "json-valid.x=3"], "'json-valid.x' is not measured here"),
        (["RUN", "--rows", "0"], "--rows"),
        (["RUN", "--output", "FILE"], "a.txt is a file. Give --output DIR, a folder"),
        (["rate", "sheet", "RUN", "--output", "sheets/a"], "--questions"),
        (["rate", "sheet", "RUN", "--questions", "FILE"], "--output"),
        (
            ["rate", "sheet", "RUN", "-o", "sheets/a", "--questions", "nowhere.txt"],
            "nowhere.txt: there is no such file",
        ),
        (["rate", "sheet", "BASE", "-o", "sheets/a", "--questions", "QUESTIONS"], "compares 2 to 26 models"),
        (["rate", "report", "FILE"], "--key"),
        (["rate", "report", "--key", "FILE"], "FILE"),
        (["rate", "report", "nowhere.json", "--key", "FILE"], "a.txt"),
        (
            ["RUN", "--sheet", "sheets/a", "--questions", "QUESTIONS"],
            "`lorakit eval --sheet` is now `lorakit rate",
        ),
        (["--ratings", "FILE", "--key", "FILE"], "`lorakit eval --ratings` is now `lorakit rate report FILE..."),
        (["RUN", "--tasks", "gsm8k"], "`lorakit eval --tasks` is now `lorakit benchmark RUN --tasks gsm8k,mmlu`."),
    ],
)
def test_wrong_arguments_are_one_clear_line_and_exit_code_2(
    run, tiny_base, lorakit, tmp_path, monkeypatch, arguments, reason
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "questions.txt").write_text("Why?\n")
    known = {"RUN": run.folder, "FILE": "a.txt", "EMPTY": "empty", "BASE": tiny_base, "QUESTIONS": "questions.txt"}
    command = ("eval",) if arguments[:1] != ["rate"] else ()
    code, out, err = lorakit(*command, *(known.get(word, word) for word in arguments), *(["-q"] if arguments else []))
    assert code == 2 and out == ""
    assert reason in " ".join(err.split()), err
    assert "Traceback" not in err and not (tmp_path / "sheets").exists()


def test_a_sheet_is_written_rated_and_reported(run, lorakit, tmp_path):
    questions = tmp_path / "questions.txt"
    questions.write_text("Tell me about apples, number 1.\nTell me about lamps, number 2.\n")
    code, out, _ = lorakit("rate", "sheet", run.folder, "-o", tmp_path / "sheet", "--questions", questions, "--json")
    facts = json.loads(out)
    assert code == 0 and facts["models"] == ["base", "adapter"] and facts["questions"] == 2
    sheet = Sheet(tmp_path / "sheet", facts["sheet"], ("base", "adapter"), 2, facts["answers"])
    scores = dict.fromkeys(("accuracy", "style", "safety"), 4)
    files = [
        rated_file(tmp_path / f"ratings-{name}.json", sheet, lambda *_: scores, name, token=name)
        for name in ("ada", "bob")
    ]
    code, out, err = lorakit("rate", "report", *files, "--key", tmp_path / "sheet" / "key.json")
    assert code == 0, err
    assert "by 2 raters" in out and "adapter against base" in out
    code, out, _ = lorakit("rate", "report", *files, "--key", tmp_path / "sheet", "--json")
    assert code == 0 and json.loads(out)["raters"] == ["ada", "bob"]


def test_answers_on_a_sheet_are_those_of_the_held_out_rows(run, lorakit, lorakit_eval, tmp_path):
    _, out, _ = lorakit_eval(run.folder, "--json")
    (line, *_) = [json.loads(line) for line in Path(json.loads(out)["file"] + "l").read_text().splitlines()]
    question = line["prompt"].split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
    questions = tmp_path / "questions.txt"
    questions.write_text(question + "\n")
    assert lorakit("rate", "sheet", run.folder, "-o", tmp_path / "sheet", "--questions", questions)[0] == 0
    key = json.loads((tmp_path / "sheet" / "key.json").read_text())
    assert sorted(model for models in key["questions"][0]["answers"] for model in models) == ["adapter", "base"]
    shown = data_of(Sheet(tmp_path / "sheet", "", (), 1, 2))["questions"][0]["answers"]
    assert set(shown) == {answer.strip() for answer in line["answers"].values()}


def test_texts_have_a_loss_and_no_answers(run, lorakit_eval, tmp_path):
    rows = write_rows(tmp_path / "texts.jsonl", [{"text": f"apples and {number} rivers"} for number in range(8)])
    code, out, _ = lorakit_eval(run.folder, "--data", rows, "--json")
    facts = json.loads(out)
    assert code == 0 and facts["rows"] == {
        "source": str(rows),
        "count": 8,
        "available": 8,
        "with_answer": 0,
        "answers": 0,
    }
    assert facts["models"]["adapter"]["scores"].keys() == {"loss", "perplexity"}
    assert Path(facts["file"] + "l").read_text() == ""


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_scored(tmp_path, monkeypatch):
    from lorakit.cli.eval import results_folder

    results_folder(None, tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Give --output DIR"):
        results_folder(None, tmp_path / "file" / "eval")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # who runs the tests may be allowed everything
    with pytest.raises(UserError, match="cannot be written"):
        results_folder(None, tmp_path / "eval")
