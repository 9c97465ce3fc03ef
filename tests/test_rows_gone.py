"""Promises of commands on runs whose rows are gone or lie elsewhere: each reads what it needs, and no more."""

import json
import shutil

import pytest
from conftest import CHATML, rows_of, write_rows
from eval_runs import Remembers, make_run, score

from lorakit.errors import UserError
from lorakit.merge.inputs import input_of_run
from lorakit.merge.run import merge
from lorakit.prepare import reopen_run
from lorakit.progress import Silent


@pytest.fixture
def handed_over(tmp_path, tiny_base, monkeypatch):
    """A run whose folder alone is left of it, at another place, with a template that lay beside its recipe."""
    template = tmp_path / "there" / "own.jinja"
    template.parent.mkdir()
    template.write_text(CHATML.replace("system", "system"), encoding="utf-8")
    run = make_run(tmp_path / "there", tiny_base, model={"chat_template": "own.jinja"})
    shutil.move(run.folder, tmp_path / "here")
    shutil.rmtree(tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "here"


def test_rows_given_are_scored_without_the_run_s_own(handed_over, tmp_path):
    told = Remembers()
    file = write_rows(tmp_path / "rows.jsonl", rows_of(40)[30:])
    found = score(handed_over, file=file, progress=told)
    assert [model.name for model in found.models] == ["base", "adapter"]
    assert [line for line in told.said if "cannot be read" in line and "train.jsonl" in line]
    assert not told.warned


def test_without_rows_of_any_kind_the_remedy_is_told(handed_over):
    with pytest.raises(UserError, match=r"eval\.jsonl.* Give other rows with --data FILE"):
        score(handed_over)


def test_held_out_rows_are_enough_to_score_and_to_merge(tmp_path, tiny_base):
    run = make_run(tmp_path, tiny_base)
    before = [model.nats.tolist() for model in score(run.folder).models]
    (tmp_path / "train.jsonl").unlink()
    told = Remembers()
    found = score(run.folder, progress=told)
    assert [model.nats.tolist() for model in found.models] == before
    assert sum("cannot be read" in line for line in told.said) == 1 and not told.warned
    opened, prepared = reopen_run(run.folder, Silent())
    merged = merge(input_of_run(opened, prepared, Silent()), opened.merged, Silent())
    assert merged.rows_of == "held-out" and merged.proof


def test_a_merge_without_proof_reads_no_rows(handed_over, lorakit):
    code, out, err = lorakit("merge", handed_over, "--no-proof", "--json")
    assert code == 0, err
    assert json.loads(out)["proof"] is None and (handed_over / "merged" / "model.safetensors").is_file()


def test_the_same_rows_in_another_place_are_the_same(tmp_path, tiny_base):
    run = make_run(tmp_path / "there", tiny_base)
    shutil.move(tmp_path / "there", tmp_path / "elsewhere")
    folder = tmp_path / "elsewhere" / run.folder.name
    told = Remembers()
    _, prepared = reopen_run(folder, told)
    assert prepared.train.rows and prepared.held_out and not told.warned
    write_rows(tmp_path / "elsewhere" / "eval.jsonl", rows_of(35)[30:])
    _, prepared = reopen_run(folder, told)
    with pytest.raises(UserError, match=r"eval\.jsonl: not the rows of this run's training"):
        assert prepared.held_out
    assert not told.warned


def test_questions_are_answered_without_any_rows_of_the_run(handed_over, tmp_path, lorakit):
    questions = write_rows(tmp_path / "questions.jsonl", [{"prompt": "Tell me about lamps, number 1."}])
    code, out, err = lorakit("rate", "sheet", handed_over, "-o", tmp_path / "sheet", "--questions", questions, "--json")
    assert code == 0, err
    assert json.loads(out)["answers"] == 2


def test_adapters_are_combined_without_rows_and_scored_where_there_are_some(tmp_path, tiny_base, lorakit):
    runs = [make_run(tmp_path / name, tiny_base, train={"seed": seed}) for seed, name in enumerate("ab")]
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / "b" / name).unlink()
    options = ("--method", "cat", "--weights", "0.5,0.5", "--output", tmp_path / "both", "--json")
    code, out, err = lorakit("combine", *(run.folder for run in runs), *options)
    assert code == 0, err
    facts = json.loads(out)
    assert [score["run"] for score in facts["scores"]] == [str(runs[0].folder)]
    assert facts["without_held_out_rows"] == [str(runs[1].folder)] and "cannot be read" in err
