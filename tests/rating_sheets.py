"""Rating sheets of made-up answers, and files as their page exports them."""

import json
from html.parser import HTMLParser

from lorakit.evaluate.rating.sheet import Question

EXPORTED = "2026-01-02T03:04:05.000Z"


def asked(count):
    """Questions with the ids q0, q1, ..."""
    return [Question(f"q{number}", [{"role": "user", "content": f"Question {number}?"}]) for number in range(count)]


def answered(count, models=("zebra-7f", "yak-9c")):
    """Of each model an answer to each question, which begins with its name backwards."""
    return {model: [f"{model[::-1]} says {number}" for number in range(count)] for model in models}


def data_of(sheet):
    """What the page embeds, read as a browser does."""
    found = {}

    class Reader(HTMLParser):
        script = False

        def handle_starttag(self, tag, attrs):
            self.script = tag == "script" and ("id", "data") in attrs

        def handle_data(self, text):
            if self.script:
                found["data"] = found.get("data", "") + text
                self.script = False

    Reader().feed(sheet.page.read_text())
    return json.loads(found["data"])


def rated_file(path, sheet, scores, rater="Ada", token="aa", exported=EXPORTED, changed=None):
    """A file as the page exports it; `scores(question id, answer text)` gives the scores of a shown answer, or None."""
    ratings = []
    for question in data_of(sheet)["questions"]:
        for letter, text in zip("ABCDEFGH", question["answers"], strict=False):
            given = scores(question["id"], text)
            if given is not None:
                rated = {"question": question["id"], "answer": letter, "scores": given, "comment": "", "at": exported}
                ratings.append(rated)
    facts = {"kind": "lorakit-ratings", "version": 1, "sheet": sheet.id, "name": "a", "rater": rater, "token": token}
    facts |= {"started": exported, "exported": exported, "ratings": ratings}
    path.write_text(json.dumps(facts | (changed or {})))
    return path
