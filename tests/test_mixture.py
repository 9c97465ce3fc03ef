"""Sources with weights: what a run draws of each, and what the commands say of it."""

import json
from collections import Counter

import pytest
from conftest import rows_of, write_rows
from runs_of_tests import adapter_weights, losses, run_recipe
from test_training import interrupted_after, same

from lorakit.errors import LorakitError


@pytest.fixture
def weighted(recipe_file, tmp_path):
    """A recipe of 20 rows, and 4 others of a small weight."""

    def write(weight=0.1, **train):
        write_rows(tmp_path / "big.jsonl", rows_of(20))
        write_rows(tmp_path / "small.jsonl", rows_of(60)[50:54])
        sources = ["big.jsonl", {"path": "small.jsonl", "weight": weight}]
        return recipe_file(data={"train": sources, "eval": None}, train={"eval_every": ..., **train})

    return write


def test_a_small_source_of_small_weight_is_trained_and_the_commands_say_how_often(weighted, lorakit):
    path = weighted(epochs=3)
    said = "small.jsonl: weight 0.1: of 4 rows 0, 1, 0 drawn in 3 epochs of the run, 1 in total"
    code, out, err = lorakit("data", path)
    assert code == 0 and said in out and "no row is trained" not in err
    code, _, err = lorakit("train", path, "--dry-run")
    assert code == 0 and said in err and "no row is trained" not in err
    assert "steps: 16 of 4 rows" in err  # 20, 21 and 20 rows in batches of 4


def test_what_data_says_is_drawn_is_what_train_and_plan_count(weighted, lorakit):
    path = weighted(epochs=2.5, weight=0.3)
    drawn = json.loads(lorakit("data", path, "--json")[1])["draws"]
    planned = json.loads(lorakit("plan", path, "--json")[1])["steps"]
    run = json.loads(lorakit("train", path, "--dry-run", "--json")[1])["steps"]
    assert drawn[1] == {"source": "small.jsonl", "epochs": [1, 1, drawn[1]["epochs"][2]]}
    assert planned == run == 6 + 6 + 3


@pytest.mark.parametrize("settings", [{"epochs": 1}, {"epochs": ..., "steps": 5}])
def test_a_source_that_no_step_of_the_run_trains_is_told(weighted, lorakit, settings):
    path = weighted(**settings)
    said = "small.jsonl: no row is trained: weight 0.1 draws none of its 4 rows in this run. Raise its weight, or"
    assert said in lorakit("data", path)[2]
    assert said in lorakit("train", path, "--dry-run")[2]


def test_a_weighted_run_trains_what_was_said_and_resumes_bit_for_bit(weighted, tmp_path, monkeypatch, lorakit):
    """Epochs of 6, 5 and 6 steps; stopped at the end of the second, which for Trainer, whose epochs are all of 6 steps,
    is the middle of one."""
    path = weighted(epochs=3, weight=0.15, save_every=100)
    drawn = json.loads(lorakit("data", path, "--json")[1])["draws"]
    rows = Counter()
    from lorakit.train import micro_batching

    step = micro_batching.MicroBatchRunner.run_step

    def noted(self, its, *arguments):
        rows.update(row["where"].split(":")[0] for row in its)
        return step(self, its, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(micro_batching.MicroBatchRunner, "run_step", noted)
        straight, outcome = run_recipe(path, tmp_path / "straight")
    assert rows == {source["source"]: sum(source["epochs"]) for source in drawn} == {"big.jsonl": 60, "small.jsonl": 2}
    with monkeypatch.context() as patch:
        interrupted_after(11, patch)
        with pytest.raises(LorakitError, match="stopped after step 11"):
            run_recipe(path, tmp_path / "resumed")
    resumed, _ = run_recipe(path, tmp_path / "resumed", resume=True)
    assert outcome.steps == len(losses(straight)) == 17
    assert same(adapter_weights(straight), adapter_weights(resumed))
