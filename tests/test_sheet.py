"""A rating sheet tells nothing of whose answers it shows."""

import json
import re

import pytest
from rating_sheets import answered, asked, data_of

from lorakit.errors import UserError
from lorakit.evaluate.rating.sheet import Question, write_sheet

NASTY = (
    '<script>alert("x")</script><img src=x onerror=alert(1)>',
    "</script><!-- <script> ]]> &amp; &",
    "one\u2028two\u2029three\x00\x07",
    "مرحبا \u202eevil\u202c 🙂👩‍👩‍👧",
    "word" * 5000,
    "\n".join(f"* line {number}" for number in range(3000)),
    "half a pair: \ud83d",
    "$style ${data} {name} %s",
)


def test_the_page_is_the_same_whoever_wrote_which_answer(tmp_path):
    answers = answered(30)
    sheet = write_sheet(tmp_path / "one", "task", asked(30), answers, seed=3)
    first, second = answers
    swapped = {first: answers[second], second: answers[first]}
    other = write_sheet(tmp_path / "two", "task", asked(30), swapped, seed=3)
    assert sheet.page.read_bytes() == other.page.read_bytes()
    assert sheet.key.read_bytes() != other.key.read_bytes()


def test_the_page_names_no_model_and_the_order_of_answers_is_no_habit(tmp_path):
    sheet = write_sheet(tmp_path / "sheet", "task", asked(200), answered(200), seed=0)
    text = sheet.page.read_text()
    assert not re.search("zebra|yak-9c", text)
    key = json.loads(sheet.key.read_text())
    first = sum(question["answers"][0] == ["zebra-7f"] for question in key["questions"])
    assert 70 < first < 130  # of 200 tosses of a coin, more than four standard deviations
    other = write_sheet(tmp_path / "other", "task", asked(200), answered(200), seed=1)
    moved = sum(
        one["answers"] != two["answers"]
        for one, two in zip(data_of(sheet)["questions"], data_of(other)["questions"], strict=True)
    )
    assert 70 < moved < 130


def test_equal_answers_are_shown_once_and_credited_to_all(tmp_path):
    answers = {"a": ["same", "x"], "b": [" same\n", "y"], "c": ["other", "x"]}
    sheet = write_sheet(tmp_path / "sheet", "task", asked(2), answers, seed=0)
    assert sheet.answers == 4
    assert [sorted(question["answers"]) for question in data_of(sheet)["questions"]] == [["other", "same"], ["x", "y"]]
    key = json.loads(sheet.key.read_text())
    assert [sorted(question["answers"]) for question in key["questions"]] == [[["a", "b"], ["c"]], [["a", "c"], ["b"]]]


def test_whatever_a_model_writes_stays_text(tmp_path):
    questions = [Question(text[:40], [{"role": "user", "content": text}], text) for text in NASTY]
    answers = {"a": list(NASTY), "b": ["plain"] * len(NASTY)}
    sheet = write_sheet(tmp_path / "sheet", NASTY[1], questions, answers, seed=0)
    page = sheet.page.read_text()
    shown = data_of(sheet)["questions"]
    for text, question in zip(NASTY, shown, strict=True):
        assert text.strip() in question["answers"] and question["reference"] == text
    assert page.count("<script") == page.count("</script>") == 2 and "<img" not in page
    assert not set("\u2028\u2029\x00") & set(page)
    assert "default-src 'none'" in page and "unsafe" not in page


def test_the_page_reaches_for_nothing_outside_itself(tmp_path):
    page = write_sheet(tmp_path / "sheet", "task", asked(1), answered(1), seed=0).page.read_text()
    assert not re.search(r"""https?:|src=|url\(|@import|fetch\(|XMLHttp|innerHTML|eval\(""", page)


def test_a_sheet_replaces_itself_and_nothing_else(tmp_path):
    folder = tmp_path / "sheet"
    sheet = write_sheet(folder, "task", asked(2), answered(2), seed=0)
    assert write_sheet(folder, "task", asked(2), answered(2), seed=0) == sheet
    with pytest.raises(UserError, match="holds another sheet"):
        write_sheet(folder, "task", asked(2), answered(2), seed=1)
    other = write_sheet(folder, "task", asked(2), answered(2), seed=1, overwrite=True)
    assert other.id != sheet.id
    (folder / "ratings-Ada.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds other things than a sheet \(ratings-Ada.json\)"):
        write_sheet(folder, "task", asked(2), answered(2), seed=2, overwrite=True)
    assert (folder / "ratings-Ada.json").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "key.json").write_text('{"secret": 1}')
    with pytest.raises(UserError, match=r"holds other things than a sheet \(key.json\)"):
        write_sheet(tmp_path / "mine", "task", asked(1), answered(1), seed=0, overwrite=True)
