"""Promises of `lorakit combine`: adapters combined as PEFT combines them, nothing dropped, and hurt is seen."""

import json
import math
from dataclasses import replace

import pytest
import torch
from model_families import FAMILIES
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from runs_of_tests import run_recipe
from safetensors.torch import load_file, save_file
from test_extract import Heard
from transformers import AutoModelForCausalLM

from lorakit.errors import LorakitError, UserError
from lorakit.merge.combine import Combination, check_same_base, score_sources, share_of_gain
from lorakit.merge.combine import combine as combine_into
from lorakit.merge.low_rank import METHODS
from lorakit.model.low_rank import base_path
from lorakit.model.peft_adapter import load_adapter
from lorakit.output_dir import output_draft
from lorakit.prepare import reopen_run
from lorakit.progress import Silent
from lorakit.run_dir import Run

ALL = ["q_proj", "v_proj", "up_proj", "down_proj"]


def combine(adapters, weights, method, base, output, tokenizer=None, **options):
    with output_draft(output) as draft:
        how = Combination(method, weights, **options)
        return combine_into(adapters, how, base, draft, output.name, tokenizer)


def adapter(base, folder, seed, **settings):
    """An adapter with random numbers on a base, as a folder."""
    model = AutoModelForCausalLM.from_pretrained(base)
    given = {"r": 4, "lora_alpha": 6, "target_modules": ALL, "task_type": "CAUSAL_LM", **settings}
    made = get_peft_model(model, LoraConfig(**given))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in made.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    made.save_pretrained(folder)
    return folder


def deltas_of(model, adapter="default"):
    """What an adapter adds to each weight, as PEFT says."""
    return {
        f"{base_path(name)}.{getattr(module, 'parameter_name', 'weight')}": module.get_delta_weight(adapter).detach()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def deltas(base, folder):
    return deltas_of(load_adapter(AutoModelForCausalLM.from_pretrained(base), folder))


def weighted_sum(base, folders, weights):
    total = {}
    for folder, weight in zip(folders, weights, strict=True):
        for name, delta in deltas(base, folder).items():
            total[name] = total.get(name, 0) + weight * delta
    return total


def assert_same(found, wanted, share=1e-5):
    assert found.keys() == wanted.keys()
    for name, delta in wanted.items():
        assert (found[name] - delta).abs().max() <= share * delta.abs().max()


@pytest.fixture
def pair(tiny_base, tmp_path):
    """Two adapters of one shape."""
    return [adapter(tiny_base, tmp_path / name, seed) for seed, name in enumerate("ab")]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_gives_what_peft_s_own_combination_gives(method, pair, tiny_base, tmp_path):
    weights, density = [0.7, -0.4], 1.0 if "seed" in METHODS[method].options else 0.6
    density = density if "density" in METHODS[method].options else None
    combine(pair, weights, method, tiny_base, tmp_path / "out", density=density)
    model = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_base), pair[0])
    model.load_adapter(pair[1], adapter_name="second")
    kind = method.replace("-", "_")
    model.add_weighted_adapter(["default", "second"], weights, "made", combination_type=kind, density=density)
    assert_same(deltas(tiny_base, tmp_path / "out"), deltas_of(model, "made"))


def test_cat_is_the_weighted_sum_whatever_ranks_scales_and_modules(tiny_base, tmp_path):
    folders = [
        adapter(tiny_base, tmp_path / "a", 1, r=2, lora_alpha=7),
        adapter(tiny_base, tmp_path / "b", 2, r=5, use_rslora=True, target_modules=["q_proj", "o_proj"]),
        adapter(
            tiny_base,
            tmp_path / "c",
            3,
            target_modules=r".*\.(k_proj|up_proj)",
            rank_pattern={"up_proj": 3},
            alpha_pattern={"k_proj": 11},
        ),
    ]
    weights = [0.5, -2.0, 0.3]
    result = combine(folders, weights, "cat", tiny_base, tmp_path / "out")
    assert_same(deltas(tiny_base, tmp_path / "out"), weighted_sum(tiny_base, folders, weights))
    assert result["off_sum"] < 1e-6
    assert result["rank"] == 7 and [source["rank"] for source in result["sources"]] == [2, 5, 4]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert not config["use_rslora"]
    assert config["rank_pattern"]["model.layers.0.mlp.up_proj"] == 5
    assert config["rank_pattern"] == config["alpha_pattern"]


def test_a_sum_that_is_not_what_was_written_is_not_kept(pair, tiny_base, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "cat", replace(METHODS["cat"], function=METHODS["linear"].function))
    with pytest.raises(LorakitError, match="off the weighted sum"):
        combine(pair, [0.5, 0.5], "cat", tiny_base, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_svd_is_the_nearest_of_its_rank_and_says_what_it_loses(pair, tiny_base, tmp_path):
    weights = [0.6, 0.8]
    whole = weighted_sum(tiny_base, pair, weights)
    lost, length = 0.0, 0.0
    for delta in whole.values():
        values = torch.linalg.svdvals(delta.double()) ** 2
        lost, length = lost + float(values[3:].sum()), length + float(values.sum())
    result = combine(pair, weights, "svd", tiny_base, tmp_path / "out", rank=3)
    assert result["rank"] == 3
    assert result["off_sum"] == pytest.approx(math.sqrt(lost / length), rel=1e-4)
    again = combine(pair, weights, "svd", tiny_base, tmp_path / "out", rank=8)
    assert again["rank"] == 8 and again["off_sum"] < 1e-6
    assert_same(deltas(tiny_base, tmp_path / "out"), whole)


def test_linear_is_not_the_weighted_sum_and_says_how_far_it_is(pair, tiny_base, tmp_path):
    result = combine(pair, [0.5, 0.5], "linear", tiny_base, tmp_path / "out")
    found, wanted = deltas(tiny_base, tmp_path / "out"), weighted_sum(tiny_base, pair, [0.5, 0.5])
    off = sum(float((found[name] - wanted[name]).norm() ** 2) for name in wanted)
    length = sum(float(delta.norm() ** 2) for delta in wanted.values())
    assert result["off_sum"] == pytest.approx(math.sqrt(off / length), rel=1e-4)
    assert result["off_sum"] > 0.1
    twice = combine([pair[0], pair[0]], [0.5, 0.5], "linear", tiny_base, tmp_path / "out")
    assert twice["off_sum"] == pytest.approx(1, rel=1e-5), "each B meets both A: twice the adapter"


@pytest.mark.parametrize("method", ["linear", "ties", "magnitude-prune"])
def test_scales_of_rslora_count_once(method, tiny_base, tmp_path):
    plain = [adapter(tiny_base, tmp_path / f"p{seed}", seed, lora_alpha=4) for seed in (1, 2)]
    stable = [adapter(tiny_base, tmp_path / f"s{seed}", seed, lora_alpha=2, use_rslora=True) for seed in (1, 2)]
    density = 0.5 if "density" in METHODS[method].options else None
    for folders, out in ((plain, "out-p"), (stable, "out-s")):
        combine(folders, [1.0, 1.0], method, tiny_base, tmp_path / out, density=density)
    assert_same(deltas(tiny_base, tmp_path / "out-s"), deltas(tiny_base, tmp_path / "out-p"))


@pytest.mark.parametrize(
    "family", ["gpt-oss", *(pytest.param(family, marks=pytest.mark.slow) for family in ("mixtral", "qwen2-moe"))]
)
def test_fused_experts_are_combined_as_every_other_weight(family, tmp_path):
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_config(FAMILIES[family].config)
    model.save_pretrained(base)
    experts = [name for name, p in model.named_parameters() if name.endswith(("experts.gate_up_proj", "s.down_proj"))]
    more = {"target_parameters": experts, "target_modules": ["q_proj"]}
    ranks = {name: 3 for name in experts if name.endswith("down_proj")}
    folders = [
        adapter(base, tmp_path / "a", 1, **more),
        adapter(base, tmp_path / "b", 2, r=2, rank_pattern=ranks, **more),
        adapter(base, tmp_path / "c", 3, target_modules=["v_proj"]),
    ]
    weights = [0.5, -0.7, 1.0]
    wanted = weighted_sum(base, folders, weights)
    for method, rank in (("cat", None), ("svd", 9)):
        assert combine(folders, weights, method, base, tmp_path / method, rank=rank)["off_sum"] < 1e-6
        assert_same(deltas(base, tmp_path / method), wanted)
    assert any(delta.ndim == 3 for delta in wanted.values())
    linear = combine([folders[0], folders[0]], [0.25, 0.25], "linear", base, tmp_path / "linear")
    assert linear["off_sum"] == pytest.approx(1, rel=1e-5)
    assert_same(deltas(base, tmp_path / "linear"), deltas(base, folders[0]))
    other = adapter(base, tmp_path / "d", 4, **{**more, "target_parameters": [experts[0]]})
    combine([folders[0], other], [1, 1], "cat", base, tmp_path / "out")
    assert_same(deltas(base, tmp_path / "out"), weighted_sum(base, [folders[0], other], [1, 1]))


@pytest.mark.parametrize("method", ["dare-linear", "dare-ties"])
def test_random_methods_repeat_themselves_by_their_seed(method, pair, tiny_base, tmp_path):
    def made(name, seed):
        torch.rand(3)  # what was drawn before is no matter
        result = combine(pair, [1.0, 1.0], method, tiny_base, tmp_path / name, density=0.5, seed=seed)
        assert json.loads((tmp_path / name / "combine.json").read_text())["seed"] == result["seed"] == (seed or 0)
        return (tmp_path / name / "adapter_model.safetensors").read_bytes()

    state = torch.get_rng_state()
    one = made("one", 3)
    assert one == made("two", 3) != made("three", 4)
    assert made("four", None) == made("five", 0)
    torch.set_rng_state(state)


def test_the_folder_is_a_plain_adapter_that_says_what_it_was_made_of(pair, tiny_base, tmp_path, tokenizer):
    result = combine(pair, [0.5, 0.3], "ties", tiny_base, tmp_path / "out", density=0.5, tokenizer=tokenizer)
    facts = json.loads((tmp_path / "out" / "combine.json").read_text())
    assert facts["method"] == "ties" and facts["density"] == 0.5 and facts["seed"] is None
    assert [source["weight"] for source in facts["sources"]] == [0.5, 0.3]
    assert all(len(sha) == 64 for source in facts["sources"] for sha in source["sha256"].values())
    assert "| 0.3 | 4 |" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert result["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert result["modules"] * 2 == len(tensors)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_base)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": 1, "weights": [1.0]}, "combines two adapters or more"),
        ({"weights": [1.0]}, "--weights: 1 for 2 adapters"),
        ({"weights": [1.0, math.nan]}, "--weights: nan is not a weight"),
        ({"weights": [0.0, 1.0]}, "--weights: 0 is not a weight"),
        ({"method": "mean"}, "there is no mean. Write one of linear, cat"),
        ({"method": "ties"}, "Write --density 0.5"),
        ({"method": "cat", "density": 0.5}, "--density: cat does not use it. .* take one of ties, dare-linear"),
        ({"method": "ties", "density": 0.0}, "expected more than 0 and at most 1, got 0. Write"),
        ({"method": "ties", "density": 1.5}, "at most 1, got 1.5."),
        ({"method": "ties", "density": math.nan}, "at most 1, got nan."),
        ({"method": "ties", "density": 0.5, "seed": 1}, "--seed: ties does not use it"),
        ({"method": "cat", "rank": 4}, "--rank: cat does not use it"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, words):
    given = {"count": 2, "weights": [1.0, 1.0], "method": "cat", **options}
    count = given.pop("count")
    with pytest.raises(UserError, match=words):
        Combination(**given).check(count)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "lora_magnitude_vector.*, which would be lost"),
        ({"modules_to_save": ["embed_tokens"]}, "embed_tokens.*, which would be lost"),
        ({"lora_bias": True}, "lora_B.bias, which would be lost"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.*, which would be lost"),
    ],
)
def test_parts_that_no_method_combines_are_refused_not_dropped(settings, words, pair, tiny_base, tmp_path):
    odd = adapter(tiny_base, tmp_path / "odd", 3, **settings)
    for folders in ([pair[0], odd], [odd, pair[0]]):
        with pytest.raises(UserError, match=words):
            combine(folders, [1.0, 1.0], "cat", tiny_base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", [name for name, entry in METHODS.items() if entry.equal_ranks])
def test_different_ranks_are_refused_with_the_methods_that_take_them(method, pair, tiny_base, tmp_path):
    other = adapter(tiny_base, tmp_path / "other", 3, r=2)
    density = 0.5 if "density" in METHODS[method].options else None
    with pytest.raises(UserError, match=r"has the ranks 4 .* and 2 .*Take cat or svd"):
        combine([pair[0], other], [1.0, 1.0], method, tiny_base, tmp_path / "out", density=density)


def test_damaged_and_foreign_adapters_are_one_clear_error(pair, tiny_base, tmp_path):
    def refused(words):
        with pytest.raises(UserError, match=words):
            combine(pair, [1.0, 1.0], "cat", tiny_base, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    file = pair[1] / "adapter_model.safetensors"
    good, tensors = file.read_bytes(), load_file(file)
    name = min(tensors)
    save_file({**tensors, name: tensors[name] * math.nan}, file)
    refused("not finite, the first in base_model.model.model.layers.0.mlp.down_proj.lora_A.weight")
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    refused("this adapter lacks base_model.model.model.layers.0.mlp.down_proj.lora_A.weight. It is damaged")
    save_file({**tensors, name: tensors[name][:, :5].contiguous()}, file)
    refused("cannot be put on the base model: .*size mismatch for")
    file.write_bytes(good[:100])
    refused("this weights file is damaged: its header")
    file.unlink()
    refused(r"has no adapter_model\.safetensors")
    file.write_bytes(good)
    config = pair[1] / "adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"LOHA"'))
    refused("this adapter lacks .*It is damaged, or of another model")


@pytest.fixture
def runs(recipe_file, tmp_path):
    """Two runs of a base on different rows, the second without held-out rows."""
    folders = [tmp_path / "first", tmp_path / "second"]
    short = ("train.steps=4", "train.epochs=null")
    run_recipe(recipe_file(), folders[0], *short)
    run_recipe(recipe_file(data={"train": "eval.jsonl", "eval": None}, train={"seed": 3}), folders[1], *short)
    return [reopen_run(folder, Silent()) for folder in folders]


def test_every_source_is_scored_before_and_after(runs, tmp_path):
    (first, prepared), (second, _) = runs
    combined = tmp_path / "combined"
    combine([first.adapter, second.adapter], [1.0, 0.5], "cat", prepared.base.folder, combined)
    (score,), without = score_sources(runs, combined, Silent())
    assert without == [str(second.folder)]
    assert score["run"] == str(first.folder) and score["rows"] == 10
    recorded = first.read_manifest()["result"]["eval_loss"]
    assert score["own"] == pytest.approx(recorded, rel=1e-3) and score["own"] < score["base"]
    assert score["combined"] not in (score["own"], score["base"])
    assert score["kept"] == pytest.approx((score["base"] - score["combined"]) / (score["base"] - score["own"]))
    again, _ = score_sources([runs[0], runs[0]], first.adapter, Silent())
    assert [one["own"] for one in again] == [one["combined"] for one in again] == [score["own"]] * 2


def test_a_source_that_gained_nothing_keeps_no_share():
    assert share_of_gain(base=1.0, own=1.5, combined=0.5) is None


def test_runs_are_told_to_belong_together_by_their_manifests(runs, tmp_path):
    def edited(**changes):
        manifest = runs[1][0].read_manifest()
        base = manifest["base"] | changes.pop("base", {})
        (tmp_path / "edited").mkdir(exist_ok=True)
        (tmp_path / "edited" / "manifest.json").write_text(json.dumps({**manifest, **changes, "base": base}))
        (tmp_path / "edited" / "adapter").mkdir(exist_ok=True)
        (tmp_path / "edited" / "adapter" / "adapter_config.json").touch()
        return [runs[0][0], Run(tmp_path / "edited")]

    heard = Heard()
    check_same_base([run for run, _ in runs], heard)
    assert not heard.lines
    check_same_base(edited(base={"quantization": "nf4"}), heard)
    check_same_base(edited(tokenizer_sha256="0"), heard)
    check_same_base(edited(template_variables={"enable_thinking": False}), heard)
    assert "in nf4" in heard.lines[0] and "with the tokenizer and chat template 0, " in heard.lines[1]
    assert "model.template_variables {'enable_thinking': False}" in heard.lines[2]
    with pytest.raises(UserError, match="was trained on other base weights"):
        check_same_base(edited(base={"sha256": {"model.safetensors": "0"}}), heard)
    (tmp_path / "edited" / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="has no adapter to combine"):
        check_same_base([runs[0][0], Run(tmp_path / "edited")], heard)
