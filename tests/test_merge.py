"""Promises of `lorakit merge`: proved, or not there."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import rows_of
from runs_of_tests import run_recipe
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lorakit.errors import LorakitError, UserError
from lorakit.merge.inputs import input_of_run
from lorakit.merge.proof import TOLERANCES, Proof
from lorakit.merge.run import merge
from lorakit.prepare import reopen_run
from lorakit.progress import Silent


def merged_run(path, folder, *overrides):
    run_recipe(path, folder, *overrides)
    run, prepared = reopen_run(folder, Silent())
    return run, prepared, merge(input_of_run(run, prepared, Silent()), run.merged, Silent()).proof


@pytest.mark.parametrize(
    ("kind", "quantization"),
    [
        ("lora", "none"),
        ("lora", "q8"),
        ("lora", "q4"),
        ("rslora", "nf4"),
        ("dora", "none"),
        ("dora", "nf4"),
    ],
)
def test_the_merged_model_predicts_what_the_adapter_model_predicts(recipe_file, tmp_path, kind, quantization):
    path = recipe_file(adapter={"kind": kind, "rank": 4}, model={"quantization": quantization})
    run, _, proof = merged_run(path, tmp_path / "run", "train.steps=4", "train.epochs=null")
    assert proof.max_logit_difference <= 1e-4 * proof.logit_scale
    assert proof.positions > 50
    assert proof.adapter_loss == pytest.approx(proof.merged_loss, rel=1e-4)
    facts = json.loads((run.merged / "merge.json").read_text())
    assert facts["proof"]["rows"] == proof.rows == 10
    assert (facts["onto"], facts["quantization"]) == ("trained", quantization)
    assert "quantization_config" not in json.loads((run.merged / "config.json").read_text())


@pytest.mark.parametrize("tied", [True, False])
def test_trained_embeddings_are_merged_and_stay_tied_or_apart(recipe_file, tmp_path, tiny_base, tied):
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(tiny_base, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / "base")
    model = {"base": str(tmp_path / "base"), "dtype": "float32"}  # which rounds no weight of the base
    path = recipe_file(model=model, adapter={"rank": 4, "train_modules": ["embed_tokens"]})
    run, _, proof = merged_run(path, tmp_path / "run", "train.steps=4", "train.epochs=null")
    assert proof.max_logit_difference <= 1e-4 * proof.logit_scale
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    after, info = AutoModelForCausalLM.from_pretrained(run.merged, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert after.config.tie_word_embeddings is tied
    assert (after.lm_head.weight is after.model.embed_tokens.weight) is tied
    assert not torch.equal(after.model.embed_tokens.weight, before.model.embed_tokens.weight)
    assert torch.equal(after.lm_head.weight, before.lm_head.weight) is not tied


def test_the_merged_folder_is_a_plain_model_that_knows_how_to_stop(recipe_file, tmp_path, tokenizer):
    run, prepared, _ = merged_run(recipe_file(), tmp_path / "run")
    model, info = AutoModelForCausalLM.from_pretrained(run.merged, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert set(model.generation_config.eos_token_id) >= {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    again = AutoTokenizer.from_pretrained(run.merged)
    conversation = rows_of(1)[0]["messages"]
    assert again.apply_chat_template(conversation, tokenize=False) == prepared.tokenizer.apply_chat_template(
        conversation, tokenize=False
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_is_merged_into_its_own_type(recipe_file, tmp_path, tiny_base, dtype):
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tiny_base, dtype=dtype).save_pretrained(half)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(half)
    run, _, proof = merged_run(recipe_file(model={"base": str(half)}), tmp_path / "run")
    assert AutoModelForCausalLM.from_pretrained(run.merged, dtype="auto").dtype == dtype
    assert proof.mean_kl < 1e-3
    assert proof.top1_agreement_beyond_ties >= 0.995


def test_a_merge_that_answers_otherwise_is_not_put_in_place(recipe_file, tmp_path, monkeypatch):
    import lorakit.merge.run as merging

    run_recipe(recipe_file(), tmp_path / "run")
    run, prepared = reopen_run(tmp_path / "run", Silent())
    adapter_deltas = merging.adapter_deltas

    def damaged(model):
        deltas = adapter_deltas(model)
        path = "model.layers.0.mlp.down_proj.weight"
        sound = deltas[path]
        deltas[path] = replace(sound, apply=lambda weight, row: 1.5 * sound.apply(weight, row))
        return deltas

    monkeypatch.setattr(merging, "adapter_deltas", damaged)
    with pytest.raises(LorakitError, match="does not answer as the adapter does"):
        merge(input_of_run(run, prepared, Silent()), run.merged, Silent())
    assert not run.merged.exists()
    assert not list(run.folder.glob(".*"))


def test_another_base_is_refused(recipe_file, tmp_path, tiny_base):
    import shutil

    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    run_recipe(recipe_file(model={"base": str(base)}), tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.norm.weight.data += 0.01
    model.save_pretrained(base)
    with pytest.raises(UserError, match="other weights"):
        reopen_run(tmp_path / "run", Silent())


def test_without_held_out_rows_the_proof_uses_training_rows_and_says_so(recipe_file, tmp_path):
    run, _, proof = merged_run(recipe_file(data={"eval": None}), tmp_path / "run")
    assert json.loads((run.merged / "merge.json").read_text())["rows_of"] == "training"
    assert proof.rows == 22


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"max_logit_difference": 1.0}, "a logit differs"),
        ({"mean_kl": float("nan")}, "mean KL"),
        ({"top1_agreement_beyond_ties": 0.5}, "top-1"),
    ],
)
def test_each_figure_beyond_its_tolerance_fails(change, reason):
    good = Proof(1, 10, 0.0, 10.0, 0.0, 1.0, 1.0, 2.0, 2.0)
    assert good.failures(TOLERANCES["float32"]) == []
    bad = Proof(**{**good.__dict__, **change})
    assert reason in " ".join(bad.failures(TOLERANCES["float32"]))


def test_a_damaged_adapter_is_one_clear_error(recipe_file, tmp_path):
    run_recipe(recipe_file(), tmp_path / "run")
    run, prepared = reopen_run(tmp_path / "run", Silent())
    weights = run.adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="this weights file is damaged"):
        merge(input_of_run(run, prepared, Silent()), run.merged, Silent())
    weights.unlink()
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        merge(input_of_run(run, prepared, Silent()), run.merged, Silent())
