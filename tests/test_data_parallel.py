"""Promise 3 for several processes: the same rows in the same steps, the same losses, the same adapter."""

import signal

import numpy as np
import pytest
import torch
from conftest import rows_of, write_rows
from distributed_runs import environment, failed_training_on, train_here, train_on
from rank_processes import outcomes_on, run_on
from runs_of_tests import adapter_weights, losses, run_recipe

from lorakit.distributed.processes import rank, world_size
from lorakit.distributed.sharing import deal
from lorakit.errors import Interrupted
from lorakit.progress import Silent
from lorakit.run_dir import Run
from lorakit.train.agreement import keep_equal
from lorakit.train.micro_batching import MicroBatchRunner
from lorakit.train.sharding import WHOLE
from lorakit.train.trainer import TrainingCallback

STEPS = {"steps": 20, "epochs": None, "learning_rate": 1e-3}
CASES = {
    "lora": {},
    "packed": {"data": {"packing": "on"}},
    "dora": {"adapter": {"kind": "dora"}},
    "adalora": {"adapter": {"kind": {"adalora": {"shrink_from": 0.1, "shrink_to": 0.5}}}},
    "nf4": {"model": {"quantization": "nf4"}},
    "full": {"adapter": {"kind": "none", "rank": ..., "alpha": ...}},
}


_SLOW = ("packed", "dora", "adalora", "nf4", "full")


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
        shares = [deal(rows, rank, size) for rank in range(size)]
        assert sorted(row for share in shares for row in share) == sorted(rows)
        assert max(map(sum, shares)) - min(map(sum, shares)) <= max(rows)
    assert deal(rows, 0, 1) == rows


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in _SLOW)) for case in CASES])
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


def test_two_processes_score_the_held_out_rows_as_one_does(recipe_file, tmp_path):
    path = recipe_file(train=STEPS | {"steps": 4, "micro_batch": 1})
    _, alone = run_recipe(path, tmp_path / "one")
    _, outcomes = train_on(3, path, tmp_path / "three")  # ten rows, one by one, among three
    assert [outcome.eval_loss for outcome in outcomes] == [pytest.approx(alone.eval_loss, abs=1e-5)] * 3


@pytest.mark.slow
def test_sources_with_weights_and_fewer_rows_than_processes(recipe_file, tmp_path):
    write_rows(tmp_path / "other.jsonl", rows_of(60)[45:])
    sources = [{"path": "train.jsonl", "weight": 2}, {"path": "other.jsonl", "weight": 0.5}]
    path = recipe_file(data={"train": sources}, train={**STEPS, "batch_size": 2})
    one, _ = run_recipe(path, tmp_path / "one")
    several, _ = train_on(3, path, tmp_path / "three")
    assert_same_training(one, several)


def _stops(path, folder, step):
    """The last process gets a signal in a step."""

    def noted(self, args, state, control, **others):
        if rank() == world_size() - 1 and state.global_step + 1 == step:
            self.trainer.stopping.signal = signal.SIGTERM

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingCallback, "on_step_begin", noted)
        return train_here(path, folder)


@pytest.mark.parametrize(
    ("before", "after"), [(2, 1), *(pytest.param(*counts, marks=pytest.mark.slow) for counts in ((1, 2), (2, 3)))]
)
def test_a_run_goes_on_with_another_number_of_processes(before, after, recipe_file, tmp_path):
    """Stopped by a signal to one of its processes; checkpoint, order and optimizer do not know how many there are."""
    path, folder = recipe_file(train=STEPS), tmp_path / "run"
    whole, _ = run_recipe(path, tmp_path / "whole")
    if before == 1:
        with pytest.raises(Interrupted):
            _stops(path, folder, 7)
    else:
        first, second = failed_training_on(2, _stops, path, folder, 7)
        assert (first[0], second[0]) == ("Interrupted", "FailedElsewhere") and "stopped after step 7 of 20" in first[1]
    assert [path.name for path in Run(folder).complete_checkpoints()][-1] == "step-000007"
    if after == 1:
        run, _ = run_recipe(path, folder, resume=True)
    else:
        run, _ = train_on(after, path, folder, resume=True)
    assert_same_training(whole, run)


def _runs_short(path, folder):
    """Memory runs out on the second process, for more than two rows at once."""
    run_micro_batch = MicroBatchRunner.run_micro_batch

    def short(self, batch, tokens, step):
        if rank() == 1 and step == 3 and len(batch.packs) > 2:
            raise torch.OutOfMemoryError("there is no more")
        return run_micro_batch(self, batch, tokens, step)

    MicroBatchRunner.run_micro_batch = short
    return train_here(path, folder)


@pytest.mark.slow
def test_memory_that_runs_out_on_one_process_makes_all_go_on_with_less(recipe_file, tmp_path):
    path = recipe_file(train={**STEPS, "batch_size": 6})
    one, _ = run_recipe(path, tmp_path / "one")
    outcomes = failed_training_on(2, _runs_short, path, tmp_path / "run")
    assert [(error, outcome.micro_batch) for error, outcome in outcomes] == [("", 2)] * 2  # of three rows each
    run = Run(tmp_path / "run")
    assert_same_training(one, run)
    assert [(change["step"], change["now"]) for change in run.read_manifest()["out_of_memory"]] == [(3, 2)]


def _fails(path, folder, error):
    run_micro_batch = MicroBatchRunner.run_micro_batch

    def failing(self, batch, tokens, step):
        if rank() == 1 and step == 6:
            if error is not None:
                raise error
            for weight in self.model.parameters():
                weight.data.fill_(float("nan"))
        return run_micro_batch(self, batch, tokens, step)

    MicroBatchRunner.run_micro_batch = failing
    return train_here(path, folder)


@pytest.mark.parametrize(
    "error",
    [
        None,
        pytest.param(ValueError("a fault"), marks=pytest.mark.slow),
        pytest.param(OSError(28, "No space left on device"), marks=pytest.mark.slow),
    ],
)
def test_what_ends_one_process_ends_all_and_is_told_once(error, recipe_file, tmp_path):
    """A loss that is not a number, a fault, a full disk: the others end too, and the checkpoint before is complete."""
    path, folder = recipe_file(train=STEPS), tmp_path / "run"
    first, second, third = failed_training_on(3, _fails, path, folder, error)
    assert (first[0], third[0]) == ("FailedElsewhere", "FailedElsewhere")
    name, words = {
        "NoneType": ("LorakitError", "step 6: the loss is nan; rows: train.jsonl"),
        "ValueError": ("ValueError", "a fault"),
        "OSError": ("LorakitError", "the disk is full"),
    }[type(error).__name__]
    assert second[0] == name and words in second[1]
    assert [path.name for path in Run(folder).complete_checkpoints()][-1] == "step-000004"


@pytest.mark.slow
def test_dropout_differs_on_each_process_and_is_as_strong_as_on_one(recipe_file, tmp_path):
    """An adapter that stands still is scored by 60 steps under dropout. A paired t-test finds no difference of the
    mean loss between one process and two (|t| < 3.5: by chance once in 1,000), and the noise is as large: with equal
    masks on both, its variance would be about twice as large (F between 1/2.2 and 2.2: by chance once in 300)."""
    learned, _ = run_recipe(recipe_file(train=STEPS | {"learning_rate": 0.05}), tmp_path / "learned")
    still = {"steps": 60, "epochs": None, "learning_rate": 1e-30, "schedule": "constant", "eval_every": 60}
    adapter = {"kind": ..., "rank": ..., "alpha": ..., "from": str(learned.folder), "dropout": 0.5}
    path = recipe_file(adapter=adapter, train=still)
    exact = np.array(losses(run_recipe(path, tmp_path / "exact", "adapter.dropout=0")[0]))
    one = np.array(losses(run_recipe(path, tmp_path / "one")[0])) - exact
    two = np.array(losses(train_on(2, path, tmp_path / "two")[0])) - exact
    difference = two - one
    assert abs(difference.mean()) < 3.5 * difference.std(ddof=1) / len(difference) ** 0.5
    assert 1 / 2.2 < two.var() / one.var() < 2.2


def _apart(by):
    """The processes' weights differ by a number; some of them are zero."""
    model = torch.nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.fill_(1)
        model.bias.zero_()
        model.weight[0, 0] += by * rank()
    keep_equal(model, WHOLE, Silent())
    return float(model.weight[0, 0])


def test_weights_that_drift_apart_are_made_equal_and_others_end_the_run():
    assert run_on(2, _apart, 1e-6) == [1.0, 1.0]
    first, second = outcomes_on(2, _apart, 0.1)
    assert (first[0], second[0]) == ("LorakitError", "FailedElsewhere") and "weight differs by 0.1" in first[1]


def _command(path, folder):
    from lorakit.cli.train import train

    train(path, [], folder, as_json=True)


def test_a_run_of_two_processes_is_merged_by_both_and_exported_by_the_first(recipe_file, tmp_path):
    path = recipe_file(train=STEPS | {"steps": 4}, output={"merged": True, "export": ["vllm"]})
    run_on(2, _command, path, tmp_path / "run", **environment())
    assert {"merged", "export", "adapter"} <= {path.name for path in (tmp_path / "run").iterdir()}
