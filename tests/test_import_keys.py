"""`lorakit import` knows every key of each tool: those of TRL and transformers from what is installed, so that a new
one is noticed, the others' from the tables."""

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lorakit.share.importing import TOOLS, VERDICTS, convert
from lorakit.share.importing.conversion import Conversion, lookup
from lorakit.share.importing.source import ForeignConfig
from lorakit.share.importing.verdicts import KeyAccount

_CLASSES = {
    "trl/trainer/sft_config.py": ("SFTConfig",),
    "trl/trainer/base_config.py": ("_BaseConfig",),
    "trl/trainer/model_config.py": ("ModelConfig",),
    "trl/scripts/utils.py": ("ScriptArguments", "DatasetMixtureConfig"),
    "transformers/training_args.py": ("TrainingArguments",),
}
_LEAST: dict[str, dict[str, Any]] = {
    "axolotl": {"base_model": "org/base", "micro_batch_size": 1, "datasets": [{"path": "org/rows"}]},
    "llama-factory": {"model_name_or_path": "org/base", "stage": "sft"},
    "unsloth": {"model": "org/base", "data": {"dataset": "org/rows"}},
    "trl": {"model_name_or_path": "org/base", "dataset_name": "org/rows"},
}
_VALUES = (True, False, 1, 0.5, "word", ["word"], {"inner": 1}, None)


def installed_keys(file: str, classes: tuple[str, ...]) -> list[str]:
    """The fields of dataclasses, read without importing the library (which takes seconds)."""
    package, _, inner = file.partition("/")
    spec = find_spec(package)
    assert spec and spec.origin
    tree = ast.parse((Path(spec.origin).parent / inner).read_text(encoding="utf-8"))
    bodies = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name in classes]
    assert len(bodies) == len(classes)
    fields = [node.target for body in bodies for node in body if isinstance(node, ast.AnnAssign)]
    return [field.id for field in fields if isinstance(field, ast.Name) and not field.id.startswith("_")]


@pytest.mark.parametrize(("file", "classes"), _CLASSES.items())
def test_every_installed_key_is_known(file, classes):
    keys = installed_keys(file, classes)
    tools = ["trl", "llama-factory"] if file.startswith("transformers") else ["trl"]
    unknown = [(tool, key) for tool in tools for key in keys if lookup(TOOLS[tool].keys, key) is None]
    assert len(keys) > 3 and not unknown


def with_key(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A config with one more key, by its dotted name."""
    first, _, rest = key.partition(".")
    if first.endswith("[]"):
        name = first.removesuffix("[]")
        entries = tree.get(name) or [{"path": "org/rows"}]
        return {**tree, name: [with_key(entries[0], rest, value)]}
    inner = tree.get(first)
    return {**tree, first: with_key(inner if isinstance(inner, dict) else {}, rest, value) if rest else value}


def accounts_of(tool: str, config: ForeignConfig) -> list[KeyAccount]:
    kind = TOOLS[tool]
    return [*convert(kind, Conversion(kind.name, config, devices=1)).accounts.values()]


@pytest.mark.parametrize("tool", TOOLS)
def test_every_key_of_a_table_gets_a_verdict_whatever_its_value(tool, tmp_path):
    for number, key in enumerate(TOOLS[tool].keys):
        value = _VALUES[number % len(_VALUES)]
        config = ForeignConfig("config.yml", with_key(_LEAST[tool], key, value), tmp_path)
        accounts = accounts_of(tool, config)
        name = key.replace("[]", "[0]")
        mine = [one for one in accounts if one.key == name or one.key.startswith((f"{name}.", f"{name}["))]
        assert mine, key
        for one in mine:
            assert one.verdict in VERDICTS and (one.to or one.reason)
            assert "has no such key" not in one.reason or isinstance(value, dict), (key, value, one)
            assert one.verdict != "refused" or one.remedy


@pytest.mark.parametrize("tool", TOOLS)
def test_a_key_that_nobody_knows_is_refused_with_the_nearest_one(tool, tmp_path):
    config = ForeignConfig("config.yml", {**_LEAST[tool], "learning_rat": 1}, tmp_path)
    account = next(one for one in accounts_of(tool, config) if one.key == "learning_rat")
    assert account.verdict == "refused" and "learning_rate" in account.remedy
