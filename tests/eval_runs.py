"""What the tests of evaluation share: small runs made once for a module, and a listener that remembers."""

import json
from contextlib import contextmanager
from pathlib import Path

import yaml
from conftest import TOPICS, rows_of, write_rows
from runs_of_tests import run_recipe

from lorakit.evaluate.models import models_of_run, resolve_models
from lorakit.evaluate.report import write_evaluation
from lorakit.evaluate.run import EvalSettings, default_settings, score_models
from lorakit.progress import Silent
from lorakit.run_dir import Run


class Remembers(Silent):
    """Keeps what it is told."""

    def __init__(self):
        self.said, self.warned, self.bars = [], [], []

    def say(self, text):
        self.said.append(text)

    def warn(self, text):
        self.warned.append(text)

    @contextmanager
    def bar(self, label, total, done=0, unit=""):
        self.bars.append((label, total))
        with super().bar(label, total) as bar:
            yield bar


def make_run(folder: Path, base: Path, **sections: dict) -> Run:
    """A run of a few steps in `folder`/run, from rows beside it; sections are merged over the recipe's."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.jsonl", rows_of(22))
    write_rows(folder / "eval.jsonl", rows_of(40)[30:])
    recipe: dict = {
        "name": "tiny",
        "model": {"base": str(base)},
        "adapter": {"rank": 4, "alpha": 8},
        "data": {"train": "train.jsonl", "eval": "eval.jsonl", "max_length": 128},
        "train": {"steps": 6, "batch_size": 4, "learning_rate": 0.05, "eval_every": 6, "save_every": 6},
        "evaluate": {"metrics": ["exact-match", "json-valid"], "max_new_tokens": 8},
    }
    for name, values in sections.items():
        merged = {**recipe.get(name, {}), **values}
        recipe[name] = {key: value for key, value in merged.items() if value is not ...}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return run_recipe(path, folder / "run")[0]


def labelled_rows(count: int) -> list[dict]:
    """Rows of the format `classification`."""
    labels = ["fruit", "place", "thing"]
    return [{"text": f"{TOPICS[at % 8]} number {at}", "label": labels[at % 3]} for at in range(count)]


def edit_json(path: Path, **changes) -> None:
    """Change keys of a JSON file; None takes one out."""
    facts = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in facts.items() if value is not None}))


def evaluate(run, prepared, progress):
    """The models of a run, scored as `lorakit eval RUN` does, and the file of the scores."""
    evaluation = score_models(models_of_run(run, prepared), None, default_settings(prepared), progress)
    return evaluation.models, write_evaluation(evaluation, run.evaluations)


def score(*given, file=None, progress=None, **request):
    """What `lorakit eval` measures of these, without the cache unless `cache=True`."""
    progress = progress or Silent()
    model_set = resolve_models([str(path) for path in given], progress)
    wanted = default_settings(model_set.prepared)
    settings = {"metrics": wanted.metrics, "max_new_tokens": wanted.max_new_tokens, "cache": False} | request
    return score_models(model_set, file, EvalSettings(**settings), progress)


def loss(evaluation, name):
    """A model's loss per token over all rows."""
    return evaluation.parts[""].scores[name]["loss"].measure.value
