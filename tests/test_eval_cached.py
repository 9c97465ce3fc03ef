"""Promises of `lorakit eval` about its cache: nothing is computed twice, and nothing that was computed is lost."""

import json

import pytest
from eval_runs import loss, make_run, score

from lorakit.evaluate import inference


@pytest.fixture(scope="module")
def two(tmp_path_factory, tiny_base):
    return make_run(tmp_path_factory.mktemp("two"), tiny_base)


@pytest.fixture
def loads(monkeypatch, tmp_path):
    """The bases that are loaded, with a cache that is empty."""
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    found, load_model = [], inference.load_model

    def noted(base, settings, device):
        found.append(base.name)
        return load_model(base, settings, device)

    monkeypatch.setattr(inference, "load_model", noted)
    return found


def test_nothing_is_computed_twice_and_a_new_metric_costs_no_generation(two, loads):
    first = score(two.folder, cache=True)
    assert len(loads) == 1
    again = score(two.folder, cache=True, metrics=("contains", "json-valid"))
    assert len(loads) == 1, "the model was loaded again"
    assert [model.answers for model in again.models] == [model.answers for model in first.models]
    assert loss(again, "adapter") == loss(first, "adapter")
    assert "contains" in again.parts[""].scores["adapter"]
    longer = score(two.folder, cache=True, max_new_tokens=9)
    assert len(loads) == 2 and loss(longer, "adapter") == loss(first, "adapter")
    score(two.folder, cache=False)
    assert len(loads) == 3


def test_an_interrupted_evaluation_goes_on_where_it_was(tmp_path, tiny_base, monkeypatch):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    run = make_run(tmp_path, tiny_base, train={"seed": 11})
    whole = score(run.folder)
    given, answers_to = [], inference.greedy_answers

    def interrupted(model, prompts, *more):
        *settings, told = more
        given.append(len(prompts))

        def once(found):
            told(found)
            raise KeyboardInterrupt

        return answers_to(model, prompts, *settings, once if len(given) == 1 else told)

    monkeypatch.setattr(inference, "greedy_answers", interrupted)
    monkeypatch.setattr("lorakit.model.generation._PROMPTS_ON_CPU", 4)
    with pytest.raises(KeyboardInterrupt):
        score(run.folder, cache=True)
    found = score(run.folder, cache=True)
    assert given == [10, 6, 10]
    assert [model.answers for model in found.models] == [model.answers for model in whole.models]


def test_half_a_line_of_a_killed_process_is_computed_again(tmp_path, tiny_base, monkeypatch):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    run = make_run(tmp_path, tiny_base)
    first = score(run.folder, cache=True)
    files = sorted((tmp_path / "cache" / "answers").glob("*.jsonl"))
    assert len(files) == 2
    for file in files:
        file.write_bytes(file.read_bytes()[:-7])
    again = score(run.folder, cache=True)
    assert [model.answers for model in again.models] == [model.answers for model in first.models]
    for file in files:
        lines = file.read_text().splitlines()
        assert len(lines) == 11 and len([line for line in lines if _is_json(line)]) == 10
    loads = score(run.folder, cache=True)
    assert loads.models[0].answers == first.models[0].answers


def test_kept_answers_and_losses_that_changed_in_place_are_computed_again(tmp_path, tiny_base, monkeypatch):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    run = make_run(tmp_path, tiny_base)
    first = score(run.folder, cache=True)
    for kind in ("answers", "losses"):
        for file in (tmp_path / "cache" / kind).glob("*.jsonl"):
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            for line in lines:
                line[0][1] = [[5, 5], True] if kind == "answers" else 0.25
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = score(run.folder, cache=True)
    assert [model.answers for model in again.models] == [model.answers for model in first.models]
    assert loss(again, "adapter") == loss(first, "adapter") and loss(again, "base") == loss(first, "base")


def _is_json(line):
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
