"""Promises of training with every kind: resuming, going on from an adapter, full fine-tuning, optimizers."""

import copy
import json
import shutil

import pytest
import torch
from conftest import TINY_LLAMA
from eval_runs import evaluate
from model_families import FAMILIES
from peft import LoraConfig, PeftModel, get_peft_model
from runs_of_tests import adapter_weights, losses, run_recipe
from safetensors.torch import load_file, save_file
from test_docs import PROGRAM
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from lorakit.errors import Interrupted, UserError
from lorakit.merge.inputs import input_of_run
from lorakit.merge.run import merge
from lorakit.model.load import load_model
from lorakit.model.peft_adapter import attach_adapter
from lorakit.model.targets import select_targets
from lorakit.prepare import prepare_run, reopen_run
from lorakit.progress import Silent
from lorakit.recipe.load import RecipeErrors, load
from lorakit.recipe.schema import Adapter
from lorakit.run_dir import Run
from lorakit.train.arguments import with_faster_b
from lorakit.train.preflight import check_loss
from lorakit.train.setup import set_up_training
from lorakit.train.trainer import TrainingCallback

ADALORA = {"adalora": {"every": 1, "shrink_from": 0.1, "shrink_to": 0.8}}
FLEXLORA = {"flexlora": {"every": 1, "moved": 2, "move_from": 0.1, "move_to": 0.8}}


class Told(Silent):
    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)

    warn = say


def stop_after(monkeypatch, step):
    """Ask the next run to stop as Ctrl-C would, after so many steps."""
    on_step_end = TrainingCallback.on_step_end

    def stopping(self, args, state, control, **others):
        if state.global_step == step:
            self.trainer.stopping.signal = 2
        on_step_end(self, args, state, control, **others)

    monkeypatch.setattr(TrainingCallback, "on_step_end", stopping)


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        pytest.param("dora", {}, marks=pytest.mark.slow),
        ("dora", {"checkpointing": True}),
        pytest.param("pissa", {"dropout": 0.1}, marks=pytest.mark.slow),
        pytest.param("eva", {"train_modules": ["embed_tokens"]}, marks=pytest.mark.slow),
        pytest.param("loftq", {}, marks=pytest.mark.slow),
        (ADALORA, {}),
        pytest.param(FLEXLORA, {}, marks=pytest.mark.slow),
        ("none", {"rank": ..., "alpha": ...}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) and value else str(value),
)
def test_an_interrupted_run_of_every_kind_of_state_ends_as_if_it_never_stopped(
    recipe_file, tmp_path, monkeypatch, kind, extra
):
    train = {"learning_rate": 0.01, "eval_every": 5, "save_every": 3, "steps": 10, "epochs": None}
    train["gradient_checkpointing"] = extra.pop("checkpointing", False)
    path = recipe_file(adapter={"kind": kind, **extra}, train=train)
    whole, _ = run_recipe(path, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        with pytest.raises(Interrupted):
            run_recipe(path, tmp_path / "stopped")
    again, _ = run_recipe(path, tmp_path / "stopped", resume=True)
    assert losses(again) == losses(whole)
    name = "model/model.safetensors" if kind == "none" else "adapter/adapter_model.safetensors"
    one, other = (load_file(run.folder / name) for run in (whole, again))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "paged-adamw-8bit"])
def test_every_optimizer_resumes_bit_for_bit(recipe_file, tmp_path, monkeypatch, optimizer):
    train = {"learning_rate": 0.01, "save_every": 2, "steps": 5, "epochs": None, "optimizer": optimizer, "lora_plus": 4}
    path = recipe_file(train=train, adapter={"rank": 32, "train_modules": ["embed_tokens"]})
    whole, _ = run_recipe(path, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Interrupted):
            run_recipe(path, tmp_path / "stopped")
    again, _ = run_recipe(path, tmp_path / "stopped", resume=True)
    one, other = adapter_weights(whole), adapter_weights(again)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_8_bit_states_are_in_8_bits(recipe_file, tmp_path):
    path = recipe_file(train={"optimizer": "adamw-8bit", "steps": 2, "epochs": None}, adapter={"rank": 64, "alpha": 8})
    run, _ = run_recipe(path, tmp_path / "run")
    state = torch.load(run.checkpoint(2) / "optimizer.pt", weights_only=True)["state"]
    kept = [next(value for value in values.values() if isinstance(value, dict)) for values in state.values()]
    wide = [values["state1"] for values in kept if values["state1"].numel() >= 4096]
    assert wide and all(moments.dtype == torch.uint8 for moments in wide)


def test_lora_plus_teaches_the_b_matrices_faster(recipe_file, tmp_path):
    path = recipe_file(train={"steps": 1, "epochs": None, "warmup": 0, "learning_rate": 1e-3})
    plain, _ = run_recipe(path, tmp_path / "plain")
    faster, _ = run_recipe(path, tmp_path / "faster", "train.lora_plus=16")
    one, other = adapter_weights(plain), adapter_weights(faster)
    for name in one:  # AdamW's first step is the learning rate in each direction, and B starts at zero
        ratio = 16 if "lora_B" in name else 1
        assert float(other[name].abs().max()) == pytest.approx(ratio * float(one[name].abs().max()), rel=1e-2), name


def test_the_groups_of_lora_plus_hold_every_weight_once():
    model = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(2, 2, bias=False), "lora_B": torch.nn.Linear(2, 2)})
    wrapped = torch.nn.ModuleDict({"layer": model})
    groups = [{"params": list(wrapped.parameters()), "lr": 0.1, "weight_decay": 0.5}]
    split = with_faster_b(groups, wrapped, 4.0)
    assert [(len(group["params"]), group["lr"], group["weight_decay"]) for group in split] == [
        (1, 0.1, 0.5),
        (2, 0.4, 0.5),
    ]


def test_full_fine_tuning_trains_everything_and_is_scored_against_its_base(recipe_file, tmp_path, tiny_base):
    path = recipe_file(adapter={"kind": "none", "rank": ..., "alpha": ...}, train={"learning_rate": 0.01})
    run, _ = run_recipe(path, tmp_path / "run")
    counts = run.read_manifest()["parameters"]
    assert counts["trainable"] == counts["total"] == LlamaForCausalLM.from_pretrained(tiny_base).num_parameters()
    before, after = load_file(tiny_base / "model.safetensors"), load_file(run.model / "model.safetensors")
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert "All weights" in (run.model / "README.md").read_text()
    scored, _ = evaluate(*reopen_run(run.folder, Silent()), Silent())
    assert [model.name for model in scored] == ["base", "model"]
    assert scored[1].scores["loss"] < scored[0].scores["loss"]


def test_full_fine_tuning_of_chosen_modules_leaves_the_others_alone(recipe_file, tmp_path, tiny_base):
    adapter = {"kind": "none", "rank": ..., "alpha": ..., "targets": ["down_proj"], "layers": [1]}
    run, _ = run_recipe(recipe_file(adapter=adapter), tmp_path / "run")
    before, after = load_file(tiny_base / "model.safetensors"), load_file(run.model / "model.safetensors")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]


def test_a_run_goes_on_from_another_runs_adapter(recipe_file, tmp_path, tiny_base):
    first, _ = run_recipe(recipe_file(adapter={"kind": "dora", "rank": 3, "alpha": 6}), tmp_path / "first")
    path = recipe_file(adapter={"from": str(first.folder), "rank": ..., "alpha": ...}, train={"learning_rate": 1e-9})
    second, _ = run_recipe(path, tmp_path / "second")
    assert losses(second)[0] < losses(first)[0] - 0.3
    config = json.loads((second.adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_dora"]) == (3, 6, True)
    one, other = adapter_weights(first), adapter_weights(second)
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
    again = load(second.recipe).recipe
    assert getattr(again.adapter, "from") == str(first.folder)


def test_a_checkpoint_is_an_adapter_too(recipe_file, tmp_path, tiny_base):
    path = recipe_file(adapter={"kind": "pissa"}, train={"steps": 4, "epochs": None, "save_every": 2, "keep": 4})
    first, _ = run_recipe(path, tmp_path / "first")
    checkpoint = first.checkpoint(2)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), checkpoint)
    saved = ["adapter.kind=lora", "adapter.rank=8", "adapter.alpha=16"]
    second, _ = run_recipe(path, tmp_path / "second", f"adapter.from={checkpoint}", *saved)
    assert losses(second)[0] < losses(first)[0]


def test_a_recipe_goes_on_with_its_own_adapter_as_it_is_written(recipe_file, tmp_path):
    path = recipe_file(adapter={"kind": {"pissa": {"iterations": 4}}, "rank": 4, "alpha": 8})
    first, _ = run_recipe(path, tmp_path / "first")
    second, _ = run_recipe(path, tmp_path / "second", f"adapter.from={first.folder}", "train.learning_rate=0.001")
    config = json.loads((second.adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)  # PiSSA is saved as LoRA of twice the rank
    assert losses(second)[0] < losses(first)[0] - 0.3
    with pytest.raises(RecipeErrors, match="has rank 4"):
        load(path, [f"adapter.from={first.folder}", "adapter.rank=8"])


def test_an_adapter_that_plain_peft_saved_is_trained_on(recipe_file, tmp_path, tiny_base):
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    foreign = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]))
    foreign.save_pretrained(tmp_path / "foreign")
    path = recipe_file(adapter={"from": str(tmp_path / "foreign"), "rank": ..., "alpha": ...})
    run, _ = run_recipe(path, tmp_path / "run")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), run.adapter)
    assert sum("lora_A" in name for name, _ in again.named_parameters()) == 2
    assert losses(run)[-1] < losses(run)[0]


def test_adapters_that_cannot_be_trained_on_are_refused(recipe_file, tmp_path, tiny_base):
    from peft import IA3Config

    other = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_base),
        IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    )
    other.save_pretrained(tmp_path / "ia3")
    path = recipe_file(adapter={"from": str(tmp_path / "ia3"), "rank": ..., "alpha": ...})
    with pytest.raises(RecipeErrors, match="an adapter of the type IA3"):
        load(path)
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    alien = get_peft_model(LlamaForCausalLM(config), LoraConfig(target_modules=["q_proj"]))
    alien.save_pretrained(tmp_path / "alien")
    with pytest.raises(UserError, match="cannot be put on the base model"):
        run_recipe(path, tmp_path / "run", f"adapter.from={tmp_path / 'alien'}")
    shutil.rmtree(tmp_path / "ia3")
    with pytest.raises(RecipeErrors, match=r"adapter\.from"):
        load(path)


def test_going_on_upon_another_base_is_said(recipe_file, tmp_path, tiny_base):
    first, _ = run_recipe(recipe_file(), tmp_path / "first")
    moved = tmp_path / "moved"
    shutil.copytree(tiny_base, moved)
    model = LlamaForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    model.save_pretrained(moved)
    told = Told()
    path = recipe_file(adapter={"from": str(first.folder), "rank": ..., "alpha": ...}, model={"base": str(moved)})
    set_up_training(prepare_run(load(path).recipe, Silent()), None, told)
    assert any("was trained on other weights" in line for line in told.lines)


def test_modules_that_the_loss_does_not_reach_are_refused(recipe_file, tmp_path, tiny_base):
    prepared = prepare_run(load(recipe_file()).recipe, Silent())
    base = load_model(prepared.base, prepared.model, "cpu")
    base.model.layers[0].unused = torch.nn.Linear(32, 32)
    settings = Adapter(targets=["q_proj", "unused"])
    model = attach_adapter(base, settings, 0, select_targets(base, settings), None)
    with pytest.raises(UserError, match=r"does not reach 1 of the chosen modules.*layers\.0\.unused"):
        check_loss(model, prepared)


def test_train_modules_are_trained_whole_and_tied_ends_stay_tied(recipe_file, tmp_path, tokenizer):
    torch.manual_seed(3)
    folder = tmp_path / "tied"
    config = LlamaConfig(
        vocab_size=len(tokenizer), tie_word_embeddings=True, bos_token_id=None, pad_token_id=0, **TINY_LLAMA
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    adapter = {"kind": "pissa", "train_modules": ["embed_tokens"]}
    run, _ = run_recipe(recipe_file(model={"base": str(folder)}, adapter=adapter), tmp_path / "run")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), run.adapter)
    inner = again.get_base_model()
    embeddings = inner.get_input_embeddings().weight
    assert torch.equal(inner.get_output_embeddings().weight, embeddings)
    assert not torch.equal(embeddings, AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight)


def test_without_a_gpu_paged_states_stay_in_main_memory_and_the_adapter_is_the_same(recipe_file, tmp_path, lorakit):
    adapter = {"rank": 3200, "alpha": 8}  # bitsandbytes pages from 100,000 numbers on
    path = recipe_file(train={"steps": 2, "epochs": None}, adapter=adapter)
    optimizers = ("adamw-8bit", "paged-adamw-8bit")
    outputs = [
        lorakit("train", path, "--set", f"train.optimizer={one}", "--output", tmp_path / one) for one in optimizers
    ]
    assert [code for code, _, _ in outputs] == [0, 0]
    assert ["stay in main memory" in err for _, _, err in outputs] == [False, True]
    one, other = (adapter_weights(Run(tmp_path / one)) for one in optimizers)
    assert all(torch.equal(one[name], other[name]) for name in one) and one.keys() == other.keys()


@pytest.mark.parametrize("kind", ["lora", "dora", "pissa", "eva", ADALORA], ids=str)
def test_half_precision_bases_train_with_modules_in_float32_beside(recipe_file, tmp_path, kind):
    adapter = {"kind": kind, "train_modules": ["embed_tokens", "norm"]}
    train = {"learning_rate": "auto", "steps": 5, "epochs": None}
    run, _ = run_recipe(recipe_file(adapter=adapter, model={"dtype": "bfloat16"}, train=train), tmp_path / "run")
    assert losses(run)[-1] < losses(run)[0]
    assert all(tensor.dtype == torch.float32 for tensor in adapter_weights(run).values())
    scored, _ = evaluate(*reopen_run(run.folder, Silent()), Silent())
    assert scored[1].scores["loss"] < scored[0].scores["loss"]


def test_dora_with_gradient_checkpointing_is_the_same_training(recipe_file, tmp_path):
    train = {"learning_rate": 0.05, "steps": 8, "epochs": None}
    path = recipe_file(adapter={"kind": "dora"}, train=train, data={"eval": None})
    off, _ = run_recipe(path, tmp_path / "off", "train.gradient_checkpointing=false")
    on, _ = run_recipe(path, tmp_path / "on", "train.gradient_checkpointing=true", "train.micro_batch=3")
    assert losses(on) == pytest.approx(losses(off), abs=2e-6)


def saved_by_peft(tmp_path, base, name, **settings):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"], **settings)
    )
    model.save_pretrained(tmp_path / name)
    return tmp_path / name


def begun_from(recipe_file, folder):
    return recipe_file(adapter={"from": str(folder), "rank": ..., "alpha": ...})


def test_adapters_that_would_be_changed_in_silence_are_refused(recipe_file, tmp_path, tiny_base):
    biased = saved_by_peft(tmp_path, tiny_base, "biased", bias="all")
    with pytest.raises(RecipeErrors, match="trained biases of the base"):
        load(begun_from(recipe_file, biased))
    awaiting = saved_by_peft(tmp_path, tiny_base, "awaiting", alora_invocation_tokens=[5], task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="alora_invocation_tokens"):
        run_recipe(begun_from(recipe_file, awaiting), tmp_path / "run")
    folder = saved_by_peft(tmp_path, tiny_base, "more")
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(iter(weights))
    save_file(
        {**weights, name.replace("layers.0", "layers.9"): weights[name].clone()}, folder / "adapter_model.safetensors"
    )
    with pytest.raises(UserError, match=r"layers\.9.*, for which the base model has no place"):
        run_recipe(begun_from(recipe_file, folder), tmp_path / "run")
    save_file({**weights, name: weights[name] * float("nan")}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="not finite"):
        run_recipe(begun_from(recipe_file, folder), tmp_path / "run")
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(RecipeErrors, match="not a JSON object"):
        load(begun_from(recipe_file, folder))


def test_an_ended_run_needs_the_adapter_it_began_from_no_more(recipe_file, tmp_path):
    first, _ = run_recipe(recipe_file(), tmp_path / "first")
    second, _ = run_recipe(begun_from(recipe_file, first.folder), tmp_path / "second")
    beginning = second.read_manifest()["adapter_from"]
    assert beginning["sha256"]["adapter_model.safetensors"] == first.read_manifest()["adapter_sha256"]
    shutil.rmtree(first.folder)
    scored, _ = evaluate(*reopen_run(second.folder, Silent()), Silent())
    assert scored[1].scores["loss"] < scored[0].scores["loss"]


def test_a_changed_configuration_of_the_adapter_is_noticed(recipe_file, tmp_path):
    run, _ = run_recipe(recipe_file(), tmp_path / "run")
    config = run.adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 80'))
    with pytest.raises(UserError, match=r"adapter_config\.json: is not what this run trained"):
        reopen_run(run.folder, Silent())


def test_an_unfinished_run_is_named_as_such(recipe_file, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Interrupted):
            run_recipe(recipe_file(), tmp_path / "stopped")
    with pytest.raises(RecipeErrors, match=r"has not ended. Go on with lorakit train --resume"):
        load(begun_from(recipe_file, tmp_path / "stopped"))


def test_overwriting_never_clears_the_adapter_that_is_trained_on(recipe_file, tmp_path):
    first, _ = run_recipe(recipe_file(), tmp_path / "first")
    path = begun_from(recipe_file, first.checkpoint(12))
    with pytest.raises(UserError, match="which --overwrite would clear"):
        PROGRAM.commands["train"].main([str(path), "-o", str(first.folder), "--overwrite", "-q"], standalone_mode=False)
    assert first.adapter.is_dir()


def test_full_fine_tuning_leaves_the_configuration_of_its_base(recipe_file, tmp_path, tokenizer):
    torch.manual_seed(5)
    sizes = {**TINY_LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1, "bos_token_id": None, "pad_token_id": 0}
    MixtralForCausalLM(MixtralConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "mixtral")
    tokenizer.save_pretrained(tmp_path / "mixtral")
    path = recipe_file(model={"base": str(tmp_path / "mixtral")}, adapter={"kind": "none", "rank": ..., "alpha": ...})
    run, _ = run_recipe(path, tmp_path / "run", "train.steps=3")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "mixtral", run.model))
    assert before == after
    evaluate(*reopen_run(run.folder, Silent()), Silent())
    with pytest.raises(RecipeErrors, match="trained the weights themselves, and has no adapter"):
        load(begun_from(recipe_file, run.folder))
    with pytest.raises(UserError, match="trained the weights themselves"):
        merge(input_of_run(*reopen_run(run.folder, Silent()), Silent()), tmp_path / "merged", Silent())


def test_full_fine_tuning_keeps_a_configuration_as_another_release_wrote_it(recipe_file, tmp_path, tiny_base):
    """transformers 5 writes rope_parameters, in which 4.57 does not find rope_theta."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    config = json.loads((base / "config.json").read_text())
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"] * 50, "rope_scaling": None, "of_another": 4}
    config["torch_dtype"] = config.pop("dtype")
    (base / "config.json").write_text(json.dumps(config))
    (base / "LICENSE").write_text("free")
    path = recipe_file(model={"base": str(base)}, adapter={"kind": "none", "rank": ..., "alpha": ...})
    run, _ = run_recipe(path, tmp_path / "run", "train.steps=1")
    assert json.loads((run.model / "config.json").read_text()) == config
    assert json.loads((run.model / "generation_config.json").read_text())["eos_token_id"]
    assert (run.model / "LICENSE").read_text() == "free"
    rotary = [AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb.inv_freq for folder in (base, run.model)]
    assert torch.equal(*rotary)


def test_full_fine_tuning_of_a_base_that_sees_leaves_the_language_model_it_trained(recipe_file, tmp_path, tokenizer):
    """transformers loads the language model alone, whose configuration is not the base's."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    torch.manual_seed(5)
    text = copy.deepcopy(FAMILIES["qwen3.5"].config)
    text.vocab_size, text.max_position_embeddings = len(tokenizer), 256
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    base = tmp_path / "seeing"
    config = Qwen3_5Config(text_config=text.to_dict(), vision_config=vision, pad_token_id=0)
    Qwen3_5ForConditionalGeneration(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    path = recipe_file(model={"base": str(base)}, adapter={"kind": "none", "rank": ..., "alpha": ...})
    run, _ = run_recipe(path, tmp_path / "run", "train.steps=1")
    model, info = AutoModelForCausalLM.from_pretrained(run.model, output_loading_info=True)
    assert model.config.model_type == "qwen3_5_text" and not info["missing_keys"] and not info["unexpected_keys"]
    assert json.loads((run.model / "config.json").read_text())["torch_dtype"] == "float32"


@pytest.mark.parametrize(
    "family",
    ["opt", "gemma4-text", *(pytest.param(family, marks=pytest.mark.slow) for family in ("llama4", "qwen3.5"))],
)
def test_families_whose_layers_or_bodies_are_unlike_others_are_trained(recipe_file, tmp_path, tokenizer, family):
    torch.manual_seed(5)
    config = copy.deepcopy(FAMILIES[family].config)
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 256
    config.vocab_size_per_layer_input = len(tokenizer)  # Gemma 4's second embeddings
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / family)
    tokenizer.save_pretrained(tmp_path / family)
    adapter = {"kind": {"eva": {"converged": 0.9}}, "rank": 2} if family == "opt" else {"kind": "lora"}
    path = recipe_file(model={"base": str(tmp_path / family)}, adapter=adapter)
    run, _ = run_recipe(path, tmp_path / "run", "train.steps=6")
    assert losses(run)[-1] < losses(run)[0]
    _, prepared = reopen_run(run.folder, Silent())
    assert prepared.expected is None  # what has ended needs no sizes, which would take a model to be built


def test_a_single_step_learns(recipe_file, tmp_path):
    run, _ = run_recipe(recipe_file(), tmp_path / "run", "train.steps=1")
    assert any(weight.any() for name, weight in adapter_weights(run).items() if "lora_B" in name)
