"""Promises on adapter_config.json: what PEFT cannot compute with, and what would run code, is refused by its key."""

import json
import shutil
import sys

import pytest
from conftest import rows_of, write_rows
from eval_runs import edit_json
from peft_adapters import lora, save_peft_adapter

from lorakit.errors import UserError
from lorakit.model.peft_adapter import adapter_config
from lorakit.recipe.init_adapter import find_fault, why_untrainable

ODD = {
    "r": [None, "8", -1, 0, 4.5, True],
    "lora_alpha": [None, "x"],
    "lora_dropout": [None],
    "target_modules": [5, {"a": 1}, [1]],
    "target_parameters": [4, "experts"],
    "modules_to_save": [3, "norm"],
    "rank_pattern": [None, ["a"], {"q_proj": "a"}, {"q_proj": 0}, 7],
    "alpha_pattern": [None, {"q_proj": None}],
    "layers_to_transform": ["x", ["1"]],
    "base_model_name_or_path": [5, ["x"]],
}


@pytest.fixture(scope="module")
def saved(tiny_base, tmp_path_factory):
    """An adapter as plain PEFT saves it."""
    return save_peft_adapter(tiny_base, tmp_path_factory.mktemp("saved") / "adapter", lora(), seed=2)


@pytest.fixture
def adapter(saved, tmp_path):
    """A copy of it."""
    return shutil.copytree(saved, tmp_path / "adapter")


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", rows_of(3))


def test_a_value_that_peft_cannot_compute_with_is_refused_by_its_key(saved):
    config = json.loads((saved / "adapter_config.json").read_text())
    assert find_fault(config) == ""
    for key, values in ODD.items():
        for value in values:
            fault = find_fault(config | {key: value})
            assert fault.startswith(f"{key} is ") and "Correct it" in fault, (key, value, fault)


def test_every_configuration_that_peft_writes_is_taken(tiny_base, tmp_path):
    usual = (
        lora(rank_pattern={r"layers\.0\..*q_proj": 2}, alpha_pattern={"v_proj": 3.5}, layers_to_transform=[1]),
        lora(target_modules=r".*\.(q|k)_proj", task_type=None, lora_alpha=7.5),
        lora(target_modules="all-linear", exclude_modules=["down_proj"], modules_to_save=["norm"]),
    )
    for number, config in enumerate(usual):
        folder = save_peft_adapter(tiny_base, tmp_path / str(number), config)
        assert adapter_config(folder).r == 4 and why_untrainable(folder) is None


def test_every_command_refuses_an_odd_value_alike(adapter, rows, recipe_file, lorakit):
    edit_json(adapter / "adapter_config.json", rank_pattern=["q_proj"])
    recipe = recipe_file(adapter={"from": str(adapter), "rank": ..., "alpha": ...})
    for command in (
        ("eval", adapter, "--data", rows),
        ("merge", adapter),
        ("check", recipe),
        ("train", recipe),
    ):
        code, _, err = lorakit(*command)
        assert code == 2 and 'rank_pattern is ["q_proj"], and PEFT needs a mapping' in err, (command, err)


def test_a_module_that_an_adapter_names_is_never_imported(adapter, rows, recipe_file, lorakit, tmp_path, monkeypatch):
    (tmp_path / "own_core.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    edit_json(adapter / "adapter_config.json", megatron_config={"tensor": 1}, megatron_core="own_core")
    recipe = recipe_file(adapter={"from": str(adapter), "rank": ..., "alpha": ...})
    for command in (("eval", adapter, "--data", rows), ("merge", adapter), ("check", recipe), ("train", recipe)):
        code, _, err = lorakit(*command)
        assert code == 2 and "megatron_config makes PEFT import and run a Python module" in err, (command, err)
    assert "own_core" not in sys.modules


def test_an_adapter_that_takes_effect_behind_certain_tokens_only_is_not_scored_as_its_base(adapter, rows, lorakit):
    edit_json(adapter / "adapter_config.json", alora_invocation_tokens=[5, 6])
    code, _, err = lorakit("eval", adapter, "--data", rows)
    assert code == 2 and "alora_invocation_tokens: it is an aLoRA" in err, err


def test_an_adapter_with_repeated_layers_is_refused_by_merge(tiny_base, tmp_path, lorakit):
    folder = save_peft_adapter(tiny_base, tmp_path / "adapter", lora(layer_replication=[[0, 1], [0, 2]]))
    code, _, err = lorakit("merge", folder)
    assert code == 2 and "was made with layer_replication" in err and "merge_and_unload" in err, err


def test_a_pickled_adapter_is_told_as_pickled(adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model.bin would run code when read: convert it to safetensors"):
        adapter_config(adapter)


def test_eval_of_an_adapter_without_its_base_says_where_to_write_it(adapter, rows, lorakit):
    for named in (None, "/nowhere/model"):
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=named)
        code, _, err = lorakit("eval", adapter, "--data", rows)
        assert code == 2 and "Write --base with" in err and (named or "adapter_config.json") in err, err
