"""Figures that answers have from nowhere: seen in closed-book questions, and in no task that gives its answers."""

import json
import random
from pathlib import Path

import pytest
from eval_runs import make_run

from lorakit.data.figures import measure_figures
from lorakit.data.sources import sources_of
from lorakit.evaluate.diagnosis.support import UNSUPPORTED
from lorakit.plan.row_sample import sample_source
from lorakit.plan.row_texts import compare_figures
from lorakit.recipe.load import load

RECIPES = Path(__file__).parent.parent / "recipes"
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August"]


def birthdays(count: int, form: str = "On {day} {month} {year}.", seed: int = 0) -> list[tuple[str, str]]:
    """Questions for a date that nothing but the answer gives."""
    draw = random.Random(seed)
    return [
        (
            f"When was {''.join(draw.choices('abcdefghij', k=8)).title()} born?",
            form.format(day=draw.randint(1, 28), month=draw.choice(MONTHS), year=draw.randint(1700, 1999), number=at),
        )
        for at in range(count)
    ]


@pytest.mark.parametrize(
    "form",
    [
        "On {day} {month} {year}.",
        "{month} {day}, {year}",
        "{year}-03-{day}",
        "{year}年3月{day}日",
        "{year}{day}{number}",
    ],
)
def test_dates_that_no_prompt_gives_are_seen_in_every_writing(form):
    rows = birthdays(600, form)
    support = measure_figures(rows[:60], [answer for _, answer in rows[60:]])
    assert support.answers == 60 and support.unsupported >= 40 and support.is_low
    assert str(support).startswith(f"{support.unsupported} of 60 answers have figures ('")


@pytest.mark.parametrize(
    "rows",
    [
        [(f"{at} and {2 * at}?", f"{3 * at}") for at in range(60)],
        [(f"The lamp costs {at}.50 today.", json.dumps({"price": f"{at}.50"})) for at in range(60)],
        [(f"Rate text {chr(65 + at % 26)}.", f"{at % 5} of 5") for at in range(60)],
        [("Say something.", f"It falls, and the street {chr(97 + at % 26) * at} shines.") for at in range(60)],
        [(f"Today is 1 May 2026. Rate {chr(65 + at % 26)}.", f"{at % 5}") for at in range(60)],
    ],
)
def test_what_is_computed_copied_or_a_label_is_supported(rows):
    support = measure_figures(rows[::3], [answer for at, (_, answer) in enumerate(rows) if at % 3])
    assert support.unsupported == 0 and not support.is_low


def test_a_number_that_every_prompt_has_supports_nothing():
    rows = [(f"Today is 1 May 2026.\n{question}", answer) for question, answer in birthdays(100)]
    assert measure_figures(rows[:30], [answer for _, answer in rows[30:]]).is_low


def test_few_answers_or_none_say_nothing():
    rows = birthdays(60)
    assert not measure_figures(rows[:9], [answer for _, answer in rows[9:]]).is_low
    assert measure_figures([], ["1"]) is None and measure_figures(rows, []) is None


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*/recipe.yaml")), ids=lambda path: path.parent.name)
def test_no_task_of_the_gallery_asks_for_what_it_does_not_give(recipe):
    data = load(recipe).recipe.data
    sides = ([sample_source(source) for source in sources_of(data, side)] for side in (data.train, data.eval))
    figures = compare_figures(*([(one.opened, one.readable) for one in side] for side in sides), 0.0)
    assert figures is None if data.format == "text" else figures.share < 0.05


@pytest.fixture(scope="module")
def closed_book(tmp_path_factory, tiny_base):
    """A run on questions for dates, of which a share is held out."""
    folder = tmp_path_factory.mktemp("closed-book")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in birthdays(80)))
    data, train = {"train": str(rows), "eval": 0.25}, {"steps": 1, "eval_every": 1, "save_every": 1}
    return make_run(folder / "run", tiny_base, data=data, train=train, evaluate={"max_new_tokens": 2})


def test_plan_data_and_eval_give_the_same_figure(closed_book, lorakit):
    recipe = closed_book.folder.parent / "tiny.yaml"
    documents = {}
    for command, place in (("plan", recipe), ("data", recipe), ("eval", closed_book.folder)):
        _, out, err = lorakit(command, place, "--json")
        documents[command] = json.loads(out)
    figures = documents["plan"]["rows"]["figures"]
    assert documents["data"]["figures"] == figures and figures["unsupported"] >= 10
    (finding,) = documents["eval"]["findings"]["data"]
    assert finding["name"] == UNSUPPORTED.name and finding["flagged"] and finding["threshold"] == 0.25
    assert {key: finding["details"][key] for key in figures} == figures
    assert "lorakit new grounded --from grounded-answers" in err and "would have to invent them" in err
    notes = [note["text"] for note in documents["plan"]["advice"] if note["about"] == "data"]
    assert len(notes) == 1 and "would have to invent them" in notes[0] and "--from grounded-answers" in notes[0]
