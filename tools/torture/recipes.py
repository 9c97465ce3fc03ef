"""Recipes: shipped and made-up ones, damaged in their keys, values and YAML. Each loads, or is refused as a user's."""

import random
import re
from pathlib import Path
from typing import Any

import yaml

from lorakit.errors import UserError
from lorakit.recipe.load import RecipeErrors, load, to_yaml
from lorakit.recipe.schema import Recipe
from lorakit.recipe.schema_introspection import keys
from lorakit.registry import ADAPTERS, FORMATS, METRICS, QUANTIZERS
from tools.torture.cases import BrokenPromiseError, Part
from tools.torture.mutate import bad_value, mutate_bytes, mutate_text, mutate_value

ROOT = Path(__file__).parents[2]
_LONGEST_MESSAGE = 60_000
_PIECES = [
    *("&a ", "*a ", "<<: *a\n", "!!str ", "!!python/name:os.system ", "---\n", "...\n", "%YAML 1.1\n", "|\n", ">-\n  "),
    *("? ", "- ", ": ", "\n  ", "\n\t", "{", "}", "[", "]", ", ", "'", '"', '"\\x', '"\\UFFFFFFFF"', "#", "@", "`"),
    *("extends: x.yaml\n", "extends: [a, a]\n", "data:\n", "model: ", "train: {steps: 1}\n", "[" * 60, "{a: " * 3000),
    "[" * 20_000,
]
# Values that fit some key, so that a made-up recipe gets past the first check.
_VALUES = [
    *("org/model", "train.jsonl", ["train.jsonl", {"path": "more.csv", "weight": 0.5}], 0.1, 1, 4, 16, 1e-4, "auto"),
    *("all", "8-15", [0, 1, "3-5"], {"spectrum": 0.5}, "attention", ["q_proj"], {"q_proj": 4}, True, None, "cosine"),
    *("fix", "report", "error", "off", "on", {"patience": 2}, {"regex": {"pattern": "(a+)+$"}}, "runs/x", "float32"),
]


def _prepare(folder: Path) -> list[dict[str, Any]]:
    """The recipes that are damaged: those that ship, and one that names every key."""
    shipped = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob("recipes/**/*.yaml"))]
    part = next(iter(sorted(ROOT.glob("configs/hardware/*.yaml"))))
    small = {"extends": f"hardware/{part.stem}", "model": {"base": "org/model"}, "data": {"train": "train.jsonl"}}
    path = folder / "all.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    _write_data(folder)
    path.write_text("model: {base: org/model}\ndata: {train: train.jsonl}\n", encoding="utf-8")
    whole = yaml.safe_load(to_yaml(load(path).recipe, folder))
    return [*shipped, small, whole, whole]


def _write_data(folder: Path) -> None:
    for name in ("train.jsonl", "eval.jsonl", "more.csv"):
        (folder / name).touch()


def _made_up(chance: random.Random) -> dict[str, Any]:
    """A recipe of random keys with values that may fit."""
    words = [*ADAPTERS.names(), *FORMATS.names(), *METRICS.names(), *QUANTIZERS.names()]
    recipe: dict[str, Any] = {"model": {"base": "org/model"}, "data": {"train": "train.jsonl"}}
    for name in chance.sample(sorted(keys(Recipe)), chance.randint(1, 12)):
        holder, *rest = recipe, *name.split(".")
        for part in rest[:-1]:
            holder = holder.setdefault(part, {})
            if not isinstance(holder, dict):
                break
        else:
            holder[rest[-1]] = chance.choice([*_VALUES, *words])
    return recipe


def _run(recipes: list[dict[str, Any]], chance: random.Random, place: Path, number: int) -> str:
    recipe = chance.choice(recipes) if chance.random() < 0.75 else _made_up(chance)
    way = chance.random()
    if way < 0.3:
        recipe = _other_value(chance, recipe)
    elif way < 0.7:
        recipe = mutate_value(chance, recipe, chance.randint(1, 3))
    text = _as_yaml(chance, recipe)
    if way > 0.6:
        text = mutate_text(chance, text, _PIECES, chance.randint(1, 3))
    raw = text.encode("utf-8", "surrogatepass")
    if chance.random() < 0.1:
        raw = mutate_bytes(chance, raw)
    _write_data(place)
    path = place / "x.yaml"
    path.write_bytes(raw)
    settings = [_setting(chance) for _ in range(chance.choice([0, 0, 0, 0, 1, 2]))]
    (place / "settings.txt").write_text("\n".join(map(repr, settings)), encoding="utf-8")
    if chance.random() < 0.1:
        (place / "y.yaml").write_text(f"extends: {chance.choice(['x.yaml', 'y.yaml', '[x, x]'])}\n", encoding="utf-8")
        path = place / "y.yaml"
    return _load(path, settings, place)


def _other_value(chance: random.Random, recipe: dict[str, Any]) -> dict[str, Any]:
    """One key with another value that fits some key."""
    section, name = chance.choice([name for name in sorted(keys(Recipe)) if name.count(".") == 1]).split(".")
    before = recipe.get(section)
    return {**recipe, section: {**(before if isinstance(before, dict) else {}), name: chance.choice(_VALUES)}}


def _as_yaml(chance: random.Random, recipe: Any) -> str:
    text: str = yaml.dump(
        recipe,
        sort_keys=False,
        allow_unicode=chance.random() < 0.8,
        default_flow_style=chance.choice([False, False, True, None]),
        default_style=chance.choice([None, None, None, '"', "'"]),
    )
    return text


def _setting(chance: random.Random) -> str:
    name = chance.choice([*sorted(keys(Recipe)), "extends", "", "x", "data.train[0].path", "data.train.path"])
    value = chance.choice([*_VALUES, bad_value(chance), bad_value(chance)])
    text = f"{name}={value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).strip()}"
    return mutate_text(chance, text, [*_PIECES, "=", "==", "[0]", "[-1]"], 1) if chance.random() < 0.4 else text


def _load(path: Path, settings: list[str], place: Path) -> str:
    try:
        loaded = load(path, settings)
    except RecipeErrors as error:
        for problem in error.problems:
            if not (problem.reason and problem.remedy):
                raise BrokenPromiseError(f"a problem without reason or remedy: {problem}") from error
        _check_message(str(error))
        return "refused"
    except UserError as error:
        _check_message(str(error))
        return "refused"
    again = place / "again.yaml"
    again.write_text(to_yaml(loaded.recipe, place), encoding="utf-8")
    if load(again).recipe != loaded.recipe:
        raise BrokenPromiseError("the resolved recipe reads back as another one")
    return "loaded"


def _check_message(text: str) -> None:
    """A message is short, and what the user wrote cannot act on a terminal through it."""
    if not text.strip():
        raise BrokenPromiseError("an empty message")
    if len(text) > _LONGEST_MESSAGE:
        raise BrokenPromiseError(f"a message of {len(text):,} characters: {text[:500]}")
    bad = re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e]", text)
    if bad:
        raise BrokenPromiseError(f"the message holds {bad[0]!r}: {text[max(0, bad.start() - 200) : bad.end() + 50]!r}")


PART = Part("recipes", 5000, _prepare, _run, seconds=20, memory=1 << 30)
