"""Advice: each note where it should be, and none on a sane recipe."""

import json
from pathlib import Path

import pytest

from lorakit.plan.advice import RunFigures, collect_advice, rows_with_changing_facts
from lorakit.recipe.schema import Adapter, Data, Model, Recipe, Train

# A run of 2,000 rows for three epochs that nothing is to be said about.
SANE = {
    "rows": 2000,
    "held_out": 200,
    "longest": 400,
    "overlong": 0.0,
    "trained_tokens": 200_000,
    "parameters": 5_000_000,
    "steps": 375,
    "learning_rate": 2e-4,
    "formula_rate": 2.5e-4,
    "formula": "the formula's words",
    "padding": 0.05,
    "smallest_side": 512,
    "fits_unquantized": True,
    "fits_adamw": True,
}
DEBIAN = Path(__file__).parent.parent / "recipes" / "debian-json"


def notes(adapter=None, train=None, data=None, model=None, **known):
    recipe = Recipe(
        model=Model(base="/model", **(model or {})),
        adapter=Adapter(**(adapter or {})),
        data=Data(**{"train": "/train.jsonl", "eval": 0.1, **(data or {})}),
        train=Train(**(train or {})),
    )
    return collect_advice(recipe, RunFigures(**{**SANE, **known}))


def test_a_sane_recipe_gets_no_advice():
    assert notes() == []


def test_what_is_not_known_is_not_advised_on():
    recipe = Recipe(model=Model(base="/model"), data=Data(train="/train.jsonl", eval=0.1))
    assert collect_advice(recipe, RunFigures()) == []


@pytest.mark.parametrize(
    ("about", "number", "changed"),
    [
        ("data.train", "120 rows", {"rows": 120, "steps": 100, "train": {"batch_size": 4}}),
        ("data.eval", "no held-out", {"data": {"eval": None}}),
        ("data.eval", "20 held-out", {"held_out": 20}),
        ("data.max_length", "12% of the rows", {"overlong": 0.12}),
        ("data.max_length", "10 times the longest", {"longest": 102}),
        ("data.packing", "40% of the tokens", {"padding": 0.4}),
        ("train.epochs", "seen 16.0 times", {"steps": 2000}),
        ("train.steps", "seen 16.0 times", {"steps": 2000, "train": {"steps": 2000, "epochs": None}}),
        ("train.batch_size", "60 steps", {"steps": 60}),
        ("train.batch_size", "64 rows a step", {"train": {"batch_size": 64}, "steps": 100}),
        ("adapter.rank", "100,000 trained parameters", {"parameters": 100_000}),
        ("adapter.rank", "rank 4 has 10 a token", {"adapter": {"rank": 128}, "parameters": 80_000_000}),
        ("adapter.rank", "64 is more than", {"adapter": {"rank": 64}, "smallest_side": 48}),
        ("train.learning_rate", "0.005 is 20 times above", {"learning_rate": 5e-3}),
        ("train.learning_rate", "1e-05 is 25 times below", {"learning_rate": 1e-5}),
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


def test_full_fine_tuning_gets_no_advice_on_adapters():
    assert notes(adapter={"kind": "none"}, train={"batch_size": 64}, steps=100) == []


def test_what_saves_needed_memory_is_left_alone():
    known = {"fits_unquantized": False, "fits_adamw": False}
    assert notes(model={"quantization": "nf4"}, train={"optimizer": "paged-adamw-8bit"}, **known) == []


PRICES = [(f"What does the {name} cost?", f"The {name} costs ${price}.99.") for price, name in enumerate("ABCDEFGHIJ")]
NAMES = ["Acme", "Borealis", "Cumulus", "Dorado", "Ember", "Fjord", "Garnet", "Halo", "Iris", "Jade"]
RELEASES = [(f"When does {name} ship?", f"It ships in {2026 + at}.") for at, name in enumerate(NAMES)]


@pytest.mark.parametrize("texts", [PRICES, RELEASES])
def test_rows_that_teach_changing_facts_are_found(texts):
    assert rows_with_changing_facts(texts) == list(range(10))
    (note,) = notes(texts=texts)
    assert note.about == "data" and "10 of 10 rows" in note.text


def test_facts_in_few_rows_are_no_matter():
    plain = [("Write a line about rain.", "It falls, and the street shines.")] * 200
    assert notes(texts=[*PRICES, *plain]) == []


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
    found = collect_advice(
        Recipe(
            model=Model(base="HuggingFaceTB/SmolLM2-135M-Instruct"),
            data=Data(train=str(DEBIAN / "train.jsonl"), eval=str(DEBIAN / "eval.jsonl"), max_length=128),
            train=Train(steps=100, epochs=None, batch_size=8),
        ),
        RunFigures(
            rows=2433,
            held_out=258,
            longest=85,
            overlong=0.0,
            trained_tokens=51157,
            parameters=4_884_480,
            steps=100,
            learning_rate=1.3e-3,
            formula_rate=1.3e-3,
            padding=0.03,
            smallest_side=192,
            fits_unquantized=True,
            fits_adamw=True,
            texts=[(question, answer) for question, answer in rows],
        ),
    )
    assert found == []
