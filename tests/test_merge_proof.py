"""Promises of the proof: it finds what differs, also where a model is not a number, and says which model is better."""

import copy
import math

import pytest
import torch
from model_families import FAMILIES
from test_layerwise import ADAPTERS, adapter_of, source_of
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM

from lorakit.data.batches import collate
from lorakit.errors import UserError
from lorakit.merge import proof
from lorakit.merge.proof import TOLERANCES, Proof, compare, compute_reference
from lorakit.model.layerwise import layerwise_model
from lorakit.model.peft_adapter import load_adapter
from lorakit.progress import Silent

TIE = TOLERANCES["float32"].tie


def tiny(seed=0, family="llama"):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family].config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def nudged(model, size):
    other = copy.deepcopy(model)
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * size)
    return other


def row(length, trained, seed=0):
    """A row whose last tokens are trained."""
    ids = torch.randint(3, 60, (length,), generator=torch.Generator().manual_seed(100 * seed + length)).tolist()
    return {"input_ids": ids, "labels": [-100] * (length - trained) + ids[length - trained :]}


ROWS = [row(5, 1), row(30, 12), row(9, 9), row(17, 2), row(6, 5)]


def proved(expected, merged, rows=ROWS):
    return compare([compute_reference(expected, rows, 0, Silent())], merged, 0, TIE, Silent())[0]


def one_by_one(expected, merged, rows):
    """Logits of both models and the targets, row after row, without batches."""
    found = []
    for each in rows:
        batch = collate([each], 0)
        targets = batch.pop("labels")[0, 1:]
        with torch.no_grad():
            both = [model(**batch).logits[0, :-1][targets != -100] for model in (expected, merged)]
        found.append((*both, targets[targets != -100]))
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3-moe", "mamba"])
@pytest.mark.parametrize("small", [False, True], ids=["one batch", "many batches and pieces"])
def test_every_figure_is_what_it_is_row_by_row(family, small, monkeypatch):
    if small:
        monkeypatch.setattr(proof, "_STATES", 300)
        monkeypatch.setattr(proof, "_HEAD_LOGITS", 0)
        monkeypatch.setattr(proof, "_HEAD_POSITIONS", 4)
        monkeypatch.setattr(proof, "_COMPARED_LOGITS", 130)
    expected = tiny(family=family)
    merged = nudged(expected, 0.01)
    made = proved(expected, merged)
    rows = one_by_one(expected, merged, ROWS)
    wanted, found, targets = (torch.cat([each[at] for each in rows]) for at in range(3))
    assert (made.rows, made.positions) == (len(ROWS), len(targets)) == (5, 28)
    near = {"rel": 1e-4, "abs": 1e-6}
    assert made.max_logit_difference == pytest.approx(float((wanted - found).abs().max()), **near)
    assert made.logit_scale == pytest.approx(float(wanted.abs().max()), **near)
    kl = kl_div(found.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True)
    assert made.mean_kl == pytest.approx(float(kl), rel=1e-3, abs=1e-6)
    assert made.mean_kl > 1e-6
    assert made.top1_agreement == pytest.approx(float((wanted.argmax(1) == found.argmax(1)).double().mean()))
    assert made.adapter_loss == pytest.approx(float(cross_entropy(wanted, targets)), **near)
    assert made.merged_loss == pytest.approx(float(cross_entropy(found, targets)), **near)
    assert made.row_positions == tuple(len(each[2]) for each in rows)
    assert made.row_adapter_losses == pytest.approx([float(cross_entropy(each[0], each[2])) for each in rows], **near)
    assert made.row_merged_losses == pytest.approx([float(cross_entropy(each[1], each[2])) for each in rows], **near)


@pytest.mark.parametrize("rows", [ROWS[:1], [row(3, 3)], [row(8, 0), row(8, 1)]])
def test_one_row_or_one_position_is_enough(rows):
    model = tiny()
    made = proved(model, model, rows)
    assert made.failures(TOLERANCES["float32"]) == []
    assert made.rows == 1
    assert made.better() == "cannot tell"
    assert made.max_logit_difference == 0
    assert proved(model, nudged(model, 0.1), rows).failures(TOLERANCES["float32"])


def test_rows_that_train_nothing_are_one_clear_error():
    for rows in ([], [row(4, 0)], [{"input_ids": [5, 6], "labels": [5, -100]}]):
        with pytest.raises(UserError, match="no row trains a token"):
            compute_reference(tiny(), rows, 0, Silent())


def test_no_more_logits_are_kept_than_allowed(monkeypatch):
    monkeypatch.setattr(proof, "_SAVED_POSITIONS", 16)
    monkeypatch.setattr(proof, "_SAVED_LOGITS", 0)
    kept = compute_reference(tiny(), ROWS, 0, Silent())
    assert [len(each["labels"]) for each in kept.rows] == [5, 30]
    assert kept.logits.shape == (13, 64)
    whole = row(40, 39)
    cut = compute_reference(tiny(), [whole, *ROWS], 0, Silent())
    assert cut.logits.shape == (16, 64)
    assert [each["input_ids"] for each in cut.rows] == [whole["input_ids"][: 1 + 16]]


def test_batches_are_few_sorted_by_length_and_bounded(monkeypatch):
    config = FAMILIES["llama"].config
    lengths = [3, 100, 5, 90, 4, 20]
    assert proof._split_rows(lengths, config) == [[1, 3, 5, 2, 4, 0]]
    monkeypatch.setattr(proof, "_STATES", 200 * config.hidden_size)
    assert proof._split_rows(lengths, config) == [[1, 3], [5, 2, 4, 0]]
    monkeypatch.setattr(proof, "_STATES", 0)
    assert proof._split_rows(lengths, config) == [[1], [3], [5], [2], [4], [0]], "a long row goes alone"
    eager = copy.deepcopy(config)
    eager._attn_implementation = "eager"
    monkeypatch.setattr(proof, "_STATES", 1 << 22)
    monkeypatch.setattr(proof, "_SCORES", 4 * 4 * 20**2)
    assert proof._split_rows(lengths, eager) == [[1], [3], [5, 2, 4, 0]]


@pytest.mark.parametrize("whose", ["the merged", "the adapter", "both"])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_a_number_fails(whose, dtype, value):
    good = tiny()
    bad = copy.deepcopy(good)
    bad.lm_head.weight.data[7] = value  # one token's logit; the others are sound
    expected, merged = (bad if whose in (name, "both") else good for name in ("the adapter", "the merged"))
    (failure,) = proved(expected, merged).failures(TOLERANCES[dtype])
    assert failure.startswith("the merged" if whose == "the merged" else "the adapter")


def test_one_pass_over_the_merged_model_serves_several_references():
    adapter, merged = tiny(), nudged(tiny(), 0.001)
    trained = nudged(adapter, 0.05)
    calls = []
    merged.model.embed_tokens.register_forward_hook(lambda *_: calls.append(1))
    both = [compute_reference(model, ROWS, 0, Silent()) for model in (adapter, trained)]
    found = compare(both, merged, 0, TIE, Silent())
    assert len(calls) == 1
    assert found == [compare([one], merged, 0, TIE, Silent())[0] for one in both]
    assert found[0].mean_kl < found[1].mean_kl
    assert found[0].merged_loss == found[1].merged_loss
    assert found[0].adapter_loss != found[1].adapter_loss


def proof_of(adapter, merged, positions=None):
    count = len(adapter)
    return Proof(
        *(count, count, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0),
        row_positions=tuple(positions or [1] * count),
        row_adapter_losses=tuple(adapter),
        row_merged_losses=tuple(merged),
    )


@pytest.mark.parametrize(
    ("adapter", "merged", "answer"),
    [
        ([1.0, 2.0, 3.0, 4.0], [1.1, 2.12, 3.09, 4.1], "adapter"),
        ([1.1, 2.12, 3.09, 4.1], [1.0, 2.0, 3.0, 4.0], "merged"),
        ([1.0, 2.0, 3.0, 4.0], [1.5, 1.6, 3.4, 3.7], "cannot tell"),
        ([1.0, 2.0], [1.1, 2.2], "cannot tell"),
        ([1.0, 2.0], [1.0, 2.0], "cannot tell"),
        ([1.0], [9.0], "cannot tell"),
        ([1.0, 2.0, 3.0], [1.1, math.nan, 3.1], "cannot tell"),
    ],
)
def test_which_is_better_is_said_only_where_the_rows_tell(adapter, merged, answer):
    assert proof_of(adapter, merged).better() == answer


def test_the_interval_is_student_s_where_rows_are_of_one_length():
    difference, low, high = proof_of([1.0, 1.0, 1.0], [1.1, 1.2, 1.6]).loss_difference()
    assert difference == pytest.approx(0.3)
    half = 4.302653 * (0.07 / 3) ** 0.5  # the variance of 0.1, 0.2 and 0.6 is 0.07
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half))


def test_the_difference_is_that_of_the_two_losses():
    made = proved(tiny(), nudged(tiny(), 0.05))
    assert made.loss_difference()[0] == pytest.approx(made.merged_loss - made.adapter_loss)


def test_the_interval_holds_what_it_promises():
    """Of many draws of rows of unequal lengths, about 95 in 100 intervals hold the true difference."""
    generator = torch.Generator().manual_seed(1)
    held = 0
    for _ in range(400):
        positions = torch.randint(5, 60, (12,), generator=generator)
        apart = 0.1 + torch.randn(12, generator=generator) * 0.3
        _, low, high = proof_of([0.0] * 12, apart.tolist(), positions.tolist()).loss_difference()
        held += low <= 0.1 <= high
    assert 0.9 <= held / 400 <= 0.99


@pytest.mark.parametrize("name", ["rslora", "dora", "experts", "tied embeddings whole"])
def test_streamed_models_are_proved_as_those_in_memory(name, tmp_path):
    config, settings = ADAPTERS[name]
    base = adapter_of(tmp_path, config, **settings)
    source = source_of(copy.deepcopy(base))
    adapter = load_adapter(copy.deepcopy(base), tmp_path / "adapter")
    merged = load_adapter(base, tmp_path / "adapter").merge_and_unload()
    streamed = layerwise_model(tmp_path / "base", "eager", source, adapter=tmp_path / "adapter")
    folded = source_of(merged)
    made = proved(streamed, layerwise_model(tmp_path / "base", "eager", folded))
    assert made.failures(TOLERANCES["float32"]) == []
    assert made.positions == 28
    plain = proved(adapter, merged)
    assert made.adapter_loss == pytest.approx(plain.adapter_loss, rel=1e-5)
    assert made.merged_loss == pytest.approx(plain.merged_loss, rel=1e-5)
    assert all(folded.asked.count(path) <= 2 for path in folded.asked), "all rows in one forward"
    assert proved(streamed, layerwise_model(tmp_path / "base", "eager", source)).failures(TOLERANCES["bfloat16"])
