"""Promises of `lorakit merge ADAPTER_FOLDER`: an adapter without its run is merged into the base that it names, or that
is given, and proved on rows that are given, or on general texts."""

import json
import shutil

import pytest
import torch
from conftest import rows_of, write_rows
from eval_runs import edit_json, make_run
from peft import PeftModel
from peft_adapters import KINDS, save_peft_adapter
from transformers import AutoModelForCausalLM


@pytest.fixture
def adapter(tmp_path, tiny_base):
    return save_peft_adapter(tiny_base, tmp_path / "adapter", KINDS["dora"](), seed=5)


def is_merge_of(folder, base, adapter):
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wanted = PeftModel.from_pretrained(plain, adapter).merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    return all(torch.allclose(found[name], tensor, atol=1e-5) for name, tensor in wanted.items())


def test_an_adapter_of_peft_s_is_merged_and_proved_on_general_texts(adapter, tiny_base, lorakit):
    code, out, err = lorakit("merge", adapter)
    assert code == 0, err
    assert f"put on {tiny_base}" in err and "its adapter_config.json names" in err
    assert "general texts" in out and is_merge_of(adapter / "merged", tiny_base, adapter)
    facts = json.loads((adapter / "merged" / "merge.json").read_text())
    assert (facts["run"], facts["adapter"], facts["rows_of"]) == (None, "adapter", "general") and facts["proof"]
    code, out, err = lorakit("merge", adapter, "--verify", adapter / "merged")
    assert code == 0 and "is the merged model of" in out, err


def test_a_base_and_rows_can_be_given(adapter, tiny_base, tmp_path, lorakit):
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=None)
    code, _, err = lorakit("merge", adapter)
    assert code == 2 and "names no base model. Write --base" in err
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="/nowhere/model")
    code, _, err = lorakit("merge", adapter)
    assert code == 2 and "/nowhere/model: there is no such folder" in err and "Or write --base" in err
    rows = write_rows(tmp_path / "rows.jsonl", rows_of(6))
    options = ("--base", tiny_base, "--data", rows, "--output", tmp_path / "out", "--json")
    code, out, err = lorakit("merge", adapter, *options)
    assert code == 0, err
    facts = json.loads(out)
    assert facts["rows_of"] == str(rows) and facts["proof"]["rows"] == 6
    assert is_merge_of(tmp_path / "out", tiny_base, adapter)
    code, _, err = lorakit("merge", adapter, *options[:2], "--data", tmp_path / "none.jsonl", "-o", tmp_path / "no")
    assert code == 2 and "none.jsonl: there is no such file" in err and not (tmp_path / "no").exists()


def test_the_adapter_of_a_run_is_the_run_and_alone_it_is_an_adapter(tmp_path, tiny_base, lorakit):
    run = make_run(tmp_path / "there", tiny_base)
    code, out, err = lorakit("merge", run.adapter, "--json")
    assert code == 0, err
    assert json.loads(out)["rows_of"] == "held-out" and is_merge_of(run.merged, tiny_base, run.adapter)
    alone = shutil.copytree(run.adapter, tmp_path / "alone")
    code, out, err = lorakit("merge", alone, "--json")
    assert code == 0, err
    assert json.loads(out)["rows_of"] == "general" and is_merge_of(alone / "merged", tiny_base, alone)
    (checkpoint,) = run.complete_checkpoints()
    code, _, err = lorakit("merge", checkpoint, "--output", tmp_path / "step", "--no-proof")
    assert code == 0 and is_merge_of(tmp_path / "step", tiny_base, checkpoint), err


def test_a_run_whose_rows_are_gone_is_proved_on_general_texts_or_on_given_rows(tmp_path, tiny_base, lorakit):
    run = make_run(tmp_path / "there", tiny_base)
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / "there" / name).unlink()
    rows = write_rows(tmp_path / "rows.jsonl", rows_of(6))
    code, out, err = lorakit("merge", run.folder, "--data", rows)
    assert code == 0 and f"6 rows of {rows}" in out, err
    code, out, err = lorakit("merge", run.folder, "--overwrite")
    assert code == 0 and "general texts" in out and "the rows of the run, which cannot be read" in err, err


def test_a_base_that_moved_is_given_to_a_run(tmp_path, tiny_base, lorakit):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    run = make_run(tmp_path / "there", base)
    shutil.move(base, tmp_path / "moved")
    code, _, err = lorakit("merge", run.folder)
    assert code == 2 and "its base model is not at" in err and "Write --base" in err
    code, _, err = lorakit("merge", run.folder, "--base", run.folder)
    assert code == 2 and "--base: " in err and "is a run, not a model" in err and "recipe.yaml" not in err
    code, _, err = lorakit("merge", run.folder, "--base", tmp_path / "moved")
    assert code == 0, err
    edit_json(tmp_path / "moved" / "config.json", rms_norm_eps=0.5)
    code, _, err = lorakit("merge", run.folder, "--base", tmp_path / "moved", "--overwrite")
    assert code == 2 and "was trained on other weights or another configuration" in err
