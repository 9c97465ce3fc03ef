"""Packed rows are blind to each other: every example has the loss and the logits that it has alone."""

import json

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from runs_of_tests import run_recipe

from lorakit.data.batches import collate, collate_packed, first_fit_decreasing
from lorakit.model.loss import losses_agree, supervised_loss

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


def rows(*lengths: int) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for length in lengths:
        ids = torch.randint(3, 97, (length,), generator=generator).tolist()
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


@pytest.mark.parametrize("settings", [[], ["train.micro_batch=1"], ["model.attention=eager"]])
def test_a_packed_run_is_the_same_run(recipe_file, tmp_path, settings):
    losses = {}
    for packing in ("off", "on"):
        folder = tmp_path / packing
        run_recipe(recipe_file(), folder, f"data.packing={packing}", *settings)
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        losses[packing] = [line.get("loss", line.get("eval_loss")) for line in log]
    assert losses["on"] == pytest.approx(losses["off"], rel=1e-4)
