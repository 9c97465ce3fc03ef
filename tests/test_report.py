"""The report: what a run's folder says is on one page that loads nothing, and what rows say is text."""

import html
import json
import re
import shutil
from dataclasses import replace

import pytest
from conftest import open_page
from eval_runs import edit_json, evaluate, labelled_rows, make_run

from lorakit.prepare import reopen_run
from lorakit.progress import Silent
from lorakit.report.chart import Line, draw, short
from lorakit.report.curves import smooth, thin
from lorakit.report.sweep_view import read_sweep
from lorakit.report.watch import RunWatch, frame
from lorakit.report.write import MARK, write_report
from lorakit.run_dir import Run

HOSTILE = "</script><script>document.title='run'</script><img src=x onerror=document.title='run'>{{ 7*7 }}"


@pytest.fixture(scope="module")
def scored(tmp_path_factory, tiny_base):
    """A run, scored, with one row that would be markup and script."""
    folder = tmp_path_factory.mktemp("scored")
    run = make_run(folder, tiny_base, train={"steps": 6, "eval_every": 2, "save_every": 6})
    evaluate(*reopen_run(run.folder, Silent())[:2], Silent())
    file = next(run.evaluations.glob("*.jsonl"))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0] |= {"prompt": HOSTILE, "reference": HOSTILE, "answers": dict.fromkeys(lines[0]["answers"], HOSTILE)}
    lines[1]["answers"] = {name: f"{name} says so" for name in lines[1]["answers"]}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.fixture
def page_text(scored, tmp_path):
    write_report([scored.folder], tmp_path / "page.html", 500)
    return (tmp_path / "page.html").read_text()


def test_training_records_what_the_page_needs(scored):
    manifest = scored.read_manifest()
    assert sum(count for _, _, count in manifest["data"]["lengths"]["train"]) == 22
    assert sum(count for _, _, count in manifest["data"]["lengths"]["eval"]) == 10
    assert manifest["predicted_memory"]["total"] > manifest["predicted_memory"]["weights"] > 0
    samples = [json.loads(line) for line in scored.samples.read_text().splitlines()]
    assert len(samples) == 3
    for sample in samples:
        trained = "".join(text for text, is_trained in sample["stretches"] if is_trained)
        assert re.fullmatch(r'\{"topic": ".*", "number": \d\}<\|im_end\|>', trained)


def test_a_row_that_is_markup_is_shown_as_text(page_text):
    assert page_text.count("<script>") == 1 and "&lt;/script&gt;" in page_text
    assert "<img" not in page_text and "{{ 7*7 }}" in page_text


def test_the_page_says_what_the_folder_says(scored, page_text):
    for line in scored.read_log("eval_loss"):
        assert f"{line['eval_loss']:.4f}" in page_text
    document = json.loads(next(scored.evaluations.glob("*.json")).read_text())
    compared = document["comparisons"][0]["scores"]["loss"]
    assert f"{compared['low']:+.4f} to {compared['high']:+.4f}" in page_text
    for name in (*document["models"], *document["models"]["base"]["scores"]):
        assert f">{name}" in page_text
    for choice in scored.read_manifest()["auto"]:
        assert choice["path"] in page_text
    assert page_text.count('<details class="row"') == 10


def test_a_run_that_was_not_scored_or_is_cut_short_has_a_page(scored, tmp_path, lorakit):
    run = Run(tmp_path / "run")
    shutil.copytree(scored.folder, run.folder)
    shutil.rmtree(run.evaluations)
    run.samples.unlink()
    edit_json(run.manifest, status="interrupted", result=None, predicted_memory=None)
    run.log.write_text(run.log.read_text().splitlines()[0] + '\n{"step": 2, "lo')
    code, out, err = lorakit("report", run.folder)
    assert code == 0, err
    assert str(run.report) in out
    assert "Not scored yet" in run.report.read_text() and "interrupted" in run.report.read_text()
    run.log.unlink()
    assert lorakit("report", run.folder)[0] == 0  # and replaces its own page


def test_what_is_damaged_is_said_and_the_rest_shown(scored, tmp_path, lorakit):
    run = Run(tmp_path / "run")
    shutil.copytree(scored.folder, run.folder)
    manifest = scored.read_manifest()
    manifest["data"]["train"]["read"] = "many"
    run.write_manifest(manifest)
    document = next(run.evaluations.glob("*.json"))
    edit_json(document, findings={"adapter": [1]})
    (run.evaluations / "29991231T000000.json").write_text("{")
    with run.log.open("a") as log:
        log.write('{"step": 7, "loss": NaN, "eval_loss": 1e999, "grad_norm": 1%s}\n' % ("0" * 400))
    code, _, err = lorakit("report", run.folder)
    assert code == 0, err
    page = run.report.read_text()
    for part in ("data, in manifest.json", f"findings, in {document.name}", "29991231T000000.json: these scores"):
        assert f"Damaged, and not shown</strong>: {part}" in page or part in page
    assert "json-valid" in page and "held-out loss" in page and "nan" not in page.partition("</style>")[2]
    assert lorakit("watch", run.folder)[0] == 0


def test_eval_and_train_write_the_page(tmp_path, tiny_base, lorakit):
    run = make_run(tmp_path, tiny_base)
    assert not run.report.exists()
    code, _, err = lorakit("eval", run.folder)
    assert code == 0 and f"report: {run.report}" in err
    assert MARK in run.report.read_text()
    code, _, err = lorakit("train", tmp_path / "tiny.yaml", "--output", run.folder, "--overwrite")
    assert code == 0, err
    assert "Not scored yet" in run.report.read_text()


def test_a_file_that_is_no_report_stays(scored, tmp_path, lorakit):
    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine</p>")
    code, _, err = lorakit("report", scored.folder, "-o", mine)
    assert code == 2 and "lorakit report did not write it" in err
    assert mine.read_text() == "<p>mine</p>"
    assert lorakit("report", scored.folder, "-o", tmp_path)[0] == 2
    assert lorakit("report", tmp_path)[0] == 2


def test_several_runs_are_compared_row_by_row(scored, tmp_path, lorakit):
    other = tmp_path / "other"
    shutil.copytree(scored.folder, other)
    manifest = Run(other).read_manifest()
    manifest["recipe"]["train"]["learning_rate"] = 0.001
    edit_json(Run(other).manifest, recipe=manifest["recipe"])
    code, out, err = lorakit("report", scored.folder, other, "-o", tmp_path / "both.html", "--rows", "8", "--json")
    assert code == 0, err
    assert [run["answers"] for run in json.loads(out)["runs"]] == [4, 4]
    text = (tmp_path / "both.html").read_text()
    assert "<code>train.learning_rate</code>" in text and "<code>0.001</code>" in text
    assert "cannot tell" in text.partition("Recipes")[0]


def test_a_classification_has_its_confusion_matrix(tmp_path, tiny_base):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in labelled_rows(24)))
    data = {"train": str(rows), "eval": 0.5, "format": "classification"}
    run = make_run(tmp_path / "run", tiny_base, data=data, evaluate={"metrics": []})
    evaluate(*reopen_run(run.folder, Silent())[:2], Silent())
    write_report([run.folder], run.report, 500)
    text = run.report.read_text()
    assert "Confusion matrix, base" in text and text.count('class="matrix"') == 2


def test_a_long_run_stays_small_and_keeps_its_peaks(scored, tmp_path):
    run = Run(tmp_path / "long")
    shutil.copytree(scored.folder, run.folder)
    steps = [
        {"step": step, "loss": 2 - step / 5000 + (9 if step == 3333 else 0), "grad_norm": 1.0}
        for step in range(1, 5001)
    ]
    run.log.write_text("".join(json.dumps({**line, "learning_rate": 1e-4}) + "\n" for line in steps))
    file = next(run.evaluations.glob("*.jsonl"))
    lines = file.read_text().splitlines()
    file.write_text("".join(line + "\n" for line in lines * 50))
    facts = write_report([run.folder], run.report, 500)
    assert facts["runs"][0]["answers"] == 500 and facts["bytes"] < 3_000_000
    assert "10.333" in run.report.read_text()  # the peak of step 3333


def test_thinning_keeps_ends_and_extremes():
    points = tuple((float(step), float((step * 7919) % 1000)) for step in range(10_000))
    thinned = thin(points, 400)
    assert len(thinned) <= 402 and thinned[0] == points[0] and thinned[-1] == points[-1]
    assert {max(points, key=lambda one: one[1])[1], 0.0} <= {value for _, value in thinned}
    assert list(thinned) == sorted(thinned)
    assert thin(points[:400], 400) == points[:400]


def test_an_average_of_a_constant_is_the_constant():
    assert {round(value, 9) for _, value in smooth(tuple((float(step), 3.0) for step in range(500)))} == {3.0}


@pytest.mark.parametrize(
    "points",
    [
        ((1.0, 2.0),),
        ((1.0, 0.0), (2.0, 0.0)),
        ((1.0, -3.0), (2.0, 5e8)),
        ((1.0, 1e-9), (2.0, 1e3)),
        ((1.0, 0.99999), (2.0, 1.00001)),
    ],
)
def test_any_values_fit_on_their_chart(points):
    chart = draw("any", [Line("values", points)])
    numbers = [float(number) for number in re.findall(r"-?\d+\.?\d*", chart.lines[0].path)]
    assert all(chart.left <= x <= chart.right for x in numbers[::2])
    assert all(chart.top <= y <= chart.bottom for y in numbers[1::2])
    assert 2 <= len(chart.y_ticks) <= 9
    assert draw("none", [Line("values", ())]) is None


@pytest.mark.parametrize(("value", "text"), [(0.0, "0"), (0.00065, "6.5e-4"), (12345.6, "12,346"), (0.19334, "0.1933")])
def test_numbers_are_short(value, text):
    assert short(value) == text


def test_the_page_works_in_a_browser(browser, scored, tmp_path):
    file = tmp_path / "page.html"
    write_report([scored.folder], file, 500)
    with browser.new_context(viewport={"width": 390, "height": 800}) as context:
        page = open_page(context, file)
        assert page.title() == "tiny · lorakit report"
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        rows = page.locator(".row:visible")
        assert rows.count() == 10
        page.get_by_label("changed").check()
        changed = rows.count()
        assert 1 <= changed < 10
        page.get_by_label("all", exact=True).check()
        page.get_by_label("Search").fill("ONERROR")
        assert rows.count() == 1
        page.get_by_role("button", name="open all").click()
        assert HOSTILE in rows.first.inner_text()
        chart = page.locator(".chart svg").first
        chart.focus()
        page.keyboard.press("End")
        assert page.locator(".chart .reading").first.inner_text().startswith("step 6: ")
        assert page.faults == []


def test_watch_looks_once_where_there_is_no_terminal(scored, lorakit, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setenv("LINES", "40")
    code, out, err = lorakit("watch", scored.folder)
    assert code == 0, err
    assert "finished, step 6 of 6" in out and "held-out loss" in out and "gradient norm" in out
    assert all(len(line) <= 70 for line in out.splitlines() if "/" not in line)
    code, out, _ = lorakit("watch", scored.folder, "--json")
    assert code == 0 and json.loads(out)["steps_done"] == 6
    assert lorakit("watch", scored.folder.parent)[0] == 2


def test_the_time_left_is_told_from_the_steps_that_were_seen(scored):
    watched = RunWatch(scored)
    summary = replace(watched.look(), state="running", steps_planned=30)
    assert watched.seconds_left(summary) is None
    watched.seen[:] = [(100.0, 2), (110.0, 4), (120.0, 6)]
    assert watched.seconds_left(summary) == pytest.approx(24 * 5)
    assert "2 min left" in frame(watched, summary, 100, 30).head
    assert frame(watched, summary, 20, 4).charts == ()


def test_a_sweeps_page_names_the_trials_that_are_not_ranked(tmp_path):
    trials = [
        {"number": 0, "values": {"train.steps": 3}, "state": "finished", "loss": 0.5, "steps": 3},
        {"number": 1, "values": {"train.steps": 2}, "state": "cut short", "loss": 0.75, "steps": 1},
        {"number": 2, "values": {"train.steps": 1}, "state": "failed", "loss": None, "reason": "no memory"},
        {"number": 3, "values": {"train.steps": 4}, "state": "waiting"},
    ]
    ranking = {"name": "s", "in_words": "the first one is the best", "trials": trials, "candidates": []}
    (tmp_path / "ranking.json").write_text(json.dumps(ranking))
    view, _ = read_sweep(tmp_path)
    assert view.others == (
        "cut short: train.steps 2 (loss 0.7500 at step 1)",
        "failed: train.steps 1: no memory",
    )


def test_several_runs_show_values_as_a_recipe_has_them_and_who_is_not_scored(scored, tmp_path):
    other = shutil.copytree(scored.folder, tmp_path / "other")
    shutil.rmtree(other / "eval")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["recipe"]["data"]["system"], manifest["recipe"]["evaluate"]["metrics"] = "Be brief.", ["rouge-l"]
    (other / "manifest.json").write_text(json.dumps(manifest))
    write_report([scored.folder, other], tmp_path / "page.html", 20)
    page = html.unescape((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "Not compared: other: not scored." in page
    assert "<code>null</code></td><td><code>Be brief.</code>" in page and '<code>["rouge-l"]</code>' in page
