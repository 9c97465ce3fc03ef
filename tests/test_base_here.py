"""`check` and `plan` say what `train` would refuse of the base's files, where it is written, and without torch."""

import json
import re
import shutil

import pytest
from safetensors.torch import load_file, save_file


@pytest.fixture
def folder(tmp_path, tiny_base):
    shutil.copytree(tiny_base, tmp_path / "model")
    return tmp_path / "model"


def change(folder, name, change):
    (folder / name).write_text(json.dumps(change(json.loads((folder / name).read_text()))))


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_short(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def strange_weights(folder):
    (folder / "model.safetensors").write_bytes(b"<!DOCTYPE html><html>Not found</html>")


def code(folder):
    change(folder, "tokenizer_config.json", lambda values: values | {"auto_map": {"AutoTokenizer": ["own.Own", None]}})


def lacking_shard(folder):
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors").unlink()
    (folder / "shard.safetensors").write_bytes(b"")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def outside(folder):
    index = {"weight_map": {"model.norm.weight": "../far.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def link(folder):
    (folder / "tokenizer.json").rename(folder.parent / "far.json")
    (folder / "tokenizer.json").symlink_to("../far.json")


def without_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def half_a_tokenizer(folder):
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text[: len(text) // 2])


def damaged_generation(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id":')


def without_type(folder):
    change(folder, "config.json", lambda values: {key: values[key] for key in values if key != "model_type"})


def an_adapter(folder):
    for file in folder.iterdir():
        file.unlink()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")


def other_weights(folder):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    change(folder, "config.json", lambda values: values | {"transformers_weights": "other.safetensors"})


def null_code(folder):
    change(folder, "config.json", lambda values: values | {"auto_map": None})


def shards_without_index(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")


HARMS = {
    null_code: "config.json says auto_map: null",
    shards_without_index: "It has model-00001-of-00001.safetensors: fetch the index",
    pickled: "convert it to safetensors",
    cut_short: "weights file is damaged",
    strange_weights: "weights file is damaged",
    code: "brings its own Python code (own.Own",
    lacking_shard: "lacks model-00002-of-00002.safetensors",
    outside: "names '../far.safetensors'",
    link: "is a link to",
    without_tokenizer: "has no tokenizer",
    half_a_tokenizer: "tokenizer.json is damaged",
    damaged_generation: "generation_config.json: damaged: it is not valid JSON",
    without_type: "names no model_type",
    an_adapter: "a recipe names the adapter in adapter.from",
    other_weights: "transformers_weights",
}


@pytest.mark.parametrize(("harm", "says"), HARMS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_check_plan_and_train_refuse_the_same_files_at_the_keys_place(recipe_file, lorakit, folder, harm, says):
    harm(folder)
    path = recipe_file(model={"base": str(folder)})
    for command in (("check", path), ("plan", path), ("train", path, "--dry-run")):
        exit_code, _, err = lorakit(*command)
        if command[0] == "plan" and harm in (
            lacking_shard,
            without_tokenizer,
            shards_without_index,
        ):  # the config alone can be planned on
            assert exit_code == 0 and says in err and "a run would be refused" in err
            continue
        assert exit_code == 2, command
        assert re.search(r"tiny\.yaml:\d+:\d+: model\.base: ", err), err
        if not (command[0] == "train" and harm in (without_tokenizer, half_a_tokenizer)):  # the library says it there
            assert says in err, err


def test_a_run_in_the_place_of_its_base_is_told_as_a_run(recipe_file, lorakit, folder):
    (folder / "config.json").rename(folder / "manifest.json")
    exit_code, _, err = lorakit("check", recipe_file(model={"base": str(folder)}))
    assert exit_code == 2 and "is a run, not a model: it has no config.json. Give the merged/ in it" in err, err


def test_an_index_that_is_not_used_may_name_files_that_are_not_there(recipe_file, lorakit, folder):
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    path = recipe_file(model={"base": str(folder)})
    assert lorakit("check", path)[0] == 0
    assert lorakit("train", path, "--dry-run")[0] == 0


@pytest.mark.parametrize("quantization", ["none", "nf4", "q8"])
def test_weights_of_other_shapes_than_the_config_are_refused_by_name(recipe_file, lorakit, folder, quantization):
    change(folder, "config.json", lambda values: values | {"intermediate_size": 96})
    path = recipe_file(model={"base": str(folder), "quantization": quantization})
    exit_code, _, err = lorakit("train", path, "--output", folder.parent / "run")
    assert exit_code == 2 and "model.layers.0.mlp.down_proj.weight is of shape (32, 64)" in err, err
    assert "(32, 96) by the config (6 such in all)" in err


def test_weights_that_are_no_numbers_are_told_before_the_first_step(recipe_file, lorakit, folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    exit_code, _, err = lorakit("train", recipe_file(model={"base": str(folder)}), "--output", folder.parent / "run")
    assert exit_code == 2 and "is nan before the first step. Its weights are damaged" in err, err


def test_check_as_json_tells_the_place(recipe_file, lorakit, folder):
    pickled(folder)
    path = recipe_file(model={"base": str(folder)})
    exit_code, out, _ = lorakit("check", path, "--json")
    (problem,) = json.loads(out)["problems"]
    assert exit_code == 2 and problem["path"] == "model.base" and problem["line"] > 1 and problem["column"] > 1
    assert problem["file"] == str(path) and "convert it to safetensors" in problem["reason"]


def test_what_is_missing_of_a_hub_model_is_no_fault_before_it_is_fetched(recipe_file, lorakit, folder, monkeypatch):
    commit, repository = "0" * 40, folder.parent / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (folder / "model.safetensors").unlink()
    shutil.copytree(folder, repository / "snapshots" / commit)
    monkeypatch.setenv("HF_HUB_CACHE", str(folder.parent / "hub"))
    path = recipe_file(model={"base": "org/tiny"})
    assert lorakit("check", path)[0] == 0
    code(repository / "snapshots" / commit)
    exit_code, _, err = lorakit("check", path)
    assert exit_code == 2 and "own.Own" in err


def test_a_file_that_is_no_gguf_is_refused_by_check(recipe_file, lorakit, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"PK\3\4 not a model")
    exit_code, _, err = lorakit("check", recipe_file(model={"base": "./model.gguf"}))
    assert exit_code == 2 and "no readable GGUF" in err


CHOICES = {
    "targets": {"adapter": {"targets": ["no_such_proj"]}},
    "layers": {"adapter": {"layers": [0, 9]}},
    "rank_overrides": {"adapter": {"rank_overrides": {"no_such_proj": 2}}},
    "alpha_overrides": {"adapter": {"alpha_overrides": {"no_such_proj": 2}}},
    "exclude": {"adapter": {"exclude": ["no_such_proj"]}},
    "train_modules": {"adapter": {"train_modules": ["no_such_head"]}},
}


@pytest.mark.parametrize("key", CHOICES)
def test_a_choice_that_the_model_lacks_is_refused_at_its_place(recipe_file, lorakit, tmp_path, key):
    path = recipe_file(**CHOICES[key])
    line = next(at for at, text in enumerate(path.read_text().splitlines(), start=2) if f"{key}:" in text)
    ways = [("check",), ("plan",), ("plan", "--gpu", "all"), ("train", "--output", tmp_path / "run")]
    for command in [(name, path, *options) for name, *options in ways]:
        exit_code, _, err = lorakit(*command)
        assert exit_code == 2 and re.search(rf"tiny\.yaml:{line}:\d+: adapter\.{key}", err), err


def test_a_base_whose_tied_embeddings_differ_is_refused_before_it_is_trained_not_in_the_merge(
    recipe_file, lorakit, folder
):
    change(folder, "config.json", lambda values: values | {"tie_word_embeddings": True})
    path = recipe_file(model={"base": str(folder)})
    exit_code, _, err = lorakit("train", path, "--output", folder.parent / "run")
    assert exit_code == 2 and "one weight by its config.json, and two in its files" in err, err
    assert "Write tie_word_embeddings: false" in err
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    exit_code, _, err = lorakit("train", path, "--output", folder.parent / "run", "--set", "train.epochs=1")
    assert exit_code == 0, err


CONFIGS = {
    "hidden_size": ("abc", "eval"),
    "num_attention_heads": (0, "eval"),
    "rope_parameters": ([], "train"),
    "dtype": ("float8", "train"),
    "pad_token_id": (99999, "train"),
    "eos_token_id": ("x", "train"),
    "hidden_act": ("zzz", "train"),
}


@pytest.mark.parametrize("key", CONFIGS)
def test_a_config_that_transformers_cannot_read_is_told_as_the_config(recipe_file, lorakit, folder, key):
    value, command = CONFIGS[key]
    change(folder, "config.json", lambda values: values | {key: value})
    path = recipe_file(model={"base": str(folder)})
    arguments = (path, "--output", folder.parent / "run") if command == "train" else (folder, "--data", "eval.jsonl")
    exit_code, _, err = lorakit(command, *arguments)
    assert exit_code == 2 and ("model.base: " in err) == (command == "train"), err
    assert "tokenizer" not in err and not err.rstrip().endswith(":"), err
