"""The supervised-only loss equals the model's own, for every family's body and head."""

import model_families
import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

import lorakit.model.loss as loss_module
from lorakit.data.batches import collate
from lorakit.model.fused_lora import fused_lora
from lorakit.model.loss import body_of, body_output, supervised_loss

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "Llama": GROUPED,
    "Mistral": {**GROUPED, "sliding_window": 8},
    "Qwen2": GROUPED,
    "Qwen3": {**GROUPED, "head_dim": 8},
    "Gemma2": {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
    "Phi3": GROUPED,
    "Cohere": {**GROUPED, "logit_scale": 0.2},
    "Granite": {**GROUPED, "logits_scaling": 3.0},
    "Mixtral": {**GROUPED, "num_local_experts": 2},
    "GPT2": GPT2,
    "GPTNeoX": SIZES,
    "OPT": {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "Falcon": SIZES,
    "Bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Mamba": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
}


def tiny(family: str, **sizes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family] | sizes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def batch(shared: int, times: int = 1) -> dict[str, torch.Tensor]:
    """Three rows of different lengths, or several times as many, whose first `shared` tokens are the same; some later
    ones are trained."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in (22, 18, 21) * times:
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
        ids[:shared] = torch.arange(3, 3 + shared)
        labels = ids.clone()
        labels[: shared + 1] = -100
        labels[16:17] = -100
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return collate(rows, pad_token_id=0)


def gradients(model) -> list[torch.Tensor]:
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return found


@pytest.mark.parametrize("head", ["trained", "frozen"])
@pytest.mark.parametrize("chunk", [1 << 25, 3 * VOCABULARY], ids=["whole", "chunked"])
@pytest.mark.parametrize("shared", [2, 14], ids=["apart", "shared-beginning"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_models_own(family, shared, chunk, head, monkeypatch):
    monkeypatch.setattr(loss_module, "_CHUNK_LOGITS", chunk)
    model, rows = tiny(family), batch(shared)
    if head == "frozen":
        for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            weight.requires_grad_(False)
    total, count = supervised_loss(model, **rows)
    total.backward()
    ours = gradients(model)
    logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits[:, :-1]
    own = cross_entropy(logits.flatten(0, 1), rows["labels"][:, 1:].flatten(), reduction="sum")
    own.backward()
    assert count == int((rows["labels"][:, 1:] != -100).sum())
    assert float(total) == pytest.approx(float(own), rel=1e-5)
    for mine, theirs in zip(ours, gradients(model), strict=True):
        assert torch.allclose(mine, theirs, atol=2e-5)


@pytest.mark.parametrize("family", model_families.FAMILIES)
def test_right_padded_rows_have_the_same_states_without_a_mask(family):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(model_families.FAMILIES[family].config).eval()
    rows = [torch.randint(3, 60, (length,)).tolist() for length in (30, 13, 3)]
    padded = collate([{"input_ids": row, "labels": row} for row in rows], pad_token_id=0)
    mask = padded["attention_mask"].bool()
    with torch.no_grad():
        found, _ = body_output(model, **padded)
        masked = body_of(model)(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"], use_cache=False)
    torch.testing.assert_close(found.last_hidden_state[mask], masked.last_hidden_state[mask], atol=1e-5, rtol=1e-5)


def test_the_body_gets_no_mask_of_padded_rows():
    model, seen = tiny("Llama"), []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def watched(*arguments, attn_mask=None, **named):
        seen.append(attn_mask)
        return sdpa(*arguments, attn_mask=attn_mask, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
        supervised_loss(model, **batch(2))
    assert seen == [None, None]


def test_a_shared_beginning_is_computed_once_and_only_where_that_is_exact():
    rows = batch(14)
    left_out = {family: body_output(tiny(family), **rows)[1] for family in ("Llama", "Mistral", "Mamba")}
    assert left_out == {"Llama": 14, "Mistral": 0, "Mamba": 0}  # a sliding window and a state are no plain cache
    assert body_output(tiny("Llama"), **batch(2))[1] == 0
    single = {name: tensor[:1] for name, tensor in rows.items()}
    assert body_output(tiny("Llama"), **single)[1] == 0


@pytest.mark.parametrize("word", ["nf4", "q8"])
def test_a_beginning_that_quantized_rows_share_is_computed_once_where_it_saves_enough(word, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.manual_seed(0)
    options = {"load_in_8bit": True} if word == "q8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    tiny("Llama").save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(**options, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, dtype=torch.float32).train()
    rows, many = batch(14), batch(14, times=4)
    assert body_output(model, **rows)[1] == 0
    assert body_output(model, **many)[1] == 14
    apart, count = supervised_loss(model, **{name: tensor[:1] for name, tensor in many.items()})
    for row in range(1, 12):
        one, tokens = supervised_loss(model, **{name: tensor[row : row + 1] for name, tensor in many.items()})
        apart, count = apart + one, count + tokens
    total, together = supervised_loss(model, **many)
    assert together == count
    assert float(total.detach()) == pytest.approx(float(apart.detach()), rel=1e-5)


def test_the_state_that_predicts_the_first_trained_token_is_not_shared_away():
    rows = batch(14)
    rows["labels"][:, 13] = rows["input_ids"][:, 13]  # trained, and predicted by the state at 12
    model = tiny("Llama")
    assert body_output(model, **rows)[1] == 12
    own = model(**rows).loss * (rows["labels"][:, 1:] != -100).sum()
    assert float(supervised_loss(model, **rows)[0]) == pytest.approx(float(own), rel=1e-5)


def test_a_batch_without_trained_tokens_gives_a_zero_that_has_gradients():
    rows = batch(2)
    rows["labels"][:] = -100
    model = tiny("Llama")
    total, count = supervised_loss(model, **rows)
    total.backward()
    assert (float(total), count) == (0.0, 0)


@pytest.mark.parametrize("rslora", [False, True])
def test_fused_lora_equals_peft_forward_and_backward(rslora):
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=7, target_modules=targets, use_rslora=rslora, init_lora_weights=False)
    model = get_peft_model(tiny("Llama"), config)
    rows = batch(2)
    plain, _ = supervised_loss(model, **rows)
    plain.backward()
    theirs = gradients(model)
    with fused_lora(model):
        fused, _ = supervised_loss(model, **rows)
        fused.backward()
        with model.disable_adapter():
            disabled, _ = supervised_loss(model, **rows)
    assert float(fused) == pytest.approx(float(plain), rel=1e-6)
    for mine, own in zip(gradients(model), theirs, strict=True):
        assert torch.allclose(mine, own, atol=1e-5)
    with model.disable_adapter():
        assert float(disabled) == float(supervised_loss(model, **rows)[0])
    assert float(supervised_loss(model, **rows)[0]) == float(plain), "PEFT's own forward is back"
