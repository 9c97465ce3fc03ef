"""`evaluate.turns: all`: every trained answer of a row is generated after the row's own turns, and counts by row."""

import json

import numpy as np
import pytest
from conftest import write_rows
from eval_runs import make_run

from lorakit.evaluate.metric import average_by_row, mean
from lorakit.evaluate.models import models_of_run
from lorakit.evaluate.report import evaluation_document
from lorakit.evaluate.run import default_settings, score_models
from lorakit.prepare import reopen_run
from lorakit.progress import Silent
from lorakit.registry import METRICS
from lorakit.share.score_diff import compare_scores
from lorakit.share.scores import StoredScores


def talk(number: int, turns: int) -> dict:
    messages = []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"Question {turn} of rivers and lamps, number {number}?"})
        messages.append({"role": "assistant", "content": f"Answer {turn} of number {number}."})
    return {"messages": messages}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_base):
    """Held-out rows of one, two and three turns."""
    folder = tmp_path_factory.mktemp("turns")
    rows = write_rows(folder / "talks.jsonl", [talk(number, 1 + number % 3) for number in range(6)])
    data = {"eval": str(rows), "max_length": 256}
    return make_run(folder, tiny_base, data=data, evaluate={"turns": "all", "metrics": ["contains", "chrf"]})


@pytest.fixture(scope="module")
def evaluation(run):
    prepared = reopen_run(run.folder, Silent())[1]
    return score_models(models_of_run(run, prepared), None, default_settings(prepared), Silent())


def test_each_turn_is_answered_after_the_rows_own_turns(evaluation):
    rendered = evaluation.baseline.rendered
    assert rendered.with_answer == [0, 1, 1, 2, 2, 2, 3, 4, 4, 5, 5, 5]
    assert rendered.references[3:6] == [f"Answer {turn} of number 2." for turn in range(3)]
    third = rendered.tokenizer.decode(rendered.prompts[5])
    assert "Answer 0 of number 2." in third and "Answer 1 of number 2." in third and "Answer 2" not in third
    assert third.endswith("<|im_start|>assistant\n")


def test_a_row_counts_once_however_many_turns_it_has(evaluation):
    model = evaluation.models[1]
    measure = model.measures[""]["answers"]["contains"]
    assert measure.rows.shape == (6, 2) and set(measure.rows[:, 1]) == {1.0}
    function, rendered = METRICS["contains"].function, model.rendered
    of_answers = [function(*pair)[""] for pair in zip(model.answers, rendered.references, strict=True)]
    by_row = [np.mean([of_answers[at] for at, row in enumerate(rendered.with_answer) if row == n]) for n in range(6)]
    assert measure.value == pytest.approx(np.mean(by_row))
    document = evaluation_document(evaluation)
    assert document["rows"]["with_answer"] == 6 and document["rows"]["answers"] == 12
    assert document["settings"]["turns"] == "all"


def test_what_is_stored_gives_the_same_scores_again(run, lorakit_eval):
    code, out, err = lorakit_eval(run.folder, "--json")
    assert code == 0, err
    path = run.list_evaluations()[0]
    document = json.loads(path.read_text())
    stored = [StoredScores(path, document, name) for name in ("base", "adapter")]
    compared = compare_scores(*stored)
    assert not compared.unpaired
    (written,) = document["comparisons"]
    for name, one in compared.comparisons.items():
        assert one.difference == pytest.approx(written["scores"][name]["difference"]), name
        assert one.rows == 6
    code, out, err = lorakit_eval(run.folder, "--turns", "last", "--json")
    assert code == 0 and json.loads(out)["rows"]["answers"] == 6, err
    code, out, err = lorakit_eval(run.folder, "--few-shot", "1", "--json")
    assert code == 0 and json.loads(out)["rows"]["answers"] == 12, err


def test_one_answer_a_row_leaves_a_measure_as_it_is():
    measure = mean(np.array([1.0, 0.0, np.nan]))
    assert average_by_row(measure, [0, 2, 5]) is measure
    averaged = average_by_row(mean(np.array([1.0, 0.0, np.nan, 1.0, np.nan])), [0, 0, 0, 4, 7])
    assert averaged.rows.tolist() == [[0.5, 1.0], [1.0, 1.0], [0.0, 0.0]]
    assert averaged.value == pytest.approx(0.75)
