"""Promises of folding and writing: in every family, the merged files hold what PEFT's own merge computes."""

import copy
import json
import shutil

import pytest
import torch
from conftest import some_of
from model_families import FAMILIES
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorakit.merge.apply_delta import adapter_deltas
from lorakit.merge.writer import weights_to_write, write_weights
from lorakit.model.base_files import SINGLE, list_tensors
from lorakit.model.config_values import untied_config
from lorakit.model.layerwise import layerwise_model
from lorakit.model.load import dequantize, load_model
from lorakit.model.peft_adapter import attach_adapter, save_adapter
from lorakit.model.resolve import Base
from lorakit.model.safetensors_io import read_tensor
from lorakit.model.state_dict import open_weights, stored_precision, training_precision
from lorakit.model.targets import select_targets
from lorakit.progress import Silent
from lorakit.recipe.schema import Adapter, Model

# Unit roundoff, and the smallest step near zero.
ROUNDING = {"F32": (0, 0), "BF16": (2**-8, 0), "F16": (2**-11, 2**-25)}


def write_base(config, folder, dtype=torch.float32, **options):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder, **options)
    return folder


def write_llama(folder, tied=False, dtype=torch.float32):
    config = copy.deepcopy(FAMILIES["llama"].config)
    config.tie_word_embeddings = tied
    return write_base(config, folder, dtype)


def in_float32(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    return model, info["unexpected_keys"]


def write_adapter(base, folder, **settings):
    """An adapter on the base with random numbers in all of its parts."""
    model, _ = in_float32(base)
    chosen = Adapter(**{"rank": 3, "alpha": 6, **settings})
    targets = select_targets(model, chosen)
    attached = attach_adapter(model, chosen, 0, targets)
    for parameter in attached.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.2
    folder.mkdir()
    save_adapter(attached, folder)
    return folder


def fold(base, adapter, output, settings=None, dtype=None):
    """The merged files of an adapter on the weights as they lie there, or as `settings` hold them in training."""
    weights = open_weights(base)
    held = training_precision(weights, settings) if settings else stored_precision(Model(base="base"))
    deltas = adapter_deltas(
        layerwise_model(base, "eager", lambda path: held(path, weights.read(path)), adapter=adapter)
    )
    output.mkdir()
    target = weights_to_write(weights, deltas)
    types = write_weights(target, held, deltas, dtype, output, Silent())
    config = json.loads((base / "config.json").read_text())
    (output / "config.json").write_text(json.dumps(config if target is weights else untied_config(config)))
    return types


def by_peft(base, adapter):
    return PeftModel.from_pretrained(in_float32(base)[0], adapter).merge_and_unload().state_dict()


def check_merged(base, adapter, output, types=None):
    """The merged files are named and shaped as the base's, typed so too or as `types` say, and hold PEFT's merge."""
    merged, unexpected = in_float32(output)
    assert unexpected == in_float32(base)[1]
    before, after = list_tensors(base), list_tensors(output)
    assert {name: one.shape for name, one in after.items()} == {name: one.shape for name, one in before.items()}
    assert {one.dtype for one in after.values()} == (types or {one.dtype for one in before.values()})
    found, wanted = merged.state_dict(), by_peft(base, adapter)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        check_rounded_once(
            found[name], value, max((one.dtype for one in after.values()), key=lambda word: ROUNDING[word][0])
        )


def check_rounded_once(found, wanted, word):
    """No number is further away than a single rounding takes it, and the order of float32 additions."""
    share, step = ROUNDING[word]
    slack = share * wanted.abs() + 1e-6 * wanted.abs().max() + step
    assert bool(((found - wanted).abs() <= slack).all())


def embedding_of(folder):
    model = open_weights(folder).model
    return next(name for name, part in model.named_modules() if part is model.get_input_embeddings()).split(".")[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_in_every_family_the_files_hold_what_peft_merges(family, tmp_path):
    base = write_base(FAMILIES[family].config, tmp_path / "base", max_shard_size="20KB")
    adapter = write_adapter(base, tmp_path / "adapter", train_modules=[embedding_of(base)])
    assert fold(base, adapter, tmp_path / "merged") == ["F32"]
    check_merged(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"kind": "rslora", "alpha": 7}),
        ("llama", {"kind": "dora"}),
        ("llama", {"rank_overrides": {"q_proj": 5}, "alpha_overrides": {"layers.1": 9}}),
        ("llama", {"kind": "rslora", "rank_overrides": {"down_proj": 1}, "train_modules": ["norm"]}),
        ("gpt2", {"kind": "rslora", "alpha": 7}),
        ("gpt2", {"kind": "dora"}),
        ("mixtral", {"kind": "rslora", "alpha": 7}),
        ("mixtral", {"rank_overrides": {"experts": 2}, "alpha_overrides": {"experts": 5}}),
        ("mixtral", {"kind": "dora", "exclude": ["experts"]}),
        ("gpt-oss", {"kind": "rslora", "alpha": 7}),
        ("mamba", {"kind": "dora"}),
        ("phi3", {"kind": "dora"}),
        ("falcon-h1", {"kind": "dora", "train_modules": ["lm_head"]}),
    ],
)
def test_every_way_to_adapt_is_folded_as_peft_merges_it(family, settings, tmp_path):
    base = write_base(FAMILIES[family].config, tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter", **settings)
    fold(base, adapter, tmp_path / "merged")
    check_merged(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "mamba"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_keeps_its_type_and_is_rounded_once(family, dtype, tmp_path):
    base = write_base(FAMILIES[family].config, tmp_path / "base", dtype, max_shard_size="10KB")
    adapter = write_adapter(base, tmp_path / "adapter", train_modules=[embedding_of(base)])
    fold(base, adapter, tmp_path / "merged")
    check_merged(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize(("dtype", "word"), [(torch.float32, "F32"), (torch.bfloat16, "BF16"), (torch.float16, "F16")])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_type_that_is_asked_for_is_written_everywhere(family, dtype, word, tmp_path):
    base = write_base(FAMILIES[family].config, tmp_path / "base", torch.bfloat16)
    adapter = write_adapter(base, tmp_path / "adapter")
    assert fold(base, adapter, tmp_path / "merged", dtype=dtype) == [word]
    check_merged(base, adapter, tmp_path / "merged", types={word})


@pytest.mark.parametrize(
    ("family", "quantization", "stored", "trained"),
    some_of(
        [
            (family, quantization, *types)
            for quantization in ("none", "q8", "q4", "nf4")
            for family in ("llama", "gpt2", "mixtral", "gpt-oss", "deepseek-v3")
            for types in ((torch.float32, "bfloat16"), (torch.bfloat16, "float32"))
        ],
        every=3,
    ),
)
def test_weights_are_held_as_the_training_held_them(family, stored, trained, quantization, tmp_path):
    base = write_base(FAMILIES[family].config, tmp_path, stored)
    settings = Model(base="base", dtype=trained, quantization=quantization, attention="eager")
    model = load_model(Base("base", base, ""), settings, "cpu")
    if quantization != "none":
        model = dequantize(model)
    weights = open_weights(base)
    held = training_precision(weights, settings)
    for path, value in model.state_dict().items():
        found = held(path, weights.read(path))
        if quantization == "q8" and trained == "bfloat16":  # its scales are float32, and bitsandbytes rounds after them
            check_rounded_once(value.float(), found, "BF16")
        else:
            assert torch.equal(found, value.float()), path


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_an_adapter_of_half_precision_training_is_added_to_what_that_saw(quantization, tmp_path):
    base = write_llama(tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter")
    settings = Model(base="base", dtype="bfloat16", quantization=quantization, attention="eager")
    fold(base, adapter, tmp_path / "merged", settings)
    model = load_model(Base("base", base, ""), settings, "cpu")
    plain = (dequantize(model) if quantization != "none" else model).float()
    wanted = PeftModel.from_pretrained(plain, adapter).merge_and_unload().state_dict()
    found = in_float32(tmp_path / "merged")[0].state_dict()
    for name, value in wanted.items():
        check_rounded_once(found[name], value, "F32")
    embeddings = in_float32(base)[0].get_input_embeddings().weight
    assert torch.equal(found["model.embed_tokens.weight"], embeddings.bfloat16().float())


# Checkpoints as others write them.


def rewrite(base, change):
    """Another program's file of the same weights: `change` makes its tensors from those by their paths in the model."""
    tensors = change({name: value.clone() for name, value in in_float32(base)[0].state_dict().items()})
    save_file(tensors, base / SINGLE, metadata={"format": "pt"})
    return base


def test_fused_experts_and_one_tensor_for_each_expert_give_the_same_merge(tmp_path):
    apart = write_base(FAMILIES["mixtral"].config, tmp_path / "apart")
    assert any("experts.0.w1" in name for name in list_tensors(apart))
    fused = rewrite(shutil.copytree(apart, tmp_path / "fused"), lambda tensors: tensors)
    assert not any("experts.0" in name for name in list_tensors(fused))
    adapter = write_adapter(apart, tmp_path / "adapter")
    for base in (apart, fused):
        fold(base, adapter, tmp_path / f"merged-{base.name}")
        check_merged(base, adapter, tmp_path / f"merged-{base.name}")
    one, other = (in_float32(tmp_path / f"merged-{name}")[0].state_dict() for name in ("apart", "fused"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "bloom"])
def test_files_of_the_body_alone_lack_its_prefix_and_keep_their_names(family, tmp_path):
    base = write_base(FAMILIES[family].config, tmp_path / "base")
    prefix = open_weights(base).model.base_model_prefix + "."
    rewrite(base, lambda tensors: {n.removeprefix(prefix): v for n, v in tensors.items() if n != "lm_head.weight"})
    adapter = write_adapter(base, tmp_path / "adapter", train_modules=[embedding_of(base)])
    fold(base, adapter, tmp_path / "merged")
    check_merged(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize("trained", [[], ["embed_tokens"], ["lm_head"]])
def test_a_head_stored_beside_tied_embeddings_stays_equal_to_them(trained, tmp_path):
    base = rewrite(write_llama(tmp_path / "base", tied=True), lambda tensors: tensors)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= list_tensors(base).keys()
    adapter = write_adapter(base, tmp_path / "adapter", train_modules=trained)
    fold(base, adapter, tmp_path / "merged")
    check_merged(base, adapter, tmp_path / "merged")
    written = load_file(tmp_path / "merged" / SINGLE)
    assert torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])


def test_tensors_that_the_model_has_no_place_for_are_taken_over_to_the_bit(tmp_path):
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.randn(2),
        "mtp.proj.weight": torch.randn(3, 5).to(torch.float16),
        "step": torch.tensor(7),
        "mask": torch.ones(2, 2, dtype=torch.bool),
        "nothing": torch.empty(0, 4),
    }
    base = rewrite(write_llama(tmp_path / "base"), lambda tensors: tensors | extra)
    adapter = write_adapter(base, tmp_path / "adapter")
    assert fold(base, adapter, tmp_path / "merged") == ["F32"]
    written = load_file(tmp_path / "merged" / SINGLE)
    for name, value in extra.items():
        assert written[name].dtype == value.dtype and torch.equal(written[name], value)


def test_each_weight_of_a_base_in_several_types_keeps_its_own(tmp_path):
    base = rewrite(
        write_llama(tmp_path / "base"),
        lambda tensors: {n: v if "norm" in n else v.to(torch.bfloat16) for n, v in tensors.items()},
    )
    adapter = write_adapter(base, tmp_path / "adapter", train_modules=["norm"])
    assert fold(base, adapter, tmp_path / "merged") == ["BF16", "F32"]
    before, after = list_tensors(base), list_tensors(tmp_path / "merged")
    assert {name: one.dtype for name, one in after.items()} == {name: one.dtype for name, one in before.items()}
    wanted = by_peft(base, adapter)
    for name, one in after.items():
        check_rounded_once(read_tensor(one, torch.float32), wanted[name], one.dtype)
