"""A finding's sentence shows the figures and answers that it is about, and no number that only a machine writes."""

from lorakit.evaluate.diagnosis.examination import FORGETTING
from lorakit.evaluate.diagnosis.finding import describe_finding, format_number
from lorakit.evaluate.diagnosis.style import FORMAT, LENGTH, UNFINISHED, VARIETY


def test_answers_that_are_all_the_same_are_shown():
    details = {"most frequent answers": [{"text": "yes", "share": 0.996}, {"text": "no\n", "share": 0.004}]}
    said = describe_finding(VARIETY.measured(1.21e-16, True, None, details))
    assert said.startswith(
        "the answers are nearly all the same (variety 0.00, expected at least 0.5); the most frequent"
    )
    assert r"'yes' (>99%), 'no\n' (<1%)" in said and "below" not in said


def test_answers_that_do_not_end_are_counted():
    said = describe_finding(UNFINISHED.measured(1.0, True, None, {"answers cut": 1.0, "references longer": 0.0}))
    assert said.startswith("100% of the answers hit max_new_tokens, and 0% of the references are longer. Raise")


def test_answers_of_another_length_say_which_way():
    said = describe_finding(LENGTH.measured(4.0, True, None, {"answers over references": 0.25}))
    assert said.startswith("the answers are 4 times shorter than the references. Look")


def test_the_others_say_number_and_threshold():
    assert describe_finding(FORGETTING.measured(1.5, True, None, {})).startswith(
        f"{FORGETTING.name}: 1.5 {FORGETTING.unit} ("
    )
    assert [format_number(value) for value in (1.21e-16, -1e-9, 0.25, 12345.6)] == [
        "0.000",
        "0.000",
        "0.25",
        "1.23e+04",
    ]


def test_answers_of_another_format_say_which():
    details = {"formats of answers": {"prose": 0.7, "JSON": 0.3}, "formats of references": {"JSON": 1.0}}
    said = describe_finding(FORMAT.measured(0.7, True, None, details))
    assert said.startswith("the answers begin with prose (70%), JSON (30%), the references with JSON (100%). Look")
