"""`lorakit import`: another tool's config becomes a recipe that does the same, every key accounted for."""

import json
from pathlib import Path
from typing import Any

import foreign_configs
import pytest
import yaml
from conftest import rows_of, write_rows

from lorakit.errors import UserError
from lorakit.recipe.load import load
from lorakit.share.importing import ImportResult, import_config, read_command, read_config
from lorakit.share.importing.conversion import leaves

_COMMON = {
    "axolotl": foreign_configs.AXOLOTL,
    "llama-factory": foreign_configs.LLAMA_FACTORY,
    "unsloth": foreign_configs.UNSLOTH,
    "trl": foreign_configs.TRL,
}
_CASES = {
    "axolotl": foreign_configs.AXOLOTL_CASES,
    "llama-factory": foreign_configs.LLAMA_FACTORY_CASES,
    "unsloth": foreign_configs.UNSLOTH_CASES,
    "trl": foreign_configs.TRL_CASES,
}
_ALL = [(tool, name) for tool, cases in _CASES.items() for name in cases]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory with rows."""
    write_rows(tmp_path / "rows.jsonl", rows_of(4))
    write_rows(tmp_path / "more.jsonl", rows_of(3))
    (tmp_path / "dataset_info.json").write_text(json.dumps(foreign_configs.DATASET_INFO), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def text_of(tool: str, name: str) -> str:
    """The common lines of a tool without those keys that the case writes again, and the case's."""
    case = _CASES[tool][name].text
    common = yaml.safe_load(_COMMON[tool])
    again = (yaml.safe_load(case) or {}).keys()
    kept = {key: value for key, value in common.items() if key not in again}
    return (yaml.safe_dump(kept, sort_keys=False) if kept else "") + case


def imported(folder: Path, text: str, tool: str | None = None, **options: Any) -> ImportResult:
    path = folder / "config.yml"
    path.write_text(text, encoding="utf-8")
    return import_config(read_config(path), folder / "recipe.yaml", tool, **options)


def recipe_of(result: ImportResult, folder: Path) -> Any:
    assert result.text is not None, result.reason
    path = folder / "recipe.yaml"
    for file, text in {**result.files, path: result.text}.items():
        file.write_text(text, encoding="utf-8")
    return load(path).recipe.model_dump()


def at(recipe: Any, name: str) -> Any:
    for part in name.split("."):
        recipe = recipe[int(part)] if isinstance(recipe, list) else recipe[part]
    return recipe


@pytest.mark.parametrize(("tool", "name"), _ALL)
def test_every_key_is_accounted_for_and_the_recipe_says_what_the_config_does(folder, tool, name):
    case, text = _CASES[tool][name], text_of(tool, name)
    result = imported(folder, text)
    written = [key for key, _ in leaves(yaml.safe_load(text))]
    assert [one.key for one in result.keys][: len(written)] == written
    assert {one.key for one in result.refused} == set(case.refused), [vars(one) for one in result.refused]
    assert all(one.to or one.reason for one in result.keys)
    assert all(one.reason and one.remedy for one in result.refused)
    if case.refused:
        return
    recipe = recipe_of(result, folder)
    assert {key: at(recipe, key) for key in case.says} == case.says


@pytest.mark.parametrize(("tool", "name"), [pair for pair in _ALL if not _CASES[pair[0]][pair[1]].refused])
def test_secrets_are_neither_shown_nor_copied(folder, tool, name):
    result = imported(folder, text_of(tool, name))
    everything = json.dumps(result.to_dict())
    assert not any(secret in everything for secret in ("hf_abcdefghijklmnop", "abcdef", '"abc"'))


def test_a_recipe_says_of_each_value_where_it_is_from(folder):
    text = str(imported(folder, text_of("axolotl", "qlora")).text)
    assert "rank: 8  # lora_r\n" in text
    assert "batch_size: 6  # micro_batch_size, gradient_accumulation_steps\n" in text
    assert "# Axolotl's default\n" in text


def test_the_number_of_devices_multiplies_the_batch(folder):
    result = imported(folder, text_of("axolotl", "the least"), devices=4)
    assert at(recipe_of(result, folder), "train.batch_size") == 24
    assert "4 devices" in next(one.reason for one in result.keys if one.key == "micro_batch_size")


def test_sharding_is_written_for_several_devices_alone(folder):
    text = text_of("llama-factory", "full fine-tuning")
    assert at(recipe_of(imported(folder, text, devices=2), folder), "train.sharding") == "zero-3"


def test_packed_rows_are_imported_where_it_is_known_how_many_fill_a_pack(folder):
    result = imported(folder, text_of("axolotl", "packed"), rows_per_pack=5)
    recipe = recipe_of(result, folder)
    assert not result.refused and at(recipe, "train.batch_size") == 30 and at(recipe, "data.packing") == "on"


@pytest.mark.parametrize(
    ("rows", "trained"), [("messages", "all"), ("prompt-completion", "assistant"), ("text", "assistant")]
)
def test_what_trl_trains_follows_the_rows(folder, rows, trained):
    text = text_of("trl", "the least").replace("rows.jsonl", "org/rows")
    assert [one.key for one in imported(folder, text).refused] == ["dataset_name"]
    assert at(recipe_of(imported(folder, text, row_format=rows), folder), "data.train_on") == trained


def test_well_known_rows_of_the_hub_need_no_word(folder):
    text = text_of("trl", "the least").replace("rows.jsonl", "trl-lib/tldr")
    recipe = recipe_of(imported(folder, text), folder)
    assert at(recipe, "data.train.format") == "prompt-completion" and at(recipe, "data.train_on") == "assistant"


def test_a_written_text_field_makes_rows_of_the_hub_texts(folder):
    command = "trl sft --model_name_or_path org/base --dataset_name org/rows --dataset_text_field "
    texts = import_config(read_command(command + "body", "command", folder), folder / "recipe.yaml")
    assert "format: text" in str(texts.text) and "text: body" in str(texts.text)
    messages = import_config(read_command(command + "messages", "command", folder), folder / "recipe.yaml")
    assert "format: messages" in str(messages.text)


@pytest.mark.parametrize(
    ("tool", "lines", "key", "value"),
    [
        ("axolotl", "bf16: false", "model.dtype", "float32"),
        ("axolotl", "bf16: false\nload_in_8bit: true", "model.dtype", "float16"),
        ("axolotl", "bf16: full", "model.dtype", "bfloat16"),
        ("axolotl", "warmup_steps: 0\nwarmup_ratio: 0.1", "train.warmup", 0),
        ("unsloth", "training: {lr_scheduler_type: constant}", "train.warmup", 0),
        ("unsloth", "training: {lr_scheduler_type: constant_with_warmup}", "train.warmup", 5),
    ],
)
def test_what_is_off_there_is_off_here(folder, tool, lines, key, value):
    common = {key: value for key, value in yaml.safe_load(_COMMON[tool]).items() if key not in yaml.safe_load(lines)}
    result = imported(folder, yaml.safe_dump(common) + lines)
    assert at(recipe_of(result, folder), key) == value and not result.refused


@pytest.mark.parametrize(
    ("lines", "key"),
    [
        ("datasets: [{path: rows.jsonl, type: chat_template, split: 'train[10%:]'}]", "datasets[0].split"),
        ("peft_init_lora_weights: pissa_niter_many", "peft_init_lora_weights"),
        ("adapter: qlora", "adapter"),
    ],
)
def test_a_value_that_no_recipe_can_say_is_refused(folder, lines, key):
    common = {key: value for key, value in yaml.safe_load(_COMMON["axolotl"]).items() if key not in lines}
    assert [one.key for one in imported(folder, yaml.safe_dump(common) + lines).refused] == [key]


def test_the_config_is_never_replaced_by_the_recipe(folder, lorakit):
    (folder / "config.yml").write_text(text_of("axolotl", next(iter(_CASES["axolotl"]))), encoding="utf-8")
    before = (folder / "config.yml").read_text(encoding="utf-8")
    code, _, err = lorakit("import", "config.yml", "-o", "config.yml", "--overwrite")
    assert code == 2 and "is the config itself" in err and (folder / "config.yml").read_text() == before
    assert lorakit("import", "config.yml", "-o", "rows.jsonl/recipe.yaml")[0] == 2


def test_a_part_import_leaves_a_place_for_rows_that_are_not_known(folder):
    (folder / "dataset_info.json").unlink()
    text = text_of("llama-factory", "the least")
    assert imported(folder, text).text is None
    result = imported(folder, text, partial=True)
    assert "train: ./rows.jsonl  # dataset\n" in str(result.text) and "rows are not known" in result.notes[-1]


def test_a_template_that_is_the_bases_own_is_the_same(folder):
    text = text_of("axolotl", "the least") + "chat_template: llama3\n"
    own = imported(folder, text.replace("org/base", "meta-llama/Meta-Llama-3-8B-Instruct"))
    assert not own.refused
    other = imported(folder, text.replace("org/base", "meta-llama/Llama-3.2-1B-Instruct"))
    assert not other.refused and "chat_template: llama-3 " in str(other.text) and not other.files
    text = text_of("llama-factory", "the least").replace("template: default", "") + "template: llama3\n"
    untrimmed = imported(folder, text)
    assert not untrimmed.refused and "chat_template: ./recipe.jinja" in str(untrimmed.text)
    assert [("<|eot_id|>" in text, "trim" in text) for text in untrimmed.files.values()] == [(True, False)]


def test_a_template_by_name_brings_its_system_prompt(folder):
    text = text_of("llama-factory", "the least").replace("template: default", "template: qwen")
    result = imported(folder, text if "template: qwen" in text else text + "template: qwen\n")
    assert not result.refused and "system: You are Qwen" in str(result.text)


def test_paths_mean_the_same_from_where_the_recipe_is_written(folder):
    path = folder / "config.yml"
    path.write_text(text_of("axolotl", "the least"), encoding="utf-8")
    result = import_config(read_config(path), folder / "deep" / "recipe.yaml")
    assert "path: ../rows.jsonl" in str(result.text)


def test_rows_that_are_not_here_yet_do_not_stop_the_import(folder):
    result = imported(folder, text_of("axolotl", "the least").replace("rows.jsonl", "far/away.jsonl"))
    assert result.text and any("far/away.jsonl" in note for note in result.notes)


def test_a_rule_of_ours_that_refuses_names_the_key_that_led_there(folder):
    result = imported(folder, text_of("axolotl", "the least") + "output_dir: ''\nseed: -1\n")
    assert result.text is None and "train.seed (from seed)" in result.reason


def test_the_last_of_two_equal_keys_wins_as_it_does_there(folder):
    result = imported(folder, text_of("axolotl", "the least") + "lora_r: 4\n")
    assert at(recipe_of(result, folder), "adapter.rank") == 4
    earlier = next(one for one in result.keys if "earlier" in one.key)
    assert earlier.value == "8" and "takes the last" in earlier.reason


def test_anchors_and_merge_keys_are_read_as_the_tool_reads_them(folder):
    text = "x: &common\n  load_in_4bit: false\n  num_epochs: 2\ntraining:\n  <<: *common\n  num_epochs: 4\n"
    result = imported(folder, foreign_configs.UNSLOTH + text)
    assert [one.key for one in result.refused] == ["x.load_in_4bit", "x.num_epochs"]
    assert {one.key: one.value for one in result.keys}["training.num_epochs"] == "4"


def test_a_command_is_read_with_its_variables_and_its_config(folder):
    (folder / "base.yaml").write_text("lora_r: 4\nuse_peft: true\nlora_target_modules: [q_proj]\n", encoding="utf-8")
    text = (
        "#!/bin/sh\nMODEL=org/base\naccelerate launch --num_processes 2 sft.py --config base.yaml \\\n"
        '  --model_name_or_path "$MODEL" --dataset-name rows.jsonl --bf16 --learning_rate=1e-4 \\\n'
        "  --lora_target_modules q_proj v_proj --assistant_only_loss true\necho done\n"
    )
    (folder / "run.sh").write_text(text, encoding="utf-8")
    recipe = recipe_of(import_config(read_config(folder / "run.sh"), folder / "recipe.yaml"), folder)
    says = {"adapter.rank": 4, "adapter.targets": ["q_proj", "v_proj"], "train.batch_size": 16}
    assert {key: at(recipe, key) for key in says} == says
    assert recipe["train"]["learning_rate"] == 1e-4 and recipe["model"]["base"] == "org/base"


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("trl dpo --model_name_or_path x", "`trl dpo` is no supervised fine-tuning"),
        ("trl sft --model_name_or_path $BASE", "holds a variable of the shell"),
        ("trl sft 'x", "Close the quote"),
        ("python train.py", "has no `trl sft` or"),
        ("trl sft model", "is no option"),
    ],
)
def test_a_command_that_cannot_be_read_is_an_error(command, complaint):
    with pytest.raises(UserError, match=complaint.replace("$", r"\$")):
        read_command(command, "--trl-command", Path.cwd())


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("x.yml", "- a\n", "the file is a list"),
        ("x.yml", "", "the file is empty"),
        ("x.yml", "a: [\n", "is not YAML"),
        ("x.yml", "a: !!python/object:os.system {}\n", "is not YAML"),
        ("x.yml", "a: *b\n", "is not YAML"),
        ("x.yml", "a: &a [*a]\n", "nested deeper"),
        ("x.yml", "a: " + "[" * 60 + "]" * 60 + "\n", "nested deeper"),
        ("x.yml", "a: " + "x" * 1_000_001, "larger than 1 MB"),
        ("x.toml", "a = 1\n", "is TOML"),
        ("x.json", "{", "is not JSON"),
        ("x.yml", "name: x\nsteps: 3\n", "a config of none of the tools"),
        ("x.yml", "model_name_or_path: x\n", "a config of none of the tools"),
    ],
)
def test_a_file_that_is_no_config_is_an_error(tmp_path, name, text, complaint):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=complaint):
        import_config(read_config(path), tmp_path / "recipe.yaml")


def test_the_command_writes_nothing_where_a_key_is_refused_unless_it_may(folder, lorakit):
    path = folder / "config.yml"
    path.write_text(text_of("trl", "what has no counterpart"), encoding="utf-8")
    code, out, _ = lorakit("import", path)
    assert code == 1 and "refused" in out and not (folder / "recipe.yaml").exists()
    code, out, err = lorakit("import", path, "--partial", "--json", "--from", "trl")
    facts = json.loads(out)
    assert code == 0 and facts["output"] == "recipe.yaml" and facts["counts"]["refused"] == 8, err
    assert load(folder / "recipe.yaml").recipe.model.base == "org/base"
    code, _, err = lorakit("import", path, "--partial")
    assert code == 2 and "--overwrite" in err


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"zero_optimization": {"stage": 2}}, []),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, []),
        ({"optimizer": {"type": "Lamb"}}, ["deepspeed"]),
        ({"scheduler": {"type": "WarmupDecayLR"}}, ["deepspeed"]),
    ],
)
def test_an_optimizer_or_a_schedule_of_deepspeeds_own_is_refused(folder, settings, refused):
    (folder / "ds.json").write_text(json.dumps(settings), encoding="utf-8")
    result = imported(folder, text_of("axolotl", "the least") + "deepspeed: ds.json\n")
    assert [one.key for one in result.refused] == refused
