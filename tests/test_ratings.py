"""Ratings come back to the models that earned them, and say no more than they can."""

import json
import re

import numpy as np
import pytest
from rating_sheets import answered, asked, rated_file

from lorakit.errors import UserError
from lorakit.evaluate.rating.ratings import (
    bootstrap_interval,
    equal_share,
    krippendorff_alpha,
    rating_tables,
    read_ratings,
    report_ratings,
)
from lorakit.evaluate.rating.sheet import write_sheet

NAN = float("nan")


def by_author(**scores):
    """Scores that each author's answers get everywhere; the texts of `answered` tell the author."""

    def given(question, text):
        return next(value for model, value in scores.items() if text.startswith(model[::-1]))

    return given


def test_ratings_come_back_to_the_models_that_earned_them(tmp_path):
    sheet = write_sheet(tmp_path / "sheet", "task", asked(12), answered(12, ("base", "tuned")), seed=5)
    base, tuned = {"accuracy": 2, "style": 3, "safety": 5}, {"accuracy": 4, "style": 3, "safety": "cannot judge"}
    ada = rated_file(tmp_path / "ada.json", sheet, by_author(base=base, tuned=tuned))
    bob = rated_file(
        tmp_path / "bob.json",
        sheet,
        lambda question, text: None if question == "q3" else by_author(base=base, tuned=tuned)(question, text),
        rater="Bob",
        token="bb",
    )
    ratings = read_ratings([ada, bob], sheet.folder)
    assert ratings.raters == ["Ada", "Bob"] and ratings.unsure == 23 and ratings.open == 6
    judged = report_ratings(ratings)
    means = {(one["model"], one["criterion"]): one for one in judged["means"]}
    assert means["base", "accuracy"]["mean"] == 2 and means["tuned", "accuracy"]["mean"] == 4
    assert means["tuned", "accuracy"]["questions"] == 12 and means["tuned", "accuracy"]["ratings"] == 23
    assert means["tuned", "safety"]["questions"] == 0 and np.isnan(means["tuned", "safety"]["mean"])
    compared = {one["criterion"]: one for one in judged["compared"]}
    assert (compared["accuracy"]["model"], compared["accuracy"]["against"]) == ("tuned", "base")
    assert compared["accuracy"]["difference"] == 2 and compared["accuracy"]["win"] == 1
    assert compared["accuracy"]["verdict"] == "better"
    assert compared["accuracy"]["win_interval"] == pytest.approx((0.7575, 1), abs=1e-4)  # Wilson's, of 12 questions
    assert compared["style"]["tie"] == 1 and compared["style"]["verdict"] == "cannot tell at this size"
    assert compared["safety"]["questions"] == 0 and compared["safety"]["verdict"] == "cannot tell at this size"
    agreement = {one["criterion"]: one for one in judged["agreement"]}
    assert agreement["accuracy"]["alpha"] == 1 and agreement["accuracy"]["shared"] == 22
    assert np.isnan(agreement["style"]["alpha"]) and agreement["style"]["equal"] == 1
    titles = [title for title, _, _ in rating_tables(judged)]
    assert titles == ["task: 115 ratings by 2 raters", "tuned against base", "agreement between raters"]
    assert all(len(row) == len(columns) for _, columns, rows in rating_tables(judged) for row in rows)
    json.dumps(judged)


def test_means_are_of_questions_and_differences_of_raters(tmp_path):
    """A strict rater who rates one question more does not shift a comparison, and a question counts once."""
    sheet = write_sheet(tmp_path / "sheet", "task", asked(2), answered(2, ("base", "tuned")), seed=0)
    mild = rated_file(
        tmp_path / "mild.json",
        sheet,
        lambda question, text: {"accuracy": 4 if text.startswith("esab") else 5} if question == "q0" else None,
    )
    strict = rated_file(
        tmp_path / "strict.json",
        sheet,
        lambda question, text: {"accuracy": 1 if text.startswith("esab") else 2 + (question == "q1")},
        rater="Bob",
        token="bb",
    )
    judged = report_ratings(read_ratings([mild, strict], sheet.key))
    base, tuned = (one for one in judged["means"] if one["criterion"] == "accuracy")
    assert base["mean"] == pytest.approx((2.5 + 1) / 2) and tuned["mean"] == pytest.approx((3.5 + 3) / 2)
    assert judged["compared"][0]["difference"] == pytest.approx((1 + 2) / 2)
    assert judged["compared"][0]["verdict"] == "cannot tell at this size"  # of two questions nothing follows


def test_of_one_raters_files_the_newest_counts_and_two_raters_of_one_name_are_refused(tmp_path):
    sheet = write_sheet(tmp_path / "sheet", "task", asked(1), answered(1), seed=0)
    old = rated_file(tmp_path / "old.json", sheet, lambda *_: {"accuracy": 1}, exported="2026-01-02T03:04:05Z")
    new = rated_file(tmp_path / "new.json", sheet, lambda *_: {"accuracy": 5}, exported="2026-01-02T03:04:06Z")
    ratings = read_ratings([new, old, new], sheet.key)
    assert np.nanmin(ratings.scores) == 5 and ratings.raters == ["Ada"]
    assert len(ratings.notes) == 1 and "old.json is left out" in ratings.notes[0]
    twin = rated_file(tmp_path / "twin.json", sheet, lambda *_: {"accuracy": 5}, rater="ada ", token="cc")
    with pytest.raises(UserError, match=r"another rater of the name"):
        read_ratings([old, twin], sheet.key)
    heir = rated_file(tmp_path / "heir.json", sheet, lambda *_: {"accuracy": 5}, rater="Eve")
    with pytest.raises(UserError, match="continues the ratings of"):
        read_ratings([old, heir], sheet.key)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sheet": "0123456789abcdef"}, "ratings of the sheet 0123456789abcdef"),
        ({"version": 2}, "version: 2: input should be 1"),
        ({"kind": "something"}, "not ratings that a sheet's page exported. Export it again"),
        ({"rater": ""}, "rater: ''"),
        ({"rater": None}, "rater: None: input should be a valid string"),
        ({"exported": "yesterday"}, "exported: 'yesterday'"),
        ({"exported": "2026-01-02T03:04:05"}, "should have timezone info"),
        ({"ratings": 3}, "ratings: 3"),
        ({"extra": 3}, "extra: 3"),
        ({"ratings": []}, "none of the files holds a rating"),
        *(
            ({"ratings": [{"question": "q0", "answer": "A", "comment": "", "at": "", "scores": {}} | wrong]}, said)
            for wrong, said in (
                ({"scores": {"accuracy": 6}}, "ratings[0].scores.accuracy: 6: input should be 1, 2, 3, 4, 5 or"),
                ({"scores": {"accuracy": 0}}, "ratings[0].scores.accuracy: 0"),
                ({"scores": {"accuracy": 4.5}}, "ratings[0].scores.accuracy: 4.5"),
                ({"scores": {"accuracy": True}}, "ratings[0].scores.accuracy: True"),
                ({"scores": {"accuracy": "5"}}, "ratings[0].scores.accuracy: '5'"),
                ({"scores": {"taste": 5}}, "does not ask for taste"),
                ({"question": "q9"}, "no question 'q9', answer 'A'"),
                ({"answer": "C"}, "no question 'q0', answer 'C'"),
            )
        ),
        (
            {"ratings": [{"question": "q0", "answer": "A", "comment": "", "at": "", "scores": {}}] * 2},
            "ratings[1]: question 'q0', answer 'A' is rated twice",
        ),
    ],
)
def test_a_damaged_or_foreign_file_is_refused_by_name(tmp_path, changed, said):
    sheet = write_sheet(tmp_path / "sheet", "task", asked(1), answered(1), seed=0)
    path = rated_file(tmp_path / "ada.json", sheet, lambda *_: {"accuracy": 1}, changed=changed)
    with pytest.raises(UserError, match=re.escape(said)) as refused:
        read_ratings([path], sheet.key)
    assert "ada.json" in str(refused.value) or "none of the files" in said


def test_files_that_are_no_ratings_at_all_are_refused_by_name(tmp_path):
    sheet = write_sheet(tmp_path / "sheet", "task", asked(1), answered(1), seed=0)
    good = rated_file(tmp_path / "ada.json", sheet, lambda *_: {"accuracy": 1})
    cut = tmp_path / "cut.json"
    cut.write_text(good.read_text()[:50])
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    listed, short = tmp_path / "listed.json", tmp_path / "short.json"
    listed.write_text("[]")
    short.write_text('{"kind": "lorakit-ratings"}')
    for path, said in (
        (cut, "cut.json: not valid JSON"),
        (binary, "binary.json: not valid JSON"),
        (tmp_path / "none.json", "none.json: there is no such file"),
        (tmp_path, "cannot be read"),
        (listed, "listed.json: not ratings"),
        (short, "short.json: version: field required"),
        (sheet.key, "key.json: not ratings that a sheet's page exported, but the key of a sheet"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            read_ratings([path], sheet.key)
    with pytest.raises(UserError, match=r"ada.json: not the key of a sheet, but ratings that a sheet's page exported"):
        read_ratings([good], good)
    key = json.loads(sheet.key.read_text())
    key["questions"][0]["answers"].pop()
    cut.write_text(json.dumps(key))
    with pytest.raises(UserError, match=r"cut.json: the key is damaged"):
        read_ratings([good], cut)


def _table(text):
    return np.array([[NAN if cell in ".*" else float(cell) for cell in line.split()] for line in text.splitlines()])


# Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), part C: ordinal 0.815, and the example of
# the article on it in Wikipedia: ordinal 0.807 (as the package krippendorff says).
FOUR_OBSERVERS = """\
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 ."""
THREE_CODERS = """\
* * * * * 3 4 1 2 1 1 3 3 * 3
1 * 2 1 3 3 4 3 * * * * * * *
* * 2 1 3 4 4 * 2 1 1 3 3 * 4"""


@pytest.mark.parametrize(("text", "alpha"), [(FOUR_OBSERVERS, 0.815), (THREE_CODERS, 0.807)])
def test_alpha_is_that_of_published_examples(text, alpha):
    assert krippendorff_alpha(_table(text)) == pytest.approx(alpha, abs=5e-4)


def test_alpha_is_its_definition_by_pairs():
    """Observed over expected disagreement, pair by pair, on random ratings with gaps."""
    random = np.random.default_rng(0)
    for _ in range(5):
        ratings = random.integers(1, 6, size=(4, 12)).astype(float)
        ratings[random.random(ratings.shape) < 0.3] = NAN
        units = [unit[~np.isnan(unit)] for unit in ratings.T]
        units = [unit for unit in units if len(unit) > 1]
        pool = np.concatenate(units)

        def distance(one, two, pool=pool):
            low, high = min(one, two), max(one, two)
            between = ((pool >= low) & (pool <= high)).sum()
            return (between - ((pool == low).sum() + (pool == high).sum()) / 2) ** 2

        observed = sum(
            distance(one, two) / (len(unit) - 1)
            for unit in units
            for at, one in enumerate(unit)
            for other, two in enumerate(unit)
            if at != other
        ) / len(pool)
        expected = sum(distance(one, two) for one in pool for two in pool) / (len(pool) * (len(pool) - 1))
        assert krippendorff_alpha(ratings) == pytest.approx(1 - observed / expected)


def test_agreement_is_undefined_where_there_is_none_to_measure():
    assert np.isnan(krippendorff_alpha(_table("1 2 .\n. . 3"))) and np.isnan(equal_share(_table("1 2 .\n. . 3")))
    assert np.isnan(krippendorff_alpha(_table("5 5 5\n5 5 5"))) and equal_share(_table("5 5 5\n5 5 5")) == 1
    assert equal_share(_table("1 2 3\n1 2 4\n1 . 4")) == pytest.approx((6 + 2 + 2) / (6 + 2 + 6))


def test_intervals_cover_the_mean():
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        low, high = bootstrap_interval(random.normal(3.0, 1.0, size=40), seed)
        covered += low <= 3.0 <= high
    assert 0.90 <= covered / 200 <= 0.985
    assert bootstrap_interval(np.arange(9.0), 1) == bootstrap_interval(np.arange(9.0), 1)
