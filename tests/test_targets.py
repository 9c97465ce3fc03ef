"""Which weights get an adapter: words, names, patterns, layers, ranks, fused experts, modules trained whole."""

import copy
import re

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from model_families import FAMILIES
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lorakit.errors import UserError
from lorakit.model.targets import select_targets, top_by_snr
from lorakit.recipe.schema import Adapter
from lorakit.registry import ADAPTERS

TOKENS = torch.randint(3, 64, (2, 32), generator=torch.Generator().manual_seed(0))


def tiny(family, **changes):
    torch.manual_seed(0)
    config = copy.deepcopy(FAMILIES[family].config)
    for key, value in changes.items():
        setattr(config, key, value)
    return AutoModelForCausalLM.from_config(config)


def select(model, signal=None, **settings):
    return select_targets(model, Adapter(**settings), signal)


def paths(targets):
    return {*targets.modules, *targets.experts}


def names(chosen):
    return {path.removesuffix(".weight").rsplit(".", 1)[-1] for path in chosen}


def attached(model, **settings):
    adapter = Adapter(**{"rank": 2, **settings})
    return get_peft_model(model, ADAPTERS["lora"].function(adapter, select_targets(model, adapter)))


@pytest.mark.parametrize("family", FAMILIES)
def test_words_divide_a_family_and_every_adapter_gets_a_gradient(family):
    model, known = tiny(family), FAMILIES[family]
    everything = select(model, targets="all-linear")
    attention = paths(select(model, targets="attention")) if known.attention else set()
    mlp = paths(select(model, targets="mlp")) if known.mlp else set()
    rest = paths(everything) - attention - mlp
    assert not attention & mlp and attention | mlp <= paths(everything)
    for chosen, expected in ((attention, known.attention), (mlp, known.mlp), (rest, known.rest)):
        assert names(chosen) == set(expected)
    peft = attached(model)
    peft(input_ids=TOKENS, labels=TOKENS).loss.backward()
    gradients = {name: weight.grad for name, weight in peft.named_parameters() if "lora_B" in name}
    assert len(gradients) == len(paths(everything))
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())


def test_a_name_is_a_path_its_end_or_a_part_of_it():
    model = tiny("llama")
    assert select(model, targets=["q_proj"]).modules == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert len(select(model, targets=["model.layers.1.mlp.up_proj"]).modules) == 1
    assert len(select(model, targets=["mlp", "layers.0"]).modules) == 10
    assert len(select(model, targets=r".*layers\.1\..*_proj").modules) == 7
    assert len(select(model, exclude=["down_proj", r".*\.1\.mlp\..*"]).modules) == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"targets": ["proj"]},
            r"adapter.targets: 'proj' matches no linear layer of this model, which has q_proj \(2\)",
        ),
        ({"targets": "z.*"}, r"adapter.targets: 'z\.\*' matches no linear layer"),
        ({"targets": "q_proj"}, r"Write it as a list: \[q_proj\]\."),
        ({"exclude": ["c_attn"]}, r"adapter.exclude: 'c_attn' matches no chosen module; chosen are q_proj \(2\)"),
        ({"targets": "attention", "exclude": ["mlp"]}, "adapter.exclude: 'mlp' matches no chosen module"),
        ({"exclude": ["self_attn", "mlp"]}, "adapter.exclude takes away every module"),
        ({"rank_overrides": {"c_attn": 4}}, "adapter.rank_overrides: 'c_attn' matches no chosen module"),
        ({"targets": "mlp", "alpha_overrides": {"q_proj": 4}}, "adapter.alpha_overrides: 'q_proj' matches no chosen"),
        ({"layers": [0, 40]}, "adapter.layers: 40 is not a layer of the model: this model has layers 0 to 1"),
        ({"layers": "1-2"}, "adapter.layers: 2 is not a layer of the model"),
        (
            {"targets": ["lm_head"], "layers": "0-1"},
            "adapter.layers: no module that adapter.targets chose is in a numb",
        ),
        ({"layers": {"spectrum": 0.5}}, "adapter.layers: spectrum chooses by the model's weights"),
        ({"train_modules": ["wte"]}, r"'wte' is not a module of this model, which has embed_tokens \(1\)"),
        ({"train_modules": ["mlp"]}, "model.layers.0.mlp would be trained whole, and .*gate_proj by an adapter"),
        ({"train_modules": ["rotary_emb"]}, "rotary_emb has no weights to train"),
    ],
)
def test_what_matches_nothing_is_an_error_that_says_what_there_is(settings, message):
    with pytest.raises(UserError, match=message):
        select(tiny("llama"), **settings)


def test_a_pattern_that_matches_no_layer_of_a_state_space_model_is_an_error():
    with pytest.raises(UserError, match=r"'attention' matches no linear layer of this model, which has in_proj \(2\)"):
        select(tiny("mamba"), targets="attention")


def test_layers_are_the_blocks_of_these_numbers():
    model = tiny("gpt2")
    assert {path.split(".")[2] for path in select(model, layers="1-1").modules} == {"1"}
    assert select(model, layers=[0, "1-1"]).modules == select(model).modules
    with pytest.raises(UserError, match="they are in 1"):
        select(tiny("jamba"), targets=["q_proj"], layers=[0])


def test_the_last_override_that_matches_wins_and_the_usual_value_is_not_repeated():
    targets = select(
        tiny("llama"),
        rank_overrides={"mlp": 4, r".*\.1\..*": 8, "k_proj": 16},
        alpha_overrides={"q_proj": 32, "layers.0.mlp.up_proj": 7},
    )
    assert targets.alphas == {"model.layers.0.mlp.up_proj": 7}
    assert targets.ranks["model.layers.0.mlp.up_proj"] == 4
    assert targets.ranks["model.layers.1.mlp.up_proj"] == targets.ranks["model.layers.1.self_attn.q_proj"] == 8
    assert not any("k_proj" in path for path in targets.ranks) and len(targets.ranks) == 9


def test_ranks_of_layers_and_of_fused_experts_are_those_of_the_recipe():
    peft = attached(tiny("mixtral"), rank_overrides={"experts": 3, "layers.1.mlp.experts.down_proj": 5, "q_proj": 1})
    ranks = {name: weight.shape[0] for name, weight in peft.named_parameters() if "lora_A" in name}
    kept = {re.sub(r"base_model\.model\.model\.|\.lora_A\.default\.weight", "", name): r for name, r in ranks.items()}
    assert kept["layers.0.self_attn.q_proj"] == 1 and kept["layers.0.self_attn.k_proj"] == 2
    assert sorted(rank for name, rank in kept.items() if "layers.0.mlp" in name) == [12, 12]  # of 4 experts
    assert sorted(rank for name, rank in kept.items() if "layers.1.mlp" in name) == [12, 20]


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "llama4", "deepseek-v3", "jetmoe", "qwen3-next"])
def test_adapters_on_experts_merge_to_the_same_logits_and_plain_peft_loads_them(family, tmp_path):
    model = tiny(family).eval()
    for name, weight in model.named_parameters():
        if weight.ndim == 3 and "conv" not in name:
            torch.nn.init.normal_(weight, std=0.2)  # some families leave it empty
    base = copy.deepcopy(model)
    peft = attached(model, targets="mlp" if family == "mixtral" else "all-linear")
    for name, weight in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    peft.save_pretrained(tmp_path)
    with torch.no_grad():
        trained = peft(input_ids=TOKENS).logits
        assert (trained - base(input_ids=TOKENS).logits).abs().max() > 1e-2
        loaded = PeftModel.from_pretrained(base, tmp_path)(input_ids=TOKENS).logits
        merged = peft.merge_and_unload()(input_ids=TOKENS).logits
    torch.testing.assert_close(loaded, trained)
    torch.testing.assert_close(merged, trained, atol=1e-5, rtol=1e-4)


def test_layers_whose_names_peft_takes_for_experts_are_adapted_as_parameters():
    targets = select(tiny("deepseek-v3"), targets="mlp")
    assert "model.layers.0.mlp.gate_proj.weight" in targets.experts
    assert "model.layers.1.mlp.shared_experts.down_proj.weight" in targets.experts and not targets.modules
    without = select(tiny("deepseek-v3"), kind="dora", exclude=["experts"])
    assert not any("gate_proj" in path for path in paths(without))
    assert any("model.layers.0.mlp.gate_proj and 5 more" in note for note in without.notes)
    with pytest.raises(UserError, match="gate_proj cannot get an adapter: PEFT takes its name"):
        select(tiny("deepseek-v3"), kind="dora", targets=["gate_proj"])


def test_a_quantized_layer_whose_name_peft_takes_for_experts_is_left_out():
    model = tiny("deepseek-v3")
    model.model.layers[0].mlp.up_proj = Linear4bit(16, 24, bias=False).to("cpu")
    targets = select(model)
    assert "model.layers.0.mlp.up_proj" not in " ".join(paths(targets))
    assert targets.notes[0].startswith("adapter.targets: all-linear leaves out model.layers.0.mlp.up_proj: PEFT takes")


@pytest.mark.parametrize("family", ["mixtral", "jetmoe"])
def test_a_kind_that_cannot_adapt_experts_says_what_to_exclude(family):
    with pytest.raises(UserError, match=r"adapter\.kind dora cannot adapt; lora, rslora, none can") as caught:
        select(tiny(family), kind="dora")
    remedy = re.search(r"adapter\.exclude: \[(.*)\]", str(caught.value))[1].split(", ")
    assert not select(tiny(family), kind="dora", exclude=remedy).experts


def test_dropout_is_refused_where_peft_cannot_apply_it():
    with pytest.raises(UserError, match=r"adapter.dropout: 0.1 .* Write dropout: 0, or adapter.exclude: \[experts\]"):
        select(tiny("mixtral"), dropout=0.1)
    with pytest.raises(UserError, match=r"adapter.dropout: 0.1 .* Write dropout: 0\."):
        select(tiny("deepseek-v3"), dropout=0.1)
    assert select(tiny("mixtral"), dropout=0.1, exclude=["experts"]).modules


def test_vision_towers_are_left_out_of_the_words_but_not_of_names():
    model = tiny("gemma3")
    targets = select(model)
    assert all(path.startswith("model.language_model.") for path in targets.modules)
    assert "not part of the language model" in targets.notes[0]
    assert select(model, exclude=["vision_tower"]).modules == targets.modules
    assert select(model, targets=r"model\.vision_tower\.encoder\..*", layers=[1]).modules


def test_layers_that_an_adapter_cannot_change_are_refused_by_hand_and_trained_in_full_fine_tuning():
    model = tiny("mamba")
    with pytest.raises(UserError, match="dt_proj cannot get an adapter: the model reads its weight"):
        select(model, targets=["dt_proj", "in_proj"])
    assert len(select(model, targets=["dt_proj", "in_proj"], exclude=["dt_proj"]).modules) == 2
    assert len(select(model, kind="none").modules) == 8


def test_the_output_head_gets_no_adapter_and_is_trained_whole_instead():
    with pytest.raises(UserError, match=r"it is the output head.*Write adapter.train_modules: \[lm_head\] instead"):
        select(tiny("llama"), targets=["lm_head"])
    assert select(tiny("llama"), kind="none", targets=["lm_head"]).modules == ["lm_head"]
    assert select(tiny("llama"), exclude=["lm_head"]).modules == select(tiny("llama")).modules
    with pytest.raises(UserError, match="lm_head cannot get an adapter: it is one weight with the embeddings"):
        select(tiny("llama", tie_word_embeddings=True), targets=["lm_head"])


def test_modules_trained_whole_are_named_in_full():
    targets = select(tiny("llama"), train_modules=["lm_head", "norm"])
    assert (targets.whole, targets.tied) == (["lm_head", "model.norm"], False)


def test_modules_that_cannot_be_trained_whole_are_refused():
    model = tiny("llama")
    model.model.norm.weight = torch.nn.Parameter(torch.ones(16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UserError, match=r"model\.norm is quantized"):
        select(model, train_modules=["norm"])
    model.model.old_lm_head = torch.nn.Linear(16, 64)
    with pytest.raises(UserError, match=r"PEFT cannot tell model\.old_lm_head from lm_head"):
        select(model, targets="mlp", train_modules=["lm_head"])


@pytest.mark.parametrize(
    ("family", "name", "ends"),
    [("llama", "lm_head", ["model.embed_tokens", "lm_head"]), ("gpt2", "wte", ["transformer.wte", "lm_head"])],
)
def test_tied_embeddings_are_trained_as_one(family, name, ends):
    targets = select(tiny(family, tie_word_embeddings=True), train_modules=[name])
    assert (targets.whole, targets.tied) == (ends, True)
    assert "are one weight in this model" in targets.notes[-1]
    peft = attached(tiny(family, tie_word_embeddings=True), train_modules=[name])
    base = peft.get_base_model()
    trained = base.get_input_embeddings().modules_to_save["default"].weight
    assert base.get_output_embeddings().modules_to_save["default"].weight is trained and trained.requires_grad


def test_spectrum_takes_the_top_share_of_each_type():
    model = tiny("llama")
    asked = []

    def signal(chosen):
        asked.extend(chosen)
        return {path: float(".0." in path) if "mlp" in path else float(".1." in path) for path in chosen}

    chosen = select(model, signal=signal, layers={"spectrum": 0.5}, exclude=["up_proj"]).modules
    assert len(asked) == 12 and len(chosen) == 6
    assert all((".0." in path) == ("mlp" in path) for path in chosen)


def test_the_loudest_are_one_of_each_type_at_least():
    ratios = {f"layers.{i}.{name}": float(i) for i in range(5) for name in ("a", "b")}
    assert top_by_snr(ratios, 0.4) == {"layers.3.a", "layers.4.a", "layers.3.b", "layers.4.b"}
    assert top_by_snr(ratios, 0.01) == {"layers.4.a", "layers.4.b"}


def test_a_range_far_beyond_the_model_is_refused_at_once():
    with pytest.raises(UserError, match="99999999999 is not a layer of the model: this model has layers 0 to"):
        select(tiny("llama"), layers="0-99999999999")
