"""Promises of `model.add_tokens`: the embeddings grow, the new rows alone are trained, and all that reads the result
reads them."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import TINY_LLAMA, rows_of
from distributed_runs import train_on
from eval_runs import make_run
from peft import LoraConfig, PeftModel, get_peft_model
from runs_of_tests import adapter_weights, run_recipe
from safetensors.torch import load_file
from test_adapter_training import stop_after
from test_data_parallel import STEPS, assert_same_training
from test_loss import FAMILIES, batch, tiny
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PhiConfig

from lorakit.data.added_tokens import add_tokens
from lorakit.errors import Interrupted, UserError
from lorakit.model.fused_lora import fused_lora
from lorakit.model.loss import supervised_loss
from lorakit.model.new_rows import with_new_tokens, with_rows_of
from lorakit.model.peft_adapter import attach_adapter
from lorakit.model.resolve import Base
from lorakit.model.targets import select_targets
from lorakit.recipe.chat_templates import template_file
from lorakit.recipe.schema import Adapter

CHAT = ["<|im_start|>", "<|im_end|>"]
KINDS = {"tied, grows": (True, 0), "untied, grows": (False, 0), "tied, one free": (True, 1), "untied, free": (False, 8)}


@pytest.fixture(scope="session")
def plain_tokenizer():
    """A byte-level BPE tokenizer without a chat template and its tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    texts = [message["content"] for row in rows_of(200) for message in row["messages"]]
    raw.train_from_iterator([*texts, "system user assistant"], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>")


def write_base(folder: Path, tokenizer, tied: bool, free: int) -> Path:
    """A random Llama with `free` rows more than tokens."""
    torch.manual_seed(7)
    sizes = {"vocab_size": len(tokenizer) + free, "eos_token_id": 0, "bos_token_id": None, **TINY_LLAMA}
    LlamaForCausalLM(LlamaConfig(tie_word_embeddings=tied, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory, plain_tokenizer):
    """A base of each kind, and a run on it with ChatML's tokens."""
    folder = tmp_path_factory.mktemp("tokens")
    base = write_base(folder / "base", plain_tokenizer, *KINDS[request.param])
    return base, make_run(folder, base, model={"base": str(base), "chat_template": "chatml", "add_tokens": CHAT})


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: part.grad for name, part in model.named_parameters() if part.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_of_new_rows_are_those_of_plain_peft(family, tied):
    model, rows = tiny(family, tie_word_embeddings=tied), batch(shared=14)
    new = [int(rows["input_ids"][0, 2]), int(rows["labels"][1, 17]), 96]
    adapted = attach_adapter(model, Adapter(rank=2), 0, select_targets(model, Adapter(rank=2), new_rows=new)).eval()
    with torch.no_grad():
        for part in adapted.parameters():
            if part.requires_grad:
                part.add_(torch.randn(part.shape), alpha=0.05)
    with fused_lora(adapted):
        total, _ = supervised_loss(adapted, **rows)
        total.backward()
    ours = gradients(adapted)
    logits = adapted(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits[:, :-1]
    own = cross_entropy(logits.flatten(0, 1), rows["labels"][:, 1:].flatten(), reduction="sum")
    own.backward()
    theirs = gradients(adapted)
    assert sum("trainable_tokens_delta" in name for name in theirs) == (1 if tied else 2)
    assert total.item() == pytest.approx(own.item(), rel=1e-5)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():  # rounding of float32: up to 3e-5 of the largest, in Granite
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()), msg=name)


def plain_peft_model(base: Path, adapter: Path):
    """The adapter on its base by transformers and PEFT alone, and the tokenizer beside it."""
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    return PeftModel.from_pretrained(model, adapter).eval(), tokenizer


def logits_of(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def test_new_rows_alone_are_trained_and_old_ones_stay(trained):
    base, run = trained
    model, tokenizer = plain_peft_model(base, run.adapter)
    tokens = adapter_weights(run)
    deltas = {name: value for name, value in tokens.items() if "trainable_tokens_delta" in name}
    tied = model.config.tie_word_embeddings
    assert len(deltas) == (1 if tied else 2) and {value.shape for value in deltas.values()} == {(2, 32)}
    assert all(".lora_" in name for name in tokens.keys() - deltas.keys())
    ids = tokenizer.convert_tokens_to_ids(CHAT)
    assert [tokenizer(text)["input_ids"] for text in CHAT] == [[one] for one in ids]
    before = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    for delta in deltas.values():
        assert not torch.equal(delta[0], delta[1])  # both began as the mean of all rows
    rows = model.get_input_embeddings().weight
    old = [row for row in range(len(before)) if row not in ids]
    assert torch.equal(rows[old], before[old]) and len(rows) == max(len(before), max(ids) + 1)


def test_peft_alone_answers_as_the_proved_merge(trained, lorakit):
    base, run = trained
    code, _, err = lorakit("merge", run.folder)
    assert code == 0, err
    assert lorakit("merge", run.folder, "--verify", run.merged)[0] == 0
    model, tokenizer = plain_peft_model(base, run.adapter)
    merged = AutoModelForCausalLM.from_pretrained(run.merged, dtype=torch.float32).eval()
    assert merged.config.tie_word_embeddings == model.config.tie_word_embeddings
    ids = tokenizer(f"{CHAT[0]}user\nTell me{CHAT[1]}\n{CHAT[0]}assistant\n", return_tensors="pt")["input_ids"]
    expected = logits_of(model, ids)
    torch.testing.assert_close(logits_of(merged, ids), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    end = tokenizer.convert_tokens_to_ids(CHAT[1])
    assert end in merged.generation_config.eos_token_id
    assert AutoTokenizer.from_pretrained(run.merged)(CHAT[1])["input_ids"] == [end]


def losses_in(out: str) -> dict[str, float]:
    return {name: model["scores"]["loss"]["value"] for name, model in json.loads(out)["models"].items()}


@pytest.mark.parametrize("trained", ["tied, grows"], indirect=True)
def test_the_end_of_turn_stops_answers_and_is_left_out_of_them(trained, lorakit_eval):
    _, run = trained
    manifest = json.loads(run.manifest.read_text())
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    end = tokenizer.convert_tokens_to_ids(CHAT[1])
    assert end in manifest["stop_token_ids"] and tokenizer.decode([end], skip_special_tokens=True) == ""
    code, out, err = lorakit_eval(run.folder, "--json")
    assert code == 0, err
    losses = losses_in(out)
    assert losses["adapter"] < losses["base"]


@pytest.mark.parametrize("trained", ["tied, grows", "untied, free"], indirect=True)
def test_an_adapter_alone_is_scored_and_merged_on_its_plain_base(trained, tmp_path, lorakit, lorakit_eval):
    _, run = trained
    (tmp_path / "adapter").mkdir()
    for file in run.adapter.iterdir():
        if file.name != "base.json":
            (tmp_path / "adapter" / file.name).write_bytes(file.read_bytes())
    rows = run.folder.parent / "eval.jsonl"
    code, out, err = lorakit_eval(run.folder, tmp_path / "adapter", "base", "--json")
    assert code == 0, err
    one, other, _ = losses_in(out).values()
    assert one == pytest.approx(other, rel=1e-6)
    code, _, err = lorakit("merge", tmp_path / "adapter", "--data", rows, "--output", tmp_path / "merged")
    assert code == 0, err


@pytest.mark.parametrize("kind", ["lora", "pissa"])
def test_half_precision_trains_new_rows_in_float32(kind, recipe_file, tmp_path, plain_tokenizer):
    base = write_base(tmp_path / "base", plain_tokenizer, True, 0)
    model = {"base": str(base), "chat_template": "chatml", "add_tokens": CHAT, "dtype": "bfloat16"}
    train = {"epochs": None, "steps": 2, "gradient_checkpointing": True, "learning_rate": 0.001}
    run, outcome = run_recipe(recipe_file(model=model, train=train, adapter={"kind": kind}), tmp_path / "run")
    (rows,) = [value for name, value in adapter_weights(run).items() if "trainable_tokens" in name]
    assert rows.dtype == torch.float32 and not torch.equal(rows, rows.bfloat16().float())
    assert outcome.eval_loss == pytest.approx(6, abs=0.2)


def test_resume_equals_uninterrupted_with_new_tokens(recipe_file, tmp_path, monkeypatch, plain_tokenizer):
    base = write_base(tmp_path / "base", plain_tokenizer, False, 1)
    model = {"base": str(base), "chat_template": "chatml", "add_tokens": CHAT}
    path = recipe_file(model=model, train={"epochs": None, "steps": 5})
    straight, _ = run_recipe(path, tmp_path / "straight")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            run_recipe(path, tmp_path / "stopped")
    again, _ = run_recipe(path, tmp_path / "stopped", resume=True)
    one, other = adapter_weights(straight), adapter_weights(again)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_plan_counts_what_is_trained(trained, lorakit_plan, lorakit):
    base, run = trained
    parameters = json.loads(run.manifest.read_text())["parameters"]
    code, out, err = lorakit_plan(run.folder.parent / "tiny.yaml", "--json")
    assert code == 0, err
    planned = json.loads(out)["parameters"]
    assert planned["trainable"] == parameters["trainable"]
    assert planned["total"] + planned["trainable"] == parameters["total"]
    tied = json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    assert planned["token_rows"] == 2 * 32 * (1 if tied else 2)
    code, out, err = lorakit("check", run.folder.parent / "tiny.yaml")
    assert code == 0, err


@pytest.mark.parametrize("trained", ["untied, free"], indirect=True)
def test_an_adapter_is_trained_further_with_the_same_tokens_alone(trained, tmp_path):
    _, run = trained
    recipe = run.folder.parent / "tiny.yaml"
    own = [f"adapter={{from: {run.folder}}}", "train.steps=2"]
    further, _ = run_recipe(recipe, tmp_path / "further", *own)
    tokens = [name for name in adapter_weights(run) if "trainable_tokens" in name]
    before, after = adapter_weights(run), adapter_weights(further)
    assert before.keys() == after.keys() and not any(torch.equal(before[name], after[name]) for name in tokens)
    for texts, says in (
        (CHAT[::-1], r"row \d+ of the embeddings as '<\|im_start\|>', which is '<\|im_end\|>' here"),
        ([*CHAT, "<x>"], r"does not train row \d+ of the embeddings"),
    ):
        with pytest.raises(UserError, match=says):
            run_recipe(recipe, tmp_path / "refused", *own, f"model.add_tokens={json.dumps(texts)}")


def test_an_adapter_with_whole_embeddings_is_trained_further(recipe_file, tmp_path, plain_tokenizer):
    base = write_base(tmp_path / "base", plain_tokenizer, False, 0)
    model = {"base": str(base), "chat_template": "chatml", "add_tokens": CHAT}
    own = ("train.epochs=null", "train.steps=1", "adapter.train_modules=[embed_tokens, lm_head]")
    whole, _ = run_recipe(recipe_file(model=model), tmp_path / "whole", *own)
    further, _ = run_recipe(recipe_file(model=model), tmp_path / "on", *own[:2], f"adapter={{from: {whole.folder}}}")
    before, after = adapter_weights(whole), adapter_weights(further)
    ends = [name for name in before if ".lora_" not in name]
    assert len(ends) == 2 and before.keys() == after.keys()
    assert not any(torch.equal(before[name][400:], after[name][400:]) for name in ends)


def test_tokens_that_would_be_written_as_other_texts_are_refused(plain_tokenizer):
    tokenizer = copy.deepcopy(plain_tokenizer)
    (number,) = add_tokens(copy.deepcopy(tokenizer), [" Zürich"], "base")
    with pytest.raises(UserError, match=r"'aZürichb' as 'aZ\ufffdrichb'\. Write 'Zürich' with a space before it"):
        add_tokens(tokenizer, ["<a>", "Zürich"], "base")
    assert number == len(plain_tokenizer)


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["<|endoftext|>"], "has '<|endoftext|>' as one token already. Take it out"),
        (["<a>", "apples"], "has 'apples' as one token already"),
        (["<a>", "<a>"], "'<a>' is there twice. Remove one"),
        ([" "], "is white space alone"),
        ([""], "model.add_tokens[0]: expected a text, got an empty text"),
        (["<a>", "<|im_end|>"], "Write model.add_tokens: ['<a>', '<|im_end|>', '<|im_start|>'], which are then"),
    ],
)
def test_tokens_that_cannot_be_added_are_refused_by_check(texts, says, recipe_file, lorakit, tmp_path, plain_tokenizer):
    base = write_base(tmp_path / "base", plain_tokenizer, True, 0)
    template = "chatml" if CHAT[1] in texts else "zephyr"
    path = recipe_file(model={"base": str(base), "chat_template": template, "add_tokens": texts})
    code, _, err = lorakit("check", path)
    assert code == 2 and says in err


def test_an_adapter_without_a_row_that_its_base_lacks_is_refused(tmp_path, plain_tokenizer):
    base = write_base(tmp_path / "base", plain_tokenizer, False, 0)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(plain_tokenizer) + 2)
    for name, indices in (("input", {"embed_tokens": [400, 401]}), ("both", {"embed_tokens": [401], "lm_head": [401]})):
        config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=indices)
        get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path / name, save_embedding_layers=False)
        with pytest.raises(UserError, match=rf"has no row 400 of {'lm_head' if name == 'input' else 'model.embed'}"):
            with_rows_of(tmp_path / name, Base("base", base, "local folder"))


WAYS = {
    "tokens": {"trainable_token_indices": [400, 401]},
    "whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("way", WAYS)
def test_what_peft_saves_of_resized_embeddings_is_merged(way, tied, lorakit, tmp_path, plain_tokenizer):
    base, tokenizer = write_base(tmp_path / "base", plain_tokenizer, tied, 0), copy.deepcopy(plain_tokenizer)
    tokenizer.add_tokens(CHAT, special_tokens=True)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    trained = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **WAYS[way]))
    with torch.no_grad():
        for part in trained.parameters():
            if part.requires_grad:
                part.add_(torch.randn(part.shape), alpha=0.02)
    trained.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    code, _, err = lorakit("merge", tmp_path / "adapter", "--base", base, "--output", tmp_path / "merged")
    assert code == 0, err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    ids = torch.tensor([[400, 7, 9, 401, 11]])
    torch.testing.assert_close(logits_of(merged, ids), logits_of(trained.eval(), ids), rtol=1e-4, atol=1e-5)
    assert merged.config.tie_word_embeddings is (tied and way == "tokens")


def test_models_whose_vocabulary_cannot_grow_are_refused(tmp_path, plain_tokenizer):
    config = PhiConfig(vocab_size=400, **{**TINY_LLAMA, "num_key_value_heads": 4})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    plain_tokenizer.save_pretrained(tmp_path)
    base = Base("tiny-phi", tmp_path, "local folder")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"tiny-phi cannot get tokens: lm_head\.bias would not fit 401"):
        with_new_tokens(base, tokenizer, add_tokens(tokenizer, ["<a>"], base.name))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("sharding", ["none", "fsdp", "zero-2", "zero-3"])
def test_two_processes_train_the_new_rows_as_one_does(sharding, tied, recipe_file, tmp_path, plain_tokenizer):
    if sharding.startswith("zero"):
        pytest.importorskip("deepspeed")
    base = write_base(tmp_path / "base", plain_tokenizer, tied, 1)
    path = recipe_file(
        model={"base": str(base), "chat_template": "chatml", "add_tokens": CHAT}, train={**STEPS, "batch_size": 5}
    )
    one, _ = run_recipe(path, tmp_path / "one")
    several, _ = train_on(2, path, tmp_path / "several", f"train.sharding={sharding}")
    assert_same_training(one, several)


@pytest.mark.parametrize(
    ("template", "marks", "words"),
    [
        ("chatml", CHAT, ["content", "assistant", "=="]),
        ("phi-3", ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], ["<|tool|>", "role"]),
        ("chatml-tools", [*CHAT, "<tool_call>"], ["<call>", "functions"]),
    ],
)
def test_only_marks_of_the_template_are_left_out_of_answers(template, marks, words, plain_tokenizer):
    tokenizer = copy.deepcopy(plain_tokenizer)
    tokenizer.chat_template = template_file(template).read_text()
    ids = add_tokens(tokenizer, [*words, *marks], "base")
    assert {text: tokenizer.decode([number], skip_special_tokens=True) for number, text in ids.items()} == {
        **dict.fromkeys(marks, ""),
        **{word: word for word in words},
    }
