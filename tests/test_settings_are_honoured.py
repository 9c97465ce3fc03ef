"""Nothing in a recipe is ignored: every field of the schema is read by the code that does the work."""

import sys

from conftest import rows_of, write_rows
from eval_runs import evaluate
from runs_of_tests import run_recipe
from test_metrics import encoder  # noqa: F401 (a fixture)

from lorakit.data.sources import open_source, sources_of
from lorakit.evaluate.models import Prompting
from lorakit.evaluate.prompting import chosen_prompting
from lorakit.hardware.machine import this_machine
from lorakit.plan.auto import resolve_auto
from lorakit.prepare import prepare_run, reopen_run
from lorakit.progress import Silent
from lorakit.recipe.load import load
from lorakit.recipe.schema import Data, Recipe, Section
from lorakit.registry import TRACKERS

# `name` and `output` reach the work through the command line, which this test does not start.
READ_BY_COMMANDS = {("Recipe", "output"), ("Output", "merged"), ("Output", "export"), ("Output", "dir")}
READ_BY_TRACKERS = {
    (entry.settings.__name__, name) for entry in TRACKERS if entry.settings for name in entry.settings.model_fields
}  # in a process of their own
READ_BY_LOAD = {("Jinja", "jinja"), ("Baselines", "system_file")}  # whose texts take their places


def every_field(section: type[Section]) -> set[tuple[str, str]]:
    """The fields of a section and of all below it; made ones, such as KindSettings, hold no settings themselves."""
    own = {(section.__name__, name) for name in section.__annotations__ if name in section.model_fields}
    below = (every_field(kind) for kind in section.__subclasses__() if kind.__name__ != "_OneEntry")
    return own.union(*below)


def reader_of(frame) -> str:
    """The module that reads a field; "" where a setting is only checked."""
    reader = frame.f_globals.get("__name__", "")
    if reader in ("lorakit.recipe.adapter_kind", "lorakit.recipe.fields"):  # they answer for whoever asks
        reader = frame.f_back.f_globals.get("__name__", "")
    checked = any(one.f_code.co_name.endswith("_mistakes") for one in (frame, frame.f_back))
    return "" if checked or reader.startswith("lorakit.recipe") or not reader.startswith("lorakit.") else reader


def test_every_field_is_read_outside_the_recipe_room(recipe_file, tmp_path, monkeypatch, encoder):  # noqa: F811
    seen: set[tuple[str, str]] = set()

    def recorded(self, name):
        if not name.startswith("_") and reader_of(sys._getframe(1)):
            seen.add(("From" if name == "from" else type(self).__name__, name))
        return object.__getattribute__(self, name)

    monkeypatch.setattr(Section, "__getattribute__", recorded)
    turn = {"user": {"jinja_text": "{{ text }}"}, "assistant": "{label}", "train": True}
    columns = {"system": "s", "examples": [{"user": "a", "assistant": "b"}], "turns": [turn], "missing": {"text": "-"}}
    path = recipe_file(
        adapter={"rank": 4, "exclude": ["down_proj"]},
        model={"quantization": "nf4"},
        data={
            "broken": "drop",
            "overlong": "drop",
            "train": [
                "train.jsonl",
                {"path": "labels.jsonl", "format": {"classification": {"labels": ["a", "b"]}}},
                {"path": "columns.jsonl", "format": {"template": columns}},
                {"path": "more.jsonl", "format": {"template": {"user": "{text}", "assistant": "{label}"}}},
                {"path": "talks.jsonl", "format": {"sharegpt": {"roles": {"seeker": "user"}}}, "take": 1},
            ],
        },
        train={"early_stopping": {"patience": 1}, "steps": 4, "epochs": None, "learning_rate": "auto"},
        evaluate={
            "metrics": [
                {"regex": {"pattern": r"\d", "take": "last"}},
                {"bleu": {"tokenize": "char"}},
                {"chrf": {"word_order": 2}},
                {"json-schema": {"schema": {"type": "object"}}},
                {"semantic-similarity": {"model": str(encoder)}},
            ],
            "baselines": {"choose": "similar", "system": "Hi."},
        },
    )
    too_long = {"messages": [{"role": "user", "content": "why " * 400}, {"role": "assistant", "content": "so"}]}
    write_rows(tmp_path / "train.jsonl", [*rows_of(22), {"messages": []}, too_long])
    for name in ("labels.jsonl", "columns.jsonl", "more.jsonl"):
        write_rows(tmp_path / name, [{"text": f"one of {name}", "label": 0}])
    talk = [{"from": "seeker", "value": "one"}, {"from": "gpt", "value": "two"}]
    write_rows(tmp_path / "talks.jsonl", [{"conversations": talk}])
    run_recipe(path, tmp_path / "run")
    resolve_auto(load(path).recipe, this_machine(), None)
    _ = prepare_run(load(path, ["train.epochs=1"]).recipe, Silent()).steps
    run, prepared = reopen_run(tmp_path / "run", Silent())
    evaluate(run, prepared, Silent())
    assert chosen_prompting(prepared.recipe, None, None, None) == Prompting(choose="similar", system="Hi.", seed=42)
    (tmp_path / "someone" / "rows").mkdir(parents=True)
    write_rows(tmp_path / "someone" / "rows" / "train.jsonl", rows_of(3))
    (hub,) = sources_of(Data(train="someone/rows"), "someone/rows")
    assert sum(1 for block in open_source(hub).blocks for _ in block.rows()) == 3

    write_rows(tmp_path / "train.jsonl", rows_of(22))
    words = [{"pissa": {}}, {"eva": {"converged": 0.9}}, {"adalora": {"every": 1}}, {"flexlora": {"every": 1}}]
    for number, kind in enumerate(words):
        short = {"steps": 4, "epochs": None, "eval_every": 4, "save_every": 4}
        run_recipe(recipe_file(adapter={"kind": kind}, train=short), tmp_path / f"kind{number}")
    last = {"from": str(tmp_path / "kind0"), "rank": ..., "alpha": ...}
    run_recipe(recipe_file(adapter=last, train=short), tmp_path / "again")
    run_recipe(recipe_file(adapter={"layers": {"spectrum": 0.5}}, train=short), tmp_path / "spectrum")

    unread = every_field(Section) - seen - READ_BY_COMMANDS - READ_BY_LOAD
    unread -= READ_BY_TRACKERS
    assert not unread, f"declared in the schema and honoured nowhere: {sorted(unread)}"
    assert {("Recipe", name) for name in Recipe.model_fields} <= every_field(Section)
