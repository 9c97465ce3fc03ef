"""Promise 3 for several processes: the same rows in the same steps, the same losses, the same adapter."""

import pytest
from distributed_runs import train_on
from runs_of_tests import adapter_weights, losses, run_recipe

from lorakit.data.batches import share_of_step
from lorakit.run_dir import Run

STEPS = {"steps": 20, "epochs": None, "learning_rate": 1e-3}
CASES = {
    "lora": {},
    "packed": {"data": {"packing": "on"}},
    "dora": {"adapter": {"kind": "dora"}},
    "adalora": {"adapter": {"kind": {"adalora": {"shrink_from": 0.1, "shrink_to": 0.5}}}},
    "nf4": {"model": {"quantization": "nf4"}},
    "full": {"adapter": {"kind": "none", "rank": ..., "alpha": ...}},
}


def assert_same_training(one: Run, other: Run) -> None:
    """Losses within 1e-5, weights within 1e-5 of the largest."""
    assert losses(other) == pytest.approx(losses(one), abs=1e-5)
    assert_same_weights(adapter_or_model(one), adapter_or_model(other))


def assert_same_weights(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    largest = max(float(weight.abs().max()) for weight in one.values())
    assert max(float((one[name].float() - other[name].float()).abs().max()) for name in one) <= 1e-5 * largest


def adapter_or_model(run: Run) -> dict:
    from safetensors.torch import load_file

    return adapter_weights(run) if run.adapter.is_dir() else load_file(run.model / "model.safetensors")


def test_shares_of_a_step_are_its_rows_once_each_and_cost_alike():
    rows = list(range(40, 0, -1))  # lengths, longest first
    for size in (1, 2, 3, 7, 64):
        shares = [share_of_step(rows, rank, size) for rank in range(size)]
        assert sorted(row for share in shares for row in share) == sorted(rows)
        assert max(map(sum, shares)) - min(map(sum, shares)) <= max(rows)
    assert share_of_step(rows, 0, 1) == rows


@pytest.mark.parametrize("case", CASES)
def test_two_and_three_processes_train_what_one_does(case, recipe_file, tmp_path):
    """20 steps of 5 rows, 22 rows an epoch: the last batch is uneven, and gives one of three processes no row."""
    sections = {**CASES[case], "train": {**STEPS, "batch_size": 5}}
    path = recipe_file(**sections)
    one, _ = run_recipe(path, tmp_path / "one")
    for count in (2, 3):
        several, outcomes = train_on(count, path, tmp_path / f"on-{count}")
        assert_same_training(one, several)
        assert len({outcome.loss for outcome in outcomes}) == 1
        assert several.read_manifest()["machine"]["devices"] == count
    assert sorted(path.name for path in one.folder.iterdir()) == sorted(path.name for path in several.folder.iterdir())
