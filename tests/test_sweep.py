"""Sweeps: every trial is a plain run, done once, gone on with after a kill; the ranking says what can be told apart."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import rows_of, write_rows

from lorakit.errors import LorakitError, UserError
from lorakit.model import load as base_loading
from lorakit.progress import Silent
from lorakit.recipe.load import RecipeErrors, load
from lorakit.run_dir import RANKING, SWEEP, Run
from lorakit.sweep.rate_test import read_rate_test
from lorakit.sweep.run import run_worker
from lorakit.sweep.space import Choices, Range, grid, parse_space
from lorakit.sweep.sweep_file import load_sweep, parse_duration

optuna = pytest.importorskip("optuna", reason="the extra sweep is not installed")

from lorakit.sweep.ranking import rank_trials  # noqa: E402
from lorakit.sweep.study import BEST, JOURNAL, TrialStore  # noqa: E402


@pytest.fixture
def recipe(tmp_path, tiny_base) -> Path:
    write_rows(tmp_path / "train.jsonl", rows_of(22))
    write_rows(tmp_path / "eval.jsonl", rows_of(40)[30:])
    facts = {
        "model": {"base": str(tiny_base)},
        "adapter": {"rank": 4, "alpha": 8},
        "data": {"train": "train.jsonl", "eval": "eval.jsonl", "max_length": 128},
        "train": {"steps": 10, "batch_size": 4, "learning_rate": 0.01, "eval_every": 2, "save_every": 5},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(facts, sort_keys=False))
    return path


def sweep_of(recipe: Path, **keys) -> Path:
    path = recipe.parent / "rates.yaml"
    path.write_text(yaml.safe_dump({"extends": "recipe.yaml", **keys}, sort_keys=False))
    return path


def work(path: Path, folder: Path, deadline: float | None = None) -> TrialStore:
    sweep = load_sweep(path)
    store = TrialStore(sweep, folder)
    run_worker(sweep, store, Silent(), Silent, deadline)
    return store


def outcomes(store: TrialStore) -> list[tuple]:
    return [(one.number, one.values, one.state, one.loss, one.steps) for one in rank_trials(store, Silent()).trials]


RATES = {"train.learning_rate": [0.0001, 0.003, 0.03, 0.1]}


def test_a_sweep_ranks_its_trials_and_writes_the_winner(recipe, tmp_path, lorakit):
    path, folder = sweep_of(recipe, **RATES), tmp_path / "sweep"
    code, out, err = lorakit("sweep", path, "--output", folder)
    assert code == 0, err
    assert "4 trials" in out and "recommended:" in out and "take this" in out
    ranking = json.loads((folder / RANKING).read_text())
    assert sorted(one["values"]["train.learning_rate"] for one in ranking["trials"]) == RATES["train.learning_rate"]
    losses = [one["loss"] for one in ranking["candidates"]]
    assert losses == sorted(losses) and ranking["steps"] < 4 * 10  # some were cut short
    best = load(folder / BEST).recipe
    assert best.train.learning_rate == ranking["recommended"]["train.learning_rate"]
    assert best.data.train == str(recipe.parent / "train.jsonl") and best.output.dir != str(folder)
    trial = Run(Path(ranking["trials"][0]["folder"]))
    assert trial.is_complete() and trial.adapter.is_dir()
    code, out, _ = lorakit("sweep", path, "--output", folder, "--json")  # nothing is left to do
    assert code == 0 and json.loads(out)["steps"] == ranking["steps"]
    code, out, err = lorakit("report", folder)
    page = (folder / "report.html").read_text()
    assert code == 0 and str(folder / "report.html") in out, err
    assert "held-out loss by train.learning_rate" in page and "take this" in page and 'id="run-4"' in page


def test_a_trial_is_the_run_that_train_makes(recipe, tmp_path, lorakit):
    store = work(sweep_of(recipe, **{"train.learning_rate": [0.01, 0.02]}, sweep={"prune": "none"}), tmp_path / "sweep")
    code, _, err = lorakit("train", recipe, "--set", "train.learning_rate=0.02", "--output", tmp_path / "plain")
    assert code == 0, err
    number = next(trial.number for trial in store.trials if store.values_of(trial)["train.learning_rate"] == 0.02)
    weights = "adapter_model.safetensors"
    assert (store.run_of(number).adapter / weights).read_bytes() == (tmp_path / "plain/adapter" / weights).read_bytes()


@pytest.mark.parametrize(
    ("keys", "loads"),
    [
        ({}, 1),
        ({"model.quantization": "nf4"}, 1),
        ({"adapter.kind": "pissa"}, 1),
        ({"model.quantization": "q8"}, 3),
    ],
)
def test_trials_share_a_base_that_they_leave_as_it_is(recipe, tmp_path, lorakit, monkeypatch, keys, loads):
    read, load_model = [], base_loading.load_model
    monkeypatch.setattr(base_loading, "load_model", lambda *given: read.append(given) or load_model(*given))
    rates = {"train.learning_rate": [0.01, 0.02, 0.03], "train.steps": [2]}
    store = work(sweep_of(recipe, **rates, **keys, sweep={"prune": "none"}), tmp_path / "sweep")
    assert len(read) == loads
    assert [trial.state.name for trial in store.trials] == ["COMPLETE"] * 3
    settings = {"train.learning_rate": 0.03, "train.steps": 2, **keys}
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    code, _, err = lorakit("train", recipe, *sets, "--output", tmp_path / "plain")
    assert code == 0, err
    number = next(trial.number for trial in store.trials if store.values_of(trial)["train.learning_rate"] == 0.03)
    weights = "adapter_model.safetensors"
    assert (store.run_of(number).adapter / weights).read_bytes() == (tmp_path / "plain/adapter" / weights).read_bytes()


@pytest.mark.parametrize("search", ["grid", "tpe"])
def test_a_sweep_that_was_killed_ends_as_one_that_was_not(recipe, tmp_path, search, monkeypatch):
    keys = RATES if search == "grid" else {"train.learning_rate": {"log": [1e-4, 0.1]}, "sweep": {"trials": 4}}
    path = sweep_of(recipe, **keys)
    whole = outcomes(work(path, tmp_path / "whole"))

    class Killed(BaseException):
        """What no handler of the sweep expects."""

    log_line, finish, seen, cut = Run.log_line, TrialStore.finish, [], []

    def killing(run, facts):
        log_line(run, facts)
        seen.append(facts["step"])
        if len(seen) in (9, 23, 31):
            raise Killed

    def killing_after_a_cut(store, trial, loss, was_pruned):
        cut.append(was_pruned)
        if was_pruned and cut.count(True) == 1:
            raise Killed
        finish(store, trial, loss, was_pruned)

    monkeypatch.setattr(Run, "log_line", killing)
    monkeypatch.setattr(TrialStore, "finish", killing_after_a_cut)
    for _ in range(4):
        with pytest.raises(Killed):
            work(path, tmp_path / "killed")
    assert outcomes(work(path, tmp_path / "killed")) == whole


@pytest.mark.slow
def test_two_workers_do_every_trial_once(recipe, tmp_path):
    path, folder = sweep_of(recipe, **RATES, sweep={"prune": "none"}), tmp_path / "sweep"
    command = [sys.executable, "-m", "lorakit", "sweep", str(path), "--output", str(folder), "--quiet"]
    workers = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(2)]
    errors = [worker.communicate(timeout=240)[1].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    store = TrialStore(load_sweep(path), folder)
    assert [trial.state.name for trial in store.trials] == ["COMPLETE"] * 4
    assert [trial.user_attrs["starts"] for trial in store.trials] == [1] * 4


@pytest.mark.slow
def test_ctrl_c_keeps_the_trial_for_the_next_worker(recipe, tmp_path):
    path, folder = sweep_of(recipe, **RATES, **{"train.steps": 400, "train.eval_every": 200}), tmp_path / "sweep"
    command = [sys.executable, "-m", "lorakit", "sweep", str(path), "--output", str(folder)]
    worker = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, deadline = folder / "trial-0000" / "log.jsonl", time.monotonic() + 120
    while not (log.is_file() and log.stat().st_size) and time.monotonic() < deadline:
        os.sched_yield()
    worker.send_signal(signal.SIGINT)
    assert worker.wait(timeout=60) == 130
    store = TrialStore(load_sweep(path), folder)
    claim = store.claim()
    assert claim.trial.number == 0 and Run(claim.folder).complete_checkpoints()
    claim.release()


def test_a_trial_that_crashes_is_recorded_and_passed_over(recipe, tmp_path):
    values = [0.01, 1e30]
    store = work(sweep_of(recipe, **{"train.learning_rate": values}, sweep={"prune": "none"}), tmp_path / "sweep")
    by_value = {one.values["train.learning_rate"]: one for one in rank_trials(store, Silent()).trials}
    assert by_value[0.01].state == "finished"
    assert by_value[1e30].state == "failed" and "Lower train.learning_rate" in by_value[1e30].reason


def test_a_trial_that_kills_its_workers_is_given_up(recipe, tmp_path):
    sweep = load_sweep(sweep_of(recipe, **RATES))
    store = TrialStore(sweep, tmp_path / "sweep")
    numbers = []
    for _ in range(4):
        claim = store.claim()
        numbers.append(claim.trial.number)
        claim.lock.release()  # as the system does when a process is killed
    assert numbers == [0, 0, 0, 1]
    assert "begun 3 times" in rank_trials(store, Silent()).trials[0].reason


def test_seeds_are_one_candidate_and_show_the_noise(recipe, tmp_path):
    keys = {"train.learning_rate": [0.001, 0.05], "train.seed": [1, 2]}
    ranking = rank_trials(work(sweep_of(recipe, **keys, sweep={"prune": "none"}), tmp_path / "sweep"), Silent())
    assert [len(one.trials) for one in ranking.candidates] == [2, 2]
    assert all("train.seed" not in one.values for one in ranking.candidates)
    assert ranking.noise > 0 and set(ranking.importance) == {"train.learning_rate", "train.seed"}
    assert ranking.rows == 10


def test_of_equal_candidates_the_smallest_is_recommended(recipe, tmp_path):
    keys = {"adapter.rank": {"log2": [2, 8]}, "train.steps": 2, "train.learning_rate": 1e-20}
    ranking = rank_trials(work(sweep_of(recipe, **keys, sweep={"prune": "none"}), tmp_path / "sweep"), Silent())
    assert all(one.is_tied for one in ranking.candidates[1:])
    assert ranking.recommended.values == {"adapter.rank": 2}
    assert "cannot be told apart on 10 rows" in ranking.in_words()


def test_no_trial_begins_after_the_budget(recipe, tmp_path):
    store = work(sweep_of(recipe, **RATES), tmp_path / "sweep", deadline=time.monotonic() - 1)
    assert rank_trials(store, Silent()).recommended is None
    assert rank_trials(store, Silent()).in_words() == "no trial has ended yet"


def test_another_sweep_in_the_same_folder_is_refused(recipe, tmp_path, lorakit):
    folder = tmp_path / "sweep"
    TrialStore(load_sweep(sweep_of(recipe, **RATES)), folder)
    other = sweep_of(recipe, **{"train.learning_rate": [0.5, 0.6]})
    code, _, err = lorakit("sweep", other, "--output", folder)
    assert code == 2 and "holds another sweep (it differs in spaces)" in err
    code, _, err = lorakit("sweep", other, "--output", recipe.parent)
    assert code == 2 and "not a sweep's folder" in err


def test_a_recipe_that_was_edited_since_is_refused(recipe, tmp_path):
    path, folder = sweep_of(recipe, **RATES), tmp_path / "sweep"
    TrialStore(load_sweep(path), folder)
    above = tmp_path / "above.yaml"
    recipe.rename(above)
    recipe.write_text("extends: above.yaml\n")
    TrialStore(load_sweep(path), folder)  # it says the same
    above.write_text(above.read_text().replace("alpha: 8", "alpha: 32"))
    with pytest.raises(UserError, match=r"differs in the recipe's adapter\.alpha"):
        TrialStore(load_sweep(path), folder)


def test_other_rows_than_those_of_the_trials_before_are_refused(recipe, tmp_path, monkeypatch):
    sweep = load_sweep(sweep_of(recipe, **{"data.eval": [0.2, 0.3], "train.steps": 2}))
    store = TrialStore(sweep, tmp_path / "sweep")
    with pytest.raises(UserError, match="held-out rows of this trial are not those of the trials before"):
        run_worker(sweep, store, Silent(), Silent, None)
    assert [one.state for one in rank_trials(store, Silent()).trials] == ["finished", "under way"]
    with pytest.raises(UserError, match=r"rows\.jsonl: changed since"):
        other = TrialStore(load_sweep(sweep_of(recipe, **RATES)), tmp_path / "other")
        other.share_rows([[1, 2]], {"rows.jsonl": "abc"})
        other.share_rows([[1, 2]], {"rows.jsonl": "abd"})


def test_a_full_disk_ends_the_worker_and_not_the_trial(recipe, tmp_path, monkeypatch):
    def full(run, facts):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = sweep_of(recipe, **RATES)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log_line", full)
        with pytest.raises(LorakitError, match="the disk is full"):
            work(path, tmp_path / "sweep")
    store = TrialStore(load_sweep(path), tmp_path / "sweep")
    assert store.claim().trial.user_attrs["starts"] == 1


def test_a_damaged_folder_is_refused_and_a_half_made_one_completed(recipe, tmp_path):
    sweep, folder = load_sweep(sweep_of(recipe, **RATES)), tmp_path / "sweep"
    TrialStore(sweep, folder)
    (folder / SWEEP).unlink()  # as if its worker was killed just before
    assert len(TrialStore(sweep, folder).trials) == 4
    journal = folder / JOURNAL
    journal.write_text(journal.read_text() + '{"op_code": 5, "wor')  # as a kill or a full disk leaves it
    assert TrialStore(sweep, folder).claim().trial.number == 0
    assert [one.state.name for one in TrialStore(sweep, folder).trials] == ["RUNNING", *["WAITING"] * 3]
    journal.write_text("none of Optuna's\n" + journal.read_text())
    with pytest.raises(UserError, match=r"journal\.log: damaged"):
        TrialStore(sweep, folder)
    (folder / SWEEP).write_text("{")
    with pytest.raises(UserError, match=r"sweep\.json: damaged"):
        TrialStore(sweep, folder)


def test_paths_begin_where_the_sweep_lies_and_texts_are_kept(recipe, tmp_path):
    below = tmp_path / "below"
    below.mkdir()
    write_rows(below / "more.jsonl", rows_of(12))
    keys = {"extends": "../recipe.yaml", "data.train": "more.jsonl", "data.system": 'Grüße 😀 \u2028 "x"', **RATES}
    (below / "rates.yaml").write_text(yaml.safe_dump(keys))
    trial = load_sweep(below / "rates.yaml").load({"train.learning_rate": 0.1}, tmp_path / "😀")
    assert trial.recipe.data.train == str(below / "more.jsonl")
    assert trial.recipe.data.system == keys["data.system"] and trial.recipe.output.dir == str(tmp_path / "😀")


def test_equal_values_of_other_kinds_are_two_trials():
    space = Choices((0.0, False, 0))
    assert [space.encode(value) for value in space.values] == [0, 1, 2]


MISTAKES = [
    ({"train.learning_rat": [1, 2]}, "train.learning_rat", "learning_rate"),
    ({"train.learning_rate": [0.1, "fast"]}, "train.learning_rate", "'fast'"),
    ({"train.learning_rate": []}, "train.learning_rate", "no values"),
    ({"train.learning_rate": [0.1, 0.1]}, "train.learning_rate", "twice"),
    ({"train.learning_rate": {"log": [0, 1]}}, "train.learning_rate", "above 0"),
    ({"train.learning_rate": {"log": [1, 0.1]}}, "train.learning_rate", "higher one"),
    ({"adapter.rank": {"log2": [3, 8]}}, "adapter.rank", "powers of two"),
    ({"train.warmup": {"range": [0.0, 0.5]}, "sweep": {"search": "grid"}}, "train.warmup", "points"),
    ({"train.learning_rate": 0.1}, "", "nothing to try"),
    ({"train.learning_rate": [0.1, 0.2], "sweep": {"prune": "halving"}}, "sweep.prune", "successive-halving"),
    ({"train.learning_rate": [0.1, 0.2], "sweep": {"budget": "soon"}}, "sweep.budget", "2h"),
    ({"train.learning_rate": [0.1, 0.2], "sweep": {"prunes": "none"}}, "sweep.prunes", "Did you mean prune?"),
    ({"train.learning_rate": [0.1, 0.2], "output": {"dir": "x"}}, "output.dir", "folder of its own"),
    ({"train.learning_rate": [0.1, 0.2], "sweep": {"trials": 5}}, "sweep.trials", "search: random"),
    ({"train.learning_rate": [0.1, 0.2], "name": ["a", "b"]}, "name", "is a text"),
    ({"train.learning_rate": [0.1, 0.2], "data.eval": None}, "data.eval", "no held-out rows"),
    ({"train": {"learning_rate": [0.1, 0.2]}, "train.learning_rate": [0.1]}, "train.learning_rate", "twice"),
]


@pytest.mark.parametrize(("keys", "path", "text"), MISTAKES)
def test_every_mistake_of_a_sweep_has_its_place(recipe, keys, path, text):
    with pytest.raises(RecipeErrors) as raised:
        load_sweep(sweep_of(recipe, **keys))
    problem = raised.value.problems[0]
    assert problem.path == path and text in str(problem)
    assert problem.place.file.name == "rates.yaml"


def test_keys_may_be_nested_and_values_shared(recipe):
    sweep = load_sweep(sweep_of(recipe, train={"learning_rate": [0.1, 0.2], "steps": 7}, name="my rates"))
    assert sweep.spaces == {"train.learning_rate": Choices((0.1, 0.2))} and sweep.fixed == {"train.steps": 7}
    assert sweep.name == "my-rates" and sweep.search == "grid"
    assert sweep.load({"train.learning_rate": 0.2}).recipe.train.steps == 7


def test_ranges_and_grids():
    assert parse_space({"log": [1e-4, 1e-2], "points": 3}).finite == (0.0001, 0.001, 0.01)
    assert parse_space({"range": [1, 9], "points": 3}).finite == (1, 5, 9)
    assert parse_space({"log2": [4, 32]}) == Choices((4, 8, 16, 32))
    assert parse_space({"range": [0.0, 0.1]}) == Range(0.0, 0.1, False, False)
    made = list(grid({"a": Choices((1, 2, 3)), "b": Choices(("x",))}))
    assert made == [{"a": 2, "b": "x"}, {"a": 1, "b": "x"}, {"a": 3, "b": "x"}]
    assert (parse_duration("1.5h"), parse_duration("90 min"), parse_duration("soon")) == (5400, 5400, None)


def test_a_range_test_suggests_rates_between_the_steepest_fall_and_the_turn():
    rates = [10 ** (-6 + 6 * step / 99) for step in range(100)]
    # falls around 1e-4, lowest at 1e-2, explodes from there
    losses = [3 - 2 / (1 + (1e-4 / rate) ** 2) + (rate / 1e-2) ** 4 for rate in rates]
    result = read_rate_test(list(zip(rates, losses, strict=True)))
    assert 3e-5 <= result.suggested[0] <= 3e-4 and result.suggested[-1] <= 3e-3
    assert list(result.suggested) == sorted(result.suggested)
    assert result.in_words().endswith("where it turns") and f"around {result.steepest:.2g}" in result.in_words()
    falling = read_rate_test([(rate, 3 - step / 50) for step, rate in enumerate(rates)])
    assert falling.in_words().endswith("the highest rate tried: try --to with a higher one")
    with pytest.raises(LorakitError, match="not one loss was a number"):
        read_rate_test([])
    flat = read_rate_test([(rate, 2.0) for rate in rates])
    assert flat.suggested == () and "no rate" in flat.in_words()


def test_lr_trains_with_rising_rates_and_leaves_nothing(recipe, lorakit, monkeypatch):
    monkeypatch.chdir(recipe.parent)
    before = sorted(recipe.parent.rglob("*"))
    code, out, err = lorakit("lr", recipe, "--steps", "20", "--to", "10", "--json")
    assert code == 0, err
    rates = [step["learning_rate"] for step in json.loads(out)["steps"]]
    assert rates[0] == pytest.approx(1e-6) and rates[-1] == pytest.approx(10)
    assert rates == sorted(rates) and len(rates) == 20
    assert sorted(recipe.parent.rglob("*")) == before
    assert lorakit("lr", recipe, "--from", "1", "--to", "0.1")[0] == 2
