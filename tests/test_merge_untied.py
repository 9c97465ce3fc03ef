"""Promises on merges of adapters that change tied weights apart, or bring weights of the base: they are merged as PEFT
computes them, or refused by name."""

import json

import pytest
import torch
from conftest import TINY_LLAMA
from model_families import FAMILIES
from peft import PeftModel
from peft_adapters import KINDS, lora, save_peft_adapter
from runs_of_tests import run_recipe
from test_merge_families import fold
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lorakit.errors import UserError
from lorakit.merge.inputs import input_of_run
from lorakit.merge.run import merge, verify
from lorakit.model.base_files import list_tensors
from lorakit.prepare import reopen_run
from lorakit.progress import Silent

IDS = torch.tensor([[5, 6, 7, 3, 9, 30]])
CHANGED_BASES = ("pissa", "pissa of random parts", "olora")
REFUSED = {
    **dict.fromkeys(CHANGED_BASES, "belongs to a base changed by that"),
    "lora_bias": r"changes model\.layers\.0\.self_attn\.q_proj\.bias, which the base does not have",
    "ia3": "PEFT's kind IA3",
    "vera": "PEFT's kind VERA",
}
APART = ("head", "embeddings", "head and embeddings", "lora on embeddings", "lora on the head")


def in_memory(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def write_base(config, folder, tied):
    torch.manual_seed(1)
    config.tie_word_embeddings = tied
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def check(base, adapter, output):
    """The merged files compute what PEFT computes, and whether they are untied."""
    fold(base, adapter, output)
    merged, info = in_memory(output)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    wanted = logits(PeftModel.from_pretrained(in_memory(base)[0], adapter))
    assert torch.allclose(logits(merged), wanted, atol=1e-5)
    config = json.loads((output / "config.json").read_text())
    return "lm_head.weight" in " ".join(list_tensors(output)) and config["tie_word_embeddings"] is False


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_peft_s_is_merged_or_refused_by_name(kind, tied, tmp_path):
    base = write_base(FAMILIES["llama"].config, tmp_path / "base", tied)
    adapter = save_peft_adapter(base, tmp_path / "adapter", KINDS[kind](), seed=1)
    if kind in REFUSED:
        with pytest.raises(UserError, match=REFUSED[kind]):
            fold(base, adapter, tmp_path / "merged")
    else:
        assert check(base, adapter, tmp_path / "merged") is (not tied or kind in APART)


@pytest.mark.parametrize(
    ("family", "embeddings"),
    [("gpt2", "wte"), ("gemma3", "embed_tokens"), ("opt", "embed_tokens"), ("bloom", "word_embeddings")],
)
def test_in_other_families_tied_ends_come_apart_too(family, embeddings, tmp_path):
    base = write_base(FAMILIES[family].config, tmp_path / "base", tied=True)
    targets = r".*\.(q_proj|c_attn|query_key_value)"
    ways = {
        "both": {"modules_to_save": [embeddings, "lm_head"]},
        "biases": {"bias": "all"},
        "tokens": {"trainable_token_indices": {embeddings: [3, 5, 6]}},
    }
    for name, settings in ways.items():
        adapter = save_peft_adapter(base, tmp_path / name, lora(target_modules=targets, **settings))
        assert check(base, adapter, tmp_path / f"{name}-merged") is (name == "both")


def test_a_run_from_an_adapter_with_both_ends_apart_is_merged_untied_and_proved(recipe_file, tmp_path, tokenizer):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, **TINY_LLAMA
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    apart = save_peft_adapter(tmp_path / "base", tmp_path / "apart", KINDS["head and embeddings"](), seed=3)
    path = recipe_file(
        model={"base": str(tmp_path / "base")},
        adapter={"from": str(apart), "rank": ..., "alpha": ...},
        train={"steps": 2, "epochs": None, "save_every": 2, "eval_every": 2, "learning_rate": 0.001},
    )
    run, _ = run_recipe(path, tmp_path / "run")
    opened, prepared = reopen_run(run.folder, Silent())
    merged = merge(input_of_run(opened, prepared, Silent()), opened.merged, Silent())
    assert merged.untied and merged.proof and merged.proof.max_logit_difference < 1e-3
    assert json.loads((run.merged / "config.json").read_text())["tie_word_embeddings"] is False
    assert json.loads((run.merged / "merge.json").read_text())["untied"] is True
    assert "two weights" in (run.merged / "README.md").read_text()
    assert verify(input_of_run(opened, prepared, Silent()), run.merged, Silent()).untied
    assert AutoTokenizer.from_pretrained(run.merged).eos_token_id == tokenizer.eos_token_id
