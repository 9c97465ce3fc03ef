"""The rating sheet in a real browser: what people click and type is what the report says."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import open_page

from lorakit.evaluate.rating.ratings import read_ratings, report_ratings
from lorakit.evaluate.rating.sheet import Question, write_sheet

QUESTIONS = [
    Question("ports", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "SSH?"}], "22"),
    Question("__proto__", [{"role": "user", "content": "<b>HTML</b>?"}]),
    Question("same", [{"role": "user", "content": "The same?"}]),
]
ANSWERS = {
    "zebra": ["zebra says 22", "<img src=x onerror=document.title='hacked'>", "both say this"],
    "yak": ["yak says 21 </script>", "yak <b>says</b>\u2028🙂 مرحبا", "both say this"],
}
CRITERIA = ("accuracy", "style", "safety")


@pytest.fixture
def sheet(tmp_path):
    return write_sheet(tmp_path / "sheet", "A & B", QUESTIONS, ANSWERS, seed=1)


@pytest.fixture
def page(browser, sheet):
    with browser.new_context() as context:
        yield open_page(context, sheet.page)


def letter_of(page, start):
    """The letter under which the question on the page shows the answer that begins so."""
    for letter in "AB":
        if page.get_by_role("group", name=f"Answer {letter}", exact=True).inner_text().startswith(start):
            return letter
    raise AssertionError(f"no answer begins with {start}")


def click(page, letter, criterion, value):
    scale = page.get_by_role("group", name=f"{criterion.capitalize()} of answer {letter}")
    scale.get_by_role("radio", name=str(value), exact=True).check()


def checked(page):
    return page.locator(".scale input:checked").evaluate_all("all => all.map(one => one.name + '=' + one.value)")


def exported(page, folder):
    with page.expect_download() as download:
        page.get_by_role("button", name="Export ratings").click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def test_what_is_clicked_and_typed_survives_a_reload_and_is_what_the_report_says(page, sheet, tmp_path):
    zebra, yak = letter_of(page, "zebra"), letter_of(page, "yak")
    for criterion, score in zip(CRITERIA, (5, 4, "cannot judge"), strict=True):
        click(page, zebra, criterion, score)
    for criterion, score in zip(CRITERIA, (1, 2, 3), strict=True):
        click(page, yak, criterion, score)
    page.get_by_role("textbox", name=f"Comment on answer {zebra}").fill("right, 12345 times")
    page.get_by_role("textbox", name="Your name or alias").fill("Ada L. / 1")
    before = checked(page)
    assert len(before) == 6

    page.reload()
    assert page.get_by_role("textbox", name="Your name or alias").input_value() == "Ada L. / 1"
    assert page.locator("h2").inner_text() == "Question 2 of 3"  # the first with open ratings
    page.get_by_role("button", name="← Previous").click()
    assert checked(page) == before
    assert page.get_by_role("textbox", name=f"Comment on answer {zebra}").input_value() == "right, 12345 times"

    page.keyboard.press("n")
    zebra = letter_of(page, "<img")  # the second question by keys: 1 to 5 rate and go on from scale to scale
    page.keyboard.type("543210" if zebra == "A" else "210543")
    page.keyboard.press("Enter")
    assert page.locator("h2").inner_text() == "Question 3 of 3"
    assert page.locator("article").count() == 1  # equal answers are shown once
    page.keyboard.type("333")
    assert page.locator("#done").inner_text() == "All rated: export your ratings"
    path = exported(page, tmp_path)
    assert path.name == "ratings-Ada-L.-1.json"
    assert "Nothing is open." in page.get_by_role("status").inner_text()
    assert page.title() == "Rating sheet: A & B" and not page.faults

    ratings = read_ratings([path], sheet.key)
    assert ratings.raters == ["Ada L. / 1"] and ratings.unsure == 2 and ratings.open == 0
    (comment,) = ratings.comments
    assert (comment["models"], comment["text"]) == (["zebra"], "right, 12345 times")
    means = {(one["model"], one["criterion"]): one["mean"] for one in report_ratings(ratings)["means"]}
    expected = {"zebra": ((5 + 5 + 3) / 3, (4 + 4 + 3) / 3, (3 + 3) / 2), "yak": (2, 2, 3)}
    assert means == {
        (model, criterion): pytest.approx(value)
        for model, values in expected.items()
        for criterion, value in zip(CRITERIA, values, strict=True)
    }


def test_arrows_move_between_scales_and_questions_and_backspace_takes_a_rating_back(page):
    page.keyboard.press("2")
    assert checked(page) == ["0-accuracy=2"]
    page.keyboard.press("ArrowDown")
    page.keyboard.press("5")
    assert checked(page) == ["0-accuracy=2", "0-safety=5"]
    for _ in range(3):
        page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")  # on a chosen rating: the next one, as in any radio group
    assert checked(page) == ["0-accuracy=3", "0-safety=5"]
    page.keyboard.press("Backspace")
    assert checked(page) == ["0-safety=5"]
    page.keyboard.press("n")
    page.keyboard.press("ArrowRight")
    assert page.locator("h2").inner_text() == "Question 3 of 3"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("p")
    assert page.locator("h2").inner_text() == "Question 1 of 3" and checked(page) == ["0-safety=5"]
    page.get_by_role("textbox", name="Comment on answer A").press_sequentially("n 1 p 2")
    assert checked(page) == ["0-safety=5"] and page.locator("h2").inner_text() == "Question 1 of 3"


def test_an_incomplete_export_says_what_is_open_and_goes_on_in_another_browser(browser, page, sheet, tmp_path):
    page.get_by_role("button", name="Export ratings").click()
    assert "name or an alias first" in page.get_by_role("status").inner_text()
    page.keyboard.type("Ada")  # the field has the focus
    click(page, "B", "style", 4)
    path = exported(page, tmp_path)
    assert "14 ratings still open" in page.get_by_role("status").inner_text()
    with browser.new_context() as context:
        other = open_page(context, sheet.page)
        other.locator("#file").set_input_files(path)
        other.get_by_text("Imported ratings-Ada.json: 14 ratings still open.").wait_for()
        assert checked(other) == ["1-style=4"]
        click(other, "A", "style", 2)
        (tmp_path / "later").mkdir()
        later = exported(other, tmp_path / "later")
    assert json.loads(later.read_text())["token"] == json.loads(path.read_text())["token"]
    ratings = read_ratings([later, path], sheet.key)
    assert ratings.raters == ["Ada"] and len(ratings.notes) == 1 and ratings.open == 13


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "it is damaged"),
        ('{"kind": "lorakit-key"}', "it holds no exported ratings"),
        ('{"kind": "lorakit-ratings", "version": 9}', "another version"),
        ('{"kind": "lorakit-ratings", "version": 1, "sheet": "0"}', "another sheet"),
        ('{"kind": "lorakit-ratings", "version": 1, "sheet": "SHEET"}', "it is damaged"),
        (
            '{"kind": "lorakit-ratings", "version": 1, "sheet": "SHEET", "ratings": [{"question": "x"}]}',
            "it is damaged",
        ),
    ],
)
def test_a_file_that_is_no_export_of_this_sheet_changes_nothing(page, sheet, tmp_path, text, said):
    page.keyboard.press("4")
    path = tmp_path / "file.json"
    path.write_text(text.replace("SHEET", sheet.id))
    page.locator("#file").set_input_files(path)
    page.get_by_role("status").filter(has_text=re.compile(f"^file.json was not imported: .*{said}")).wait_for()
    assert checked(page) == ["0-accuracy=4"]


def test_it_warns_of_leaving_with_what_is_not_exported(page, tmp_path):
    asked = []
    page.on("dialog", lambda dialog: asked.append(dialog.type))
    page.reload()
    assert asked == []
    page.locator("h1").click()  # browsers ask only on pages that somebody has touched
    page.keyboard.press("4")
    page.reload()
    assert asked == ["beforeunload"]
    page.get_by_role("textbox", name="Your name or alias").fill("Ada")
    exported(page, tmp_path)
    page.reload()
    assert asked == ["beforeunload"]


def test_two_tabs_show_the_same_and_another_person_can_start_over(page, sheet):
    other = open_page(page.context, sheet.page)
    page.keyboard.press("4")
    other.get_by_text("1 of 15 ratings").wait_for()
    assert checked(other) == ["0-accuracy=4"]
    other.get_by_text("All questions").click()
    other.get_by_role("button", name="Question 3, 3 open").click()
    assert other.locator("h2").inner_text() == "Question 3 of 3"
    other.get_by_role("button", name="Start over").click()
    page.get_by_text("0 of 15 ratings").wait_for()
    assert checked(page) == checked(other) == []


def test_without_storage_it_says_so_and_goes_on(browser, sheet, tmp_path):
    with browser.new_context() as context:
        context.add_init_script("Object.defineProperty(window, 'localStorage', {get() { throw new Error('no'); }})")
        page = open_page(context, sheet.page)
        assert page.get_by_text("This browser keeps nothing").is_visible()
        page.keyboard.press("4")
        page.get_by_role("textbox", name="Your name or alias").fill("Ada")
        assert json.loads(exported(page, tmp_path).read_text())["ratings"][0]["scores"] == {"accuracy": 4}
        assert not page.faults


def test_what_models_wrote_is_shown_as_text_and_fits_any_screen(browser, tmp_path):
    texts = ["x" * 20000, "<script>document.title = 'hacked'</script>", "\n".join(map(str, range(3000))), "a\tb\n\n  c"]
    questions = [Question(str(number), [{"role": "user", "content": text}], text) for number, text in enumerate(texts)]
    sheet = write_sheet(tmp_path / "sheet", "w" * 300, questions, {"a": texts, "b": ["ok"] * len(texts)}, seed=0)
    for width, scheme in ((1280, "light"), (360, "dark")):
        with browser.new_context(viewport={"width": width, "height": 740}, color_scheme=scheme) as context:
            page = open_page(context, sheet.page)
            for text in texts:
                shown = page.locator(".answer > .text").all_text_contents()
                assert sorted(shown) == sorted([text, "ok"])
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                assert page.evaluate("document.documentElement.scrollHeight") < 6000
                page.keyboard.press("n")
            assert page.title().startswith("Rating sheet") and not page.faults


def test_the_page_is_one_file(sheet, browser, tmp_path):
    """It works where nothing else of the sheet's folder is."""
    alone = Path(shutil.copy(sheet.page, tmp_path / "alone.html"))
    with browser.new_context(offline=True) as context:
        page = context.new_page()
        page.goto(alone.as_uri())
        page.keyboard.press("4")
        assert page.locator("#done").inner_text() == "1 of 15 ratings"
