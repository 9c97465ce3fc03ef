"""Promises of a gate: what is worse than the run in production is refused, what the rows cannot tell passes and is
said, and no model is flattered by rows that it was trained on."""

import json
from pathlib import Path

import pytest
from conftest import rows_of, write_rows
from eval_runs import make_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_base):
    """A run, one that was trained for a step, and one that was trained on the held-out rows of the others."""
    root = tmp_path_factory.mktemp("gate")
    production = make_run(root / "production", tiny_base, train={"steps": 16, "learning_rate": 0.01})
    weak = make_run(root / "weak", tiny_base, train={"steps": 1, "eval_every": 1, "learning_rate": 1e-5})
    data = {"train": ["train.jsonl", "eval.jsonl"], "eval": None}
    leaky = make_run(root / "leaky", tiny_base, data=data)
    runs = {"production": production.folder, "weak": weak.folder, "leaky": leaky.folder}
    return {name: folder.rename(folder.with_name(name)) for name, folder in runs.items()}


def test_a_model_that_is_worse_than_the_one_in_production_fails(runs, command):
    code, out, err = command("eval", runs["weak"], "--not-worse-than", runs["production"], "--json")
    facts = json.loads(out)
    (gate,) = facts["gates"]
    loss = gate["scores"]["loss"]
    assert code == 1 and not gate["passed"] and loss["verdict"] == "worse" and loss["low"] > 0
    assert "--not-worse-than: weak: loss is worse than that of production: +" in err
    assert facts["failed"] and " on 10 rows" in facts["failed"][0]
    assert facts["baseline"] == "production" and gate["rows"] == 10
    assert list(gate["scores"]) == ["loss", "exact-match", "json-valid"]
    stored = json.loads(Path(facts["file"]).read_text())
    assert stored["gates"] == facts["gates"] and facts["file"].startswith(str(runs["weak"]))


def test_a_better_model_passes_and_what_the_rows_cannot_tell_is_said(runs, command):
    code, out, _ = command(
        "eval", runs["production"], "--not-worse-than", runs["weak"], "--on", "loss", "--on", "json-valid"
    )
    assert code == 0 and "gate: production not worse than weak (10 rows)" in " ".join(out.split())
    assert "cannot tell" in out and "FAILS" not in out
    code, _, err = command("eval", runs["weak"], "--not-worse-than", runs["production"], "--rows", 5)
    assert code == 0 and "too few rows to tell whether it is worse than production: 5, and an interval takes 6" in err


def test_a_margin_allows_as_much_and_no_more(runs, command):
    judge = ("eval", runs["weak"], "--not-worse-than", runs["production"], "--quiet", "--on")
    assert command(*judge, "json-valid")[0] == 0
    assert command(*judge, "loss=9")[0] == 0
    code, _, err = command(*judge, "loss=0.0001")
    assert code == 1 and "0.0001 allowed" in err


def test_rows_that_one_of_the_two_was_trained_on_are_left_out(runs, command, tmp_path):
    code, _, err = command("eval", runs["weak"], "--not-worse-than", runs["leaky"])
    assert code == 2 and "every row was trained on by weak or leaky. Give other rows with --data" in err
    rows = write_rows(tmp_path / "rows.jsonl", [*rows_of(22)[:3], *rows_of(90)[70:]])
    code, out, err = command("eval", runs["weak"], "--not-worse-than", runs["production"], "--data", rows, "--json")
    (gate,) = json.loads(out)["gates"]
    assert code == 1 and (gate["rows"], gate["left_out"]) == (20, 3)
    assert gate["scores"]["loss"]["rows"] == 20
    assert "3 of 23 rows were trained on by weak (" in err and "are left out of the comparison" in err


def test_the_base_and_the_baseline_are_judged_by_nobody(runs, command, tiny_base):
    code, out, _ = command("eval", "base", runs["production"], "--not-worse-than", runs["weak"], "--json")
    facts = json.loads(out)
    assert code == 0 and facts["baseline"] == "base" and [gate["model"] for gate in facts["gates"]] == ["production"]
    both = ("--not-worse-than", runs["production"], "--fail-under", "loss=0.001")
    code, _, err = command("eval", "base", runs["weak"], *both)
    assert code == 1 and "--fail-under: weak" in err and "--not-worse-than: weak" in err
    assert "production: loss is" not in err
    code, out, err = command("eval", runs["production"], "--not-worse-than", "base", "--json")
    assert code == 0 and json.loads(out)["gates"][0]["against"] == "base"


def test_other_held_out_rows_of_the_reference_are_said(runs, command, tiny_base, tmp_path):
    other = make_run(tmp_path / "other", tiny_base, data={"eval": 0.3}, train={"steps": 1})
    code, _, err = command("eval", runs["production"], "--not-worse-than", other.folder)
    assert code == 0 and "run: has other held-out rows; both are scored on the held-out rows of" in err
    (tmp_path / "other" / "train.jsonl").unlink()
    code, _, err = command("eval", runs["production"], "--not-worse-than", other.folder)
    assert code == 0 and "run: its training rows are not known here" in err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--on", "loss"], "--on: is of the scores that --not-worse-than RUN judges"),
        (["--not-worse-than", "RUN"], "is the model that is judged"),
        (["--not-worse-than", "nowhere/run"], "could not find model nowhere/run"),
        (["--not-worse-than", "WEAK", "--on", "bleu"], "--on: 'bleu' is not measured. Write one of loss"),
        (["--not-worse-than", "WEAK", "--on", "loss=much"], "Write for example json-valid, or json-valid=2%"),
        (["--not-worse-than", "WEAK", "--on", "loss=-1"], "by how much a score may be worse is 0 or more. Write loss"),
        (
            ["--not-worse-than", "WEAK", "--on", "json-valid=2"],
            "so nothing would fail. Write for example json-valid=2%",
        ),
        (["--metrics", "bleu", "--fail-under", "bleu=30%"], "this score is in points, of 100. Write bleu=30."),
        (["--fail-under", "json-valid=80"], "json-valid=80: this score is a share, and 1 is 100%"),
        (
            ["--not-worse-than", "WEAK", "--on", "json-valid.x"],
            "'json-valid.x' is not compared here. Write some of loss",
        ),
    ],
)
def test_wrong_gates_are_one_clear_line(runs, command, arguments, reason):
    known = {"RUN": runs["production"], "WEAK": runs["weak"]}
    code, out, err = command("eval", runs["production"], *(known.get(word, word) for word in arguments), "-q")
    assert code == 2 and reason in err and out == "", err
