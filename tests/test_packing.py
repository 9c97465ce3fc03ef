"""Packed rows are blind to each other: every example has the loss and the logits that it has alone."""

import json

import model_families
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from runs_of_tests import run_recipe

from lorakit.data.batches import collate, collate_packed, first_fit_decreasing
from lorakit.errors import UserError
from lorakit.model.attention import takes_varlen, use_varlen
from lorakit.model.load import load_model
from lorakit.model.loss import full_logits_loss, losses_agree, supervised_loss
from lorakit.model.resolve import Base
from lorakit.recipe.load import load
from lorakit.recipe.schema import Model

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "Llama": SIZES,
    "Mistral": {**SIZES, "sliding_window": 8},
    "Qwen3": {**SIZES, "head_dim": 8},
    "Gemma2": {**SIZES, "head_dim": 8, "query_pre_attn_scalar": 8},
    "Phi3": SIZES,
}
NO_SDPA = ("Gemma2", "sdpa")


def tiny(family: str, attention: str):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def packs_flat(family) -> bool:
    config = family.config
    return takes_varlen(transformers.AutoModelForCausalLM._model_mapping[type(config)], config)


def rows(*lengths: int, vocabulary: int = 97) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for length in lengths:
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return made


@given(st.lists(st.integers(1, 40), max_size=60))
def test_every_row_is_in_one_pack_that_it_fits_and_no_two_packs_could_be_one(lengths):
    packs = first_fit_decreasing(lengths, 40)
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    sums = [sum(lengths[row] for row in pack) for pack in packs]
    assert all(total <= 40 for total in sums)
    assert all(one + other > 40 for index, one in enumerate(sums) for other in sums[:index])


def test_the_longest_rows_come_first_each_into_the_first_pack_with_room():
    assert first_fit_decreasing([3, 7, 5, 5, 2], 10) == [[1, 0], [2, 3], [4]]
    assert first_fit_decreasing([], 10) == []
    with pytest.raises(ValueError, match="11 tokens"):
        first_fit_decreasing([11], 10)


@pytest.mark.parametrize(
    ("family", "attention"),
    [(family, attention) for family in FAMILIES for attention in ("sdpa", "eager") if (family, attention) != NO_SDPA],
)
def test_logits_in_a_pack_are_those_of_each_row_alone(family, attention):
    model = tiny(family, attention)
    packs = [rows(20, 9, 1, 6), rows(17, 12)]
    with torch.no_grad():
        packed = collate_packed(packs, 0)
        found = model(input_ids=packed["input_ids"], position_ids=packed["position_ids"], use_cache=False).logits
        for index, pack in enumerate(packs):
            at = 0
            for row in pack:
                alone = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
                torch.testing.assert_close(found[index, at : at + len(alone)], alone, atol=2e-5, rtol=1e-4)
                at += len(alone)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_each_example_has_the_same_loss_in_a_pack_in_a_batch_and_alone(attention):
    model = tiny("Llama", attention)
    pack = rows(20, 9, 6)
    with torch.no_grad():
        packed = collate_packed([pack], 0)
        labels = packed.pop("labels")
        at, batch = 0, collate(pack, 0)
        for index, row in enumerate(pack):
            only = torch.full_like(labels, -100)
            only[:, at : at + len(row["labels"])] = labels[:, at : at + len(row["labels"])]
            inside, count = supervised_loss(model, attention_mask=None, labels=only, **packed)
            in_batch = torch.full_like(batch["labels"], -100)
            in_batch[index] = batch["labels"][index]
            batched, batch_count = supervised_loss(model, **{**batch, "labels": in_batch})
            alone, alone_count = supervised_loss(model, **collate([row], 0))
            assert count == batch_count == alone_count
            torch.testing.assert_close(inside, alone, atol=1e-4, rtol=1e-5)
            torch.testing.assert_close(batched, alone, atol=1e-4, rtol=1e-5)
            at += len(row["labels"])


@pytest.mark.parametrize("name", [name for name, family in model_families.FAMILIES.items() if packs_flat(family)])
def test_rows_end_to_end_have_the_loss_and_gradients_that_they_have_apart(name):
    torch.manual_seed(0)
    config = model_families.FAMILIES[name].config
    if getattr(config, "sliding_window", None):
        config.sliding_window = 7
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    some = rows(20, 9, 1, 6, vocabulary=60)
    alone = sum(supervised_loss(model, **collate([row], 0))[0] for row in some)
    alone.backward()
    expected = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    use_varlen(model)
    packed, _ = supervised_loss(model, attention_mask=None, **collate_packed([some[:2], some[2:]], 0, flat=True))
    packed.backward()
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-5)
    for key, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(key).grad, gradient, atol=2e-5, rtol=1e-4)
    padded, _ = supervised_loss(model, **collate(some, 0))
    torch.testing.assert_close(padded, alone, atol=1e-4, rtol=1e-5)


def test_an_attention_that_varlen_does_not_compute_is_refused_and_never_left_out():
    pack = collate_packed([rows(9, 6, vocabulary=60)], 0, flat=True)
    for family in ("gemma2", "gpt-oss"):
        model = transformers.AutoModelForCausalLM.from_config(model_families.FAMILIES[family].config)
        use_varlen(model)
        with pytest.raises(UserError, match="varlen does not do what this model asks of attention"):
            supervised_loss(model, attention_mask=None, **pack)
    model = tiny("Llama", "sdpa")
    use_varlen(model)
    with pytest.raises(UserError, match="keys from a cache"):
        model.generate(pack["input_ids"], max_new_tokens=2, do_sample=False)


def test_the_check_before_a_run_sees_varlen_against_the_models_own_attention():
    model = tiny("Mistral", "sdpa")
    batch = collate(rows(20, 9), 0)
    with torch.no_grad():
        expected = full_logits_loss(model, **batch)
        use_varlen(model)
        assert torch.equal(full_logits_loss(model, **batch), expected)
    assert model.config._attn_implementation == "varlen"


def test_a_model_is_loaded_with_sdpa_so_that_a_run_with_varlen_generates(tiny_base):
    settings = Model(base=str(tiny_base), dtype="float32", attention="varlen")
    assert load_model(Base("tiny", tiny_base, "local"), settings, "cpu").config._attn_implementation == "sdpa"


def test_where_the_rows_of_a_flat_pack_begin_is_in_it():
    pack = collate_packed([rows(20, 9), rows(6)], 0, flat=True)
    assert pack["cu_seq_lens_q"].tolist() == pack["cu_seq_lens_k"].tolist() == [0, 20, 29, 35]
    assert pack["max_length_q"] == 20 and pack["input_ids"].shape == (1, 35)


def test_a_model_that_mixes_what_is_packed_is_found_out():
    pack = rows(20, 9)

    def same_in_a_pack(model):
        with torch.no_grad():
            in_a_pack, count = supervised_loss(model, attention_mask=None, **collate_packed([pack], 0))
            return losses_agree(in_a_pack, supervised_loss(model, **collate(pack, 0))[0], count)

    assert same_in_a_pack(tiny("Llama", "sdpa"))
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=8)
    mamba = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert not same_in_a_pack(mamba)


@pytest.mark.parametrize(
    "settings",
    [
        ["model.attention=varlen", "train.gradient_checkpointing=true"],
        ["train.micro_batch=1"],
        ["model.attention=eager"],
    ],
)
def test_a_packed_run_is_the_same_run(recipe_file, tmp_path, settings):
    losses = {}
    for packing in ("off", "on"):
        folder = tmp_path / packing
        run_recipe(recipe_file(), folder, f"data.packing={packing}", *settings)
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        losses[packing] = [line.get("loss", line.get("eval_loss")) for line in log]
    assert losses["on"] == pytest.approx(losses["off"], rel=1e-4)


def test_auto_goes_without_packs_that_leak_and_says_so_while_on_is_refused(monkeypatch, recipe_file, tmp_path):
    monkeypatch.setattr("lorakit.plan.auto.choose_packing", lambda attention: ("on", "a test"))
    monkeypatch.setattr("lorakit.train.preflight.collate_packed", leaking)
    run, _ = run_recipe(recipe_file(), tmp_path / "auto", "model.attention=varlen")
    (choice,) = [choice for choice in run.read_manifest()["auto"] if choice["path"] == "data.packing"]
    assert choice["value"] == "off" and "another loss in one pack" in choice["reason"]
    assert load(run.recipe, []).recipe.data.packing == "off"
    with pytest.raises(UserError, match="does not keep packed rows apart"):
        run_recipe(recipe_file(), tmp_path / "on", "model.attention=varlen", "data.packing=on")


def leaking(packs, pad_token_id, flat=False):
    """A pack whose tokens see others than their own row's."""
    batch = collate_packed(packs, pad_token_id, flat)
    return batch | {"input_ids": batch["input_ids"].flip(1)}
