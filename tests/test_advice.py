"""Advice: each note where it should be, and none on a sane recipe."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lorakit.hardware.gpus import find_gpu
from lorakit.hardware.machine import Machine, machine_with
from lorakit.plan.advice import collect_advice, rows_with_changing_facts
from lorakit.plan.changes import Change, SettingChange
from lorakit.plan.estimate import Plan, RowEstimate, assume_rows, plan_run
from lorakit.plan.model_info import find_model_info
from lorakit.recipe.schema import Adapter, Data, Model, Recipe, Train

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
INFO = find_model_info(BASE, "main")
GPU = machine_with(find_gpu("H100 SXM"))
# A run of 2,000 rows for three epochs that nothing is to be said about: 200,000 tokens are trained on.
ROWS = {"count": 2000, "held_out": 200, "longest": 400, "mean": 200.0, "trained": 0.5, "overlong": 0.0}
DEBIAN = Path(__file__).parent.parent / "recipes" / "debian-json"


def plan_of(recipe: Recipe, machine: Machine = GPU, steps=None, padding=0.05, parameters=5_000_000, **rows) -> Plan:
    """A plan with some of its figures replaced."""
    estimate = RowEstimate(**{"lengths": (1,), "counted": "", **ROWS, **rows})
    plan = plan_run(recipe, INFO, estimate, machine)
    trainable = replace(plan.trainable, matrices=parameters)
    return replace(plan, load=replace(plan.load, trainable=trainable), steps=steps or plan.steps, padding=padding)


def recipe_of(adapter=None, train=None, data=None, model=None) -> Recipe:
    return Recipe(
        model=Model(base=BASE, **(model or {})),
        adapter=Adapter(**(adapter or {})),
        data=Data(**{"train": "/train.jsonl", "eval": 0.1, **(data or {})}),
        train=Train(**(train or {})),
    )


def notes(adapter=None, train=None, data=None, model=None, fits_unquantized=True, **known):
    plan = plan_of(recipe_of(adapter, train, data, model), **known)
    change = Change((SettingChange("model.quantization", "none", "", 0),), plan, None)
    return collect_advice(plan, [change] if fits_unquantized else [], INFO)


def test_a_sane_recipe_gets_no_advice():
    assert notes() == []


def test_what_is_not_known_is_not_advised_on():
    plan = plan_run(recipe_of(), INFO, assume_rows(1024, "no rows here"), GPU)
    assert collect_advice(plan, [], INFO) == []


@pytest.mark.parametrize(
    ("about", "number", "changed"),
    [
        ("data.train", "120 rows", {"count": 120, "steps": 100, "train": {"batch_size": 4}}),
        ("data.eval", "no held-out", {"data": {"eval": None}}),
        ("data.eval", "20 held-out", {"held_out": 20}),
        ("data.max_length", "12% of the rows", {"overlong": 0.12}),
        ("data.max_length", "10 times the longest", {"longest": 102}),
        ("data.packing", "40% of the tokens", {"padding": 0.4, "data": {"packing": "off"}}),
        ("train.epochs", "seen 16.0 times", {"steps": 2000}),
        ("train.steps", "seen 16.0 times", {"steps": 2000, "train": {"steps": 2000, "epochs": None}}),
        ("train.batch_size", "60 steps", {"steps": 60}),
        ("train.batch_size", "64 rows a step", {"train": {"batch_size": 64}, "steps": 100}),
        ("adapter.rank", "100,000 trained parameters", {"parameters": 100_000}),
        ("adapter.rank", "rank 4 has 10 a token", {"adapter": {"rank": 128}, "parameters": 80_000_000}),
        ("adapter.rank", "256 is more than", {"adapter": {"rank": 256}}),
        ("train.learning_rate", "0.026 is 20 times above", {"train": {"learning_rate": 0.026}}),
        ("train.learning_rate", "5.2e-05 is 25 times below", {"train": {"learning_rate": 5.2e-5}}),
        ("adapter.alpha", "256/16 = 16", {"adapter": {"alpha": 256}}),
        ("adapter.dropout", "0.1 over 375 steps", {"adapter": {"dropout": 0.1}}),
        ("train.optimizer", "29 MiB", {"train": {"optimizer": "adamw-8bit"}}),
        ("model.quantization", "without nf4", {"model": {"quantization": "nf4"}}),
    ],
)
def test_each_note_states_the_number_and_a_source(about, number, changed):
    (note,) = notes(**changed)
    assert note.about == about
    assert number in note.text
    assert note.source


def test_few_rows_are_measured_with_a_prompt_first():
    few = {"count": 120, "steps": 100, "train": {"batch_size": 4}, "sample": [("Hello?", "Hi.")]}
    assert notes(**few)[0].text.endswith(
        "Measure first what the base does with examples in its prompt: lorakit eval RECIPE --few-shot 5"
    )
    texts = notes(**few | {"data": {"eval": None}}), notes(**few | {"sample": [("", "A document.")]})
    assert not any("--few-shot" in note.text for one in texts for note in one)


def test_full_fine_tuning_gets_no_advice_on_adapters():
    assert notes(adapter={"kind": "none"}, train={"batch_size": 64}, steps=100) == []


def test_what_saves_needed_memory_is_left_alone():
    train = {"optimizer": "paged-adamw-8bit", "micro_batch": 1, "gradient_checkpointing": True}
    recipe = recipe_of(model={"quantization": "nf4"}, train=train)
    tight = Machine("cuda", "a small card", int(plan_of(recipe).longest.total / 0.92) + 2**20, bfloat16=True)
    plan = plan_of(recipe, tight)
    assert plan.fits == "yes" and collect_advice(plan, [], INFO) == []


PRICES = [(f"What does the {name} cost?", f"The {name} costs ${price}.99.") for price, name in enumerate("ABCDEFGHIJ")]
NAMES = ["Acme", "Borealis", "Cumulus", "Dorado", "Ember", "Fjord", "Garnet", "Halo", "Iris", "Jade"]
RELEASES = [(f"When does {name} ship?", f"It ships in {2026 + at}.") for at, name in enumerate(NAMES)]


@pytest.mark.parametrize("texts", [PRICES, RELEASES])
def test_rows_that_teach_changing_facts_are_found(texts):
    assert rows_with_changing_facts(texts) == list(range(10))
    (note,) = notes(sample=texts)
    assert note.about == "data" and "10 of 10 rows" in note.text


def test_facts_in_few_rows_are_no_matter():
    plain = [("Write a line about rain.", "It falls, and the street shines.")] * 200
    assert notes(sample=[*PRICES, *plain]) == []


@pytest.mark.parametrize(
    "texts",
    [
        [(f"What is {at} + {2 * at}?", f"{3 * at}.0") for at in range(40)],
        [(f"Take the price out: the lamp costs ${at}.50 today.", f'{{"price": "${at}.50"}}') for at in range(40)],
        [
            (f"Write a reply to {name}, who is unhappy.", f"Dear {name}, we are sorry.")
            for name in map(chr, range(65, 91))
        ],
        [(f"Rewrite in a formal tone: see you at {at}:30", f"I shall see you at {at}:30.") for at in range(10, 24)],
        [("Summarize the article on costs.", "Costs fell as demand did.")] * 40,
    ],
)
def test_tasks_whose_values_stand_in_the_prompt_and_plain_style_are_left_alone(texts):
    assert rows_with_changing_facts(texts) == []


def test_the_shipped_recipe_gets_at_most_two_notes():
    lines = (DEBIAN / "train.jsonl").read_text().splitlines()
    rows = [[message["content"] for message in json.loads(line)["messages"]] for line in lines]
    files = {name: str(DEBIAN / f"{name}.jsonl") for name in ("train", "eval")}
    recipe = recipe_of(data={**files, "max_length": 128}, train={"steps": 100, "epochs": None, "batch_size": 8})
    lengths = {"longest": 85, "mean": 42.0, "trained": 51157 / 2433 / 42}
    sample = [(question, answer) for question, answer in rows]
    plan = plan_of(recipe, count=2433, held_out=258, parameters=4_884_480, sample=sample, **lengths)
    assert collect_advice(plan, [], INFO) == []
