"""The schedule of a run, of two steps too: every step learns, a fraction is no more often than it is of use."""

import json

import pytest
import torch
from runs_of_tests import run_recipe
from test_cli import lorakit_run as lorakit_run
from transformers import get_scheduler

from lorakit.errors import UserError
from lorakit.plan.schedule import describe_schedule, interval_steps, occurrences, rate_share, warmup_steps
from lorakit.prepare import prepare_run
from lorakit.progress import Silent
from lorakit.recipe.load import load
from lorakit.recipe.schema import Train
from lorakit.train.arguments import training_arguments


def logged(run, key):
    lines = [json.loads(line) for line in run.log.read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 2), (1, 2), (3, 40), (39, 40), (0.03, 3), (0.9, 2)])
def test_every_step_learns_and_a_warm_up_only_rises(schedule, warmup, steps):
    rising = warmup_steps(Train(warmup=warmup, steps=steps), steps)
    shares = [rate_share(step, schedule, rising, steps) for step in range(steps)]
    assert all(0 < share <= 1 for share in shares) and max(shares) == 1
    assert shares[: rising + 1] == sorted(shares[: rising + 1]) and shares[rising] == 1
    assert shares[rising:] == sorted(shares[rising:], reverse=True)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_after_the_warm_up_the_rate_is_that_of_transformers(schedule):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, optimizer, num_warmup_steps=7, num_training_steps=30)
    for step in range(30):
        if step >= 7:
            assert rate_share(step, schedule, 7, 30) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(("share", "steps", "expected"), [(0.03, 2, 0), (0.03, 16, 0), (0.03, 17, 1), (0.03, 100, 3)])
def test_a_warm_up_that_rounds_to_less_than_a_step_is_none(share, steps, expected):
    assert warmup_steps(Train(warmup=share), steps) == expected


@pytest.mark.parametrize(
    ("every", "steps", "apart", "number"),
    [
        *[(0.1, 1, 1, 1), (0.1, 2, 1, 2), (0.1, 6, 3, 2), (0.1, 12, 5, 3), (0.1, 75, 8, 10)],
        *[(0.5, 75, 38, 2), (1, 6, 1, 6), (0.001, 200, 5, 40), (100, 6, 100, 1)],
    ],
)
def test_a_fraction_is_five_steps_or_half_of_a_short_run_and_a_number_is_itself(every, steps, apart, number):
    assert (interval_steps(every, steps), occurrences(every, steps)) == (apart, number)


def test_a_small_run_learns_in_its_first_step_and_evaluates_as_often_as_it_says(recipe_file, tmp_path):
    settings = {"steps": 6, "epochs": None, "eval_every": 0.1, "save_every": 0.1, "schedule": "constant", "keep": 9}
    run, _ = run_recipe(recipe_file(train=settings), tmp_path / "run")
    assert list(logged(run, "learning_rate").values()) == [0.05] * 6
    assert list(logged(run, "eval_loss")) == [3, 6]
    assert [folder.name for folder in run.complete_checkpoints()] == ["step-000003", "step-000006"]
    rising, _ = run_recipe(recipe_file(train={**settings, "warmup": 2}), tmp_path / "rising")
    assert list(logged(rising, "learning_rate").values()) == pytest.approx([0.05 / 3, 0.1 / 3, 0.05, 0.05, 0.05, 0.05])


def test_the_schedule_is_told_before_a_run_begins(recipe_file, lorakit_run):
    settings = {"steps": 6, "epochs": ..., "eval_every": 0.1, "save_every": 2, "warmup": 1, "learning_rate": 0.0002}
    code, _, err = lorakit_run("train", recipe_file(train=settings), "--dry-run")
    assert code == 0
    assert "steps: 6 of 4 rows; learning rate 0.0002, cosine, after 1 step of warm-up" in err
    assert "held-out loss: 2 times, every 3 steps and after the last step\n" in err
    assert "checkpoints: 3 times, every 2 steps and after the last step\n" in err
    words = describe_schedule(Train(steps=200, warmup=0, learning_rate=1e-4), 200, held_out=False)
    assert words[0].endswith("cosine, no warm-up") and words[1].startswith("checkpoints: 10 times, every 20 steps")
    assert "more" not in words[1] and len(words) == 2


def test_a_plan_reckons_with_the_evaluations_that_the_run_makes(recipe_file, monkeypatch, lorakit_run):
    from lorakit.plan import estimate

    seen = []
    original = estimate.run_workload

    def noted(*arguments, **named):
        seen.append((arguments, named))
        return original(*arguments, **named)

    monkeypatch.setattr(estimate, "run_workload", noted)
    path = recipe_file(train={"steps": 6, "epochs": ..., "eval_every": 0.1})
    assert lorakit_run("plan", path)[0] == 0
    _, named = seen[0]
    assert named["held_out"] == round(2 * 10 * named["length"])  # 10 held-out rows, twice


def test_a_warm_up_as_long_as_the_run_is_refused(recipe_file, tmp_path):
    """Where the recipe says the steps by `check` too, else as soon as the rows are counted."""
    for train in ({"steps": 1, "epochs": None, "warmup": 1}, {"epochs": 1, "batch_size": 50, "warmup": 1}):
        with pytest.raises(UserError, match=r"train\.warmup: 1 step of warm-up in a run of 1: the learning rate"):
            run_recipe(recipe_file(train=train), tmp_path / "run")


def test_the_schedule_falls_to_the_share_that_the_recipe_says_as_transformers_does():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    least = {"min_lr_rate": 0.1}
    theirs = get_scheduler("cosine_with_min_lr", optimizer, 7, 30, scheduler_specific_kwargs=least)
    for step in range(30):
        if step >= 7:
            assert rate_share(step, "cosine", 7, 30, 0.1) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_a_batch_in_tokens_and_the_numbers_of_adamw_reach_the_run(recipe_file, tmp_path):
    train = {"steps": 6, "epochs": None, "batch_size": ..., "batch_tokens": 100, "min_rate": 0.25}
    path = recipe_file(train={**train, "betas": [0.5, 0.75], "epsilon": 1e-3})
    run, _ = run_recipe(path, tmp_path / "run")
    prepared = prepare_run(load(path).recipe, Silent())
    mean = prepared.train.report.mean_length
    settings = prepared.recipe.train
    assert (settings.batch_size, settings.batch_tokens) == (round(100 / mean), None) and settings.batch_size > 1
    assert any(f"100 tokens (batch_tokens) at {mean:,.0f} a row" in str(choice) for choice in prepared.choices)
    rates = list(logged(run, "learning_rate").values())
    assert min(rates) > 0.25 * max(rates) and rates[-1] < 0.5 * max(rates)
    arguments = training_arguments(prepared, run)
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.adam_epsilon) == (0.5, 0.75, 1e-3)
    assert load(run.recipe).recipe.train == settings
