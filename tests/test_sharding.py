"""`train.sharding`: what it goes with, and that a run may go on with another one."""

import pytest

from lorakit.errors import UserError
from lorakit.recipe.load import load, to_yaml
from lorakit.recipe.sharding import describe_idle_sharding, refuse_missing_package, sharding_conflicts
from lorakit.run_dir import Run
from lorakit.train.checkpoint import resumed_recipe

RUN = {"optimizer": "adamw", "micro_batch": 2, "gradient_checkpointing": False, "learning_rate": 1e-3}


def test_a_run_goes_on_with_the_sharding_that_is_given_now_and_else_with_its_own(recipe_file, tmp_path):
    path = recipe_file(train={**RUN, "sharding": "fsdp"})
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    run.write_manifest({"base": {"sha256": {}}, "data": {"files": {}}})
    run.recipe.write_text(to_yaml(load(path).recipe, run.recipe.parent))
    for given, goes_on_with in (("none", "none"), ("zero-2", "zero-2"), ("auto", "fsdp"), ("fsdp", "fsdp")):
        loaded = load(path, [f"train.sharding={given}"])
        assert resumed_recipe(run, loaded).train.sharding == goes_on_with


def test_a_run_of_before_there_was_sharding_goes_on(recipe_file, tmp_path):
    path = recipe_file(train=RUN)
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    run.write_manifest({"base": {"sha256": {}}, "data": {"files": {}}})
    lines = to_yaml(load(path).recipe, run.recipe.parent).splitlines()
    run.recipe.write_text("\n".join(line for line in lines if "sharding" not in line))
    assert resumed_recipe(run, load(path)).train.sharding == "auto"
    assert resumed_recipe(run, load(path, ["train.sharding=none"])).train.sharding == "none"


def test_a_kind_that_changes_shapes_is_refused_under_deepspeed(recipe_file, lorakit):
    path = recipe_file(adapter={"kind": "flexlora", "rank": 4}, train={"sharding": "zero-2", "optimizer": "adamw"})
    code, _, err = lorakit("check", path)
    assert code == 2 and "train.sharding" in err and "Write sharding: none or fsdp" in err
    recipe = load(path, ["train.sharding=fsdp"]).recipe
    assert not list(sharding_conflicts(recipe, "fsdp")) and list(sharding_conflicts(recipe, "zero-3"))


def test_what_deepspeed_cannot_share_out_is_refused(recipe_file, lorakit):
    for others, remedy in (
        (["train.optimizer=adamw-8bit"], "Write optimizer: adamw"),
        (["model.dtype=float16"], "Write dtype: bfloat16"),
        (["model.quantization=q8", "train.sharding=zero-3"], "Write quantization: nf4"),
    ):
        overrides = [part for value in ["train.sharding=zero-2", *others] for part in ("--set", value)]
        code, _, err = lorakit("check", recipe_file(), *overrides)
        assert code == 2 and "train.sharding" in err and remedy in err


def test_a_strategy_without_its_package_is_refused_on_several_devices_and_warned_of(recipe_file, lorakit, monkeypatch):
    monkeypatch.setattr("lorakit.recipe.sharding.find_spec", lambda name: None)
    for sharding, devices in (("none", 4), ("fsdp", 4), ("zero-2", 1), ("zero-3", 1)):
        refuse_missing_package(sharding, devices)
    with pytest.raises(UserError, match=r"zero-3 needs .* Install it with pip install 'lorakit\[deepspeed\]'"):
        refuse_missing_package("zero-3", 2)
    code, out, _ = lorakit("check", recipe_file(train={"sharding": "zero-2"}))
    assert code == 0 and "# warning: train.sharding: zero-2 needs a package" in out


def test_a_strategy_on_one_device_is_harmless_and_said(recipe_file, lorakit):
    code, _, err = lorakit("train", recipe_file(train={"sharding": "fsdp", "steps": 1, "epochs": None}), "--dry-run")
    assert code == 0 and "train.sharding: fsdp has nothing to do on one device" in err
    settings = load(recipe_file(train={"sharding": "fsdp", "steps": 1, "epochs": None})).recipe.train
    assert describe_idle_sharding(settings, 2) == ""
