"""The end of a run is a state of its own: what is missing is saved, and nothing is trained any more."""

import json
import shutil
import signal

import pytest
from runs_of_tests import adapter_weights, losses, run_recipe
from test_training import interrupted_after, same

from lorakit.atomic_io import sha256_of
from lorakit.errors import LorakitError
from lorakit.run_dir import Run
from lorakit.train import run as training
from lorakit.train.trainer import SupervisedTrainer

CASES = {
    "inside an epoch, constant rate": {"steps": 8, "epochs": None, "schedule": "constant"},
    "at an epoch's end": {"epochs": 2},
    "the best is not the last": {
        "steps": 5,
        "epochs": None,
        "schedule": "constant",
        "warmup": 0,
        "learning_rate": 0.05,
        "eval_every": 1,
        "keep": 1,
    },
    "stopped early": {
        "steps": 200,
        "epochs": None,
        "learning_rate": 0.5,
        "schedule": "constant",
        "eval_every": 1,
        "save_every": 100,
        "early_stopping": {"patience": 2, "min_delta": 0.01},
    },
}


class Killed(BaseException):
    """As an end by a signal: nothing of lorakit's handles it."""


def killed_while_saving(*_, **__):
    raise Killed


def result_of(run: Run) -> dict[str, str]:
    folder = run.model if run.model.is_dir() else run.adapter
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".json")}


@pytest.fixture
def resumed_after_its_end(tmp_path, monkeypatch):
    """A run that goes through, and one that was killed while its result was written, and resumed."""

    def run(path, *overrides):
        straight, expected = run_recipe(path, tmp_path / "straight", *overrides)
        with monkeypatch.context() as patch:
            patch.setattr(training, "save_result", killed_while_saving)
            with pytest.raises(Killed):
                run_recipe(path, tmp_path / "resumed", *overrides)
        steps = len(losses(Run(tmp_path / "resumed")))
        resumed, outcome = run_recipe(path, tmp_path / "resumed", *overrides, resume=True)
        assert len(losses(resumed)) == steps == outcome.steps == expected.steps
        facts = ("loss", "eval_loss", "best_step", "stopped_early")
        assert [getattr(outcome, name) for name in facts] == [getattr(expected, name) for name in facts]
        assert result_of(straight) == result_of(resumed)
        assert resumed.read_manifest()["status"] == "complete"
        return outcome

    return run


@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_while_its_result_is_written_trains_no_further_step(recipe_file, resumed_after_its_end, case):
    path = recipe_file(adapter={"rank": 4, "alpha": 8, "dropout": 0.2}, train=CASES[case])
    outcome = resumed_after_its_end(path)
    assert outcome.stopped_early == (case == "stopped early")
    assert case != "the best is not the last" or outcome.best_step < outcome.steps


@pytest.mark.parametrize("kind", ["none", "adalora"])
def test_the_end_of_other_kinds_is_a_state_too(recipe_file, resumed_after_its_end, kind):
    adapter = {"kind": kind} if kind == "none" else {"kind": {kind: {"every": 1}}, "rank": 4}
    settings = {"steps": 8, "epochs": None, "schedule": "constant", "learning_rate": 0.001}
    resumed_after_its_end(
        recipe_file(adapter={**adapter, "alpha": ..., "rank": adapter.get("rank", ...)}, train=settings)
    )


@pytest.mark.parametrize("early", [None, {"patience": 2, "min_delta": 100.0}])  # the second stops after three
def test_a_stop_during_the_last_evaluation_trains_no_further_step(recipe_file, tmp_path, monkeypatch, early):
    """Of the last step, or of the evaluation after which early stopping ends the run."""
    settings = {"steps": 8, "epochs": None, "schedule": "constant", "learning_rate": 0.05, "eval_every": 1}
    path = recipe_file(train={**settings, "early_stopping": early, "save_every": 100})
    straight, expected = run_recipe(path, tmp_path / "straight")
    original = SupervisedTrainer.evaluate

    def stopped(self, *arguments, **named):
        if self.state.global_step == expected.steps:
            self.stopping.signal = signal.SIGTERM
        return original(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(SupervisedTrainer, "evaluate", stopped)
        with pytest.raises(LorakitError, match="stopped during an evaluation"):
            run_recipe(path, tmp_path / "resumed")
    resumed, outcome = run_recipe(path, tmp_path / "resumed", resume=True)
    assert outcome.steps == expected.steps and bool(early) == outcome.stopped_early
    assert result_of(straight) == result_of(resumed)


def test_a_stop_in_the_last_step_still_measures_the_last_held_out_loss(recipe_file, tmp_path, monkeypatch):
    path = recipe_file()
    straight, expected = run_recipe(path, tmp_path / "straight")
    with monkeypatch.context() as patch:
        interrupted_after(12, patch)
        with pytest.raises(LorakitError, match="stopped after step 12 of 12"):
            run_recipe(path, tmp_path / "resumed")
    resumed, outcome = run_recipe(path, tmp_path / "resumed", resume=True)
    assert outcome.eval_loss == expected.eval_loss and result_of(straight) == result_of(resumed)


def test_an_evaluation_that_is_made_up_twice_stands_in_the_log_once(recipe_file, tmp_path, monkeypatch):
    path = recipe_file()
    with monkeypatch.context() as patch:
        interrupted_after(4, patch)
        with pytest.raises(LorakitError, match="stopped after step 4"):
            run_recipe(path, tmp_path / "run")
    for write in ("write_atomic", "log_line"):  # killed before, and after the evaluation is in the log
        with monkeypatch.context() as patch:
            where = "lorakit.train.trainer.write_atomic" if write == "write_atomic" else "lorakit.run_dir.Run.log_line"
            patch.setattr(where, killed_while_saving)
            with pytest.raises(Killed):
                run_recipe(path, tmp_path / "run", resume=True)
    run, _ = run_recipe(path, tmp_path / "run", resume=True)
    lines = [json.loads(line) for line in run.log.read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [4, 8, 12]


def test_a_checkpoint_whose_best_one_is_damaged_is_left_aside(recipe_file, tmp_path, monkeypatch):
    """The result may be the best checkpoint's weights: found out before the last steps are trained, not after them."""
    settings = {**CASES["the best is not the last"], "keep": 8, "save_every": 1}
    path = recipe_file(adapter={"rank": 4, "alpha": 8, "dropout": 0.2}, train=settings)
    straight, expected = run_recipe(path, tmp_path / "straight")
    with monkeypatch.context() as patch:
        patch.setattr(training, "save_result", killed_while_saving)
        with pytest.raises(Killed):
            run_recipe(path, tmp_path / "resumed")
    run = Run(tmp_path / "resumed")
    assert 1 < expected.best_step < expected.steps
    shutil.rmtree(run.checkpoint(expected.best_step) / "trained")
    resumed, _ = run_recipe(path, run.folder, resume=True)
    assert same(adapter_weights(straight), adapter_weights(resumed))
