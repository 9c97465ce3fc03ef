"""Likelihoods of labels are those of a plain loop, and the scores those of the reference libraries."""

import numpy as np
import pytest
import torch
from model_families import FAMILIES
from sklearn.metrics import accuracy_score, brier_score_loss, f1_score, roc_auc_score
from transformers import AutoModelForCausalLM

from lorakit.errors import LorakitError, UserError
from lorakit.evaluate.classification import expected_calibration_error, score_labels
from lorakit.evaluate.forward import label_loglikelihoods, label_paths
from lorakit.evaluate.metric import intervals
from lorakit.evaluate.report import confusion_table
from lorakit.progress import Silent

# One token; several; one a beginning of another; one twice; two that part ways in the middle.
LABELS = [[5], [6, 7, 8], [6, 7], [5], [6, 9, 8], [10, 11]]


def plain_loop(model, prompts, labels):
    """The definition: one sequence at a time, the whole of its logits, no cache."""
    found = np.zeros((len(prompts), len(labels)))
    for row, prompt in enumerate(prompts):
        for column, label in enumerate(labels):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + label]), use_cache=False).logits[0].double()
            logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            found[row, column] = sum(float(logprobs[at, token]) for at, token in enumerate(label))
    return found


def prompts_of(count, vocabulary=64, seed=1):
    generator = np.random.default_rng(seed)
    return [generator.integers(3, vocabulary, generator.integers(1, 30)).tolist() for _ in range(count)]


# Attention, with positions learned, rotary and by slope; soft-capped logits; experts; recurrent layers.
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma2", "mixtral", "mamba", "jamba", "llama4"])
def test_likelihoods_are_those_of_a_plain_loop(family):
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(FAMILIES[family].config).eval()
    prompts = prompts_of(5)
    for labels in (LABELS, [[5], [6], [7]], [[5, 6], [5, 7]]):
        found = label_loglikelihoods(model, prompts, labels, 0, Silent())
        assert np.allclose(found, plain_loop(model, prompts, labels), atol=2e-5), labels


def test_likelihoods_with_an_adapter_are_those_of_the_adapter(tiny_base):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    prompts = prompts_of(4, vocabulary=300)
    plain = label_loglikelihoods(model, prompts, LABELS, 0, Silent())
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    found = label_loglikelihoods(adapted, prompts, LABELS, 0, Silent())
    assert np.allclose(found, plain_loop(adapted, prompts, LABELS), atol=1e-5)
    assert not np.allclose(found, plain, atol=1e-3)
    with adapted.disable_adapter():
        assert np.allclose(label_loglikelihoods(adapted, prompts, LABELS, 0, Silent()), plain, atol=1e-6)


def test_a_head_in_chunks_and_batches_cut_short_change_nothing(tiny_base, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    prompts = prompts_of(9, vocabulary=300)
    expected = label_loglikelihoods(model, prompts, LABELS, 0, Silent())
    monkeypatch.setattr("lorakit.evaluate.forward._LOGITS", 3 * 400)
    monkeypatch.setattr("lorakit.evaluate.forward._TOKENS", 1)
    monkeypatch.setattr("lorakit.evaluate.forward._ROWS", 2)
    assert np.allclose(label_loglikelihoods(model, prompts, LABELS, 0, Silent()), expected, atol=1e-6)


def test_labels_of_one_token_take_one_row_a_prompt():
    assert [path.tokens[:-1] for path in label_paths([(5,), (6,), (7,)])] == [()]
    assert [path.tokens[:-1] for path in label_paths([(5, 1), (6, 1), (5, 2), (6,)])] == [(5,), (6,)]
    assert sum(len(path.reads) for path in label_paths([tuple(label) for label in LABELS])) == sum(map(len, LABELS))


def test_the_work_of_a_prompt_is_done_once(tiny_base):
    """Of four labels of two tokens behind 100 tokens, the layers see far less than four times the prompt."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[:2].numel()))
    label_loglikelihoods(model, [list(range(3, 103))], [[5, 2], [6, 2], [7, 2], [8, 2]], 0, Silent())
    assert sum(seen) < 120


def test_empty_labels_and_broken_weights_are_errors(tiny_base):
    model = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    with pytest.raises(UserError, match="a label or a prompt has no tokens"):
        label_loglikelihoods(model, [[3]], [[5], []], 0, Silent())
    with pytest.raises(UserError, match="a label or a prompt has no tokens"):
        label_loglikelihoods(model, [[3], []], [[5]], 0, Silent())
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(LorakitError, match="gives no numbers for the labels"):
        label_loglikelihoods(model, [[3]], [[5]], 0, Silent())


def simulated(rows, labels, seed=2):
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, labels, rows)
    likely = generator.normal(-20, 2, (rows, labels))
    likely[np.arange(rows), truth] += 1.5
    return likely, truth


@pytest.mark.parametrize("labels", [2, 4])
def test_scores_are_those_of_scikit_learn(labels):
    likely, truth = simulated(300, labels)
    names = ["a", "bb", "cccc", "ü" * 5][:labels]
    found = score_labels(likely, truth, names)
    probabilities = np.exp(likely) / np.exp(likely).sum(1, keepdims=True)
    assert found.measures["accuracy"].value == accuracy_score(truth, likely.argmax(1))
    assert found.measures["macro-f1"].value == pytest.approx(f1_score(truth, likely.argmax(1), average="macro"))
    if labels == 2:
        assert found.auc == pytest.approx(roc_auc_score(truth, probabilities[:, 1]))
        assert found.measures["brier"].value == pytest.approx(2 * brier_score_loss(truth, probabilities[:, 1]))
    else:
        assert found.auc == pytest.approx(roc_auc_score(truth, probabilities, multi_class="ovr", average="macro"))
    assert found.confusion.sum() == 300
    assert found.confusion[1, 0] == ((truth == 1) & (likely.argmax(1) == 0)).sum()


def test_normalized_accuracies_are_lm_evals():
    """acc_norm divides by characters and acc_bytes by UTF-8 bytes, as lm_eval/api/task.py does."""
    likely, truth = simulated(200, 3)
    names = ["abcd", "abcde", "öööö"]
    found = score_labels(likely, truth, names)
    by_length = (likely / np.array([4, 5, 4])).argmax(1)
    by_bytes = (likely / np.array([4, 5, 8])).argmax(1)
    assert found.measures["accuracy-norm"].value == np.mean(by_length == truth)
    assert found.measures["accuracy-bytes"].value == np.mean(by_bytes == truth)
    assert len({found.measures[name].value for name in ("accuracy", "accuracy-norm", "accuracy-bytes")}) == 3


def test_calibration_by_hand():
    """Confidences 0.9 and 0.9 with one right, 0.6 right: (|0.5 - 0.9| * 2 + |1 - 0.6|) / 3."""
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
    truth = np.array([0, 1, 1])
    assert expected_calibration_error(probabilities, truth) == pytest.approx((0.4 * 2 + 0.4) / 3)
    found = score_labels(np.log(probabilities), truth, ["a", "b"])
    assert found.ece == pytest.approx(0.4)
    assert found.measures["brier"].value == pytest.approx((0.02 + 1.62 + 0.32) / 3)
    certain = score_labels(np.array([[0.0, -np.float64(1e9)]] * 4), [0] * 4, ["a", "b"])
    assert (certain.ece, certain.auc) == (0.0, None)
    assert (certain.measures["brier"].value, certain.measures["macro-f1"].value) == (0.0, 1.0)


def test_a_calibrated_model_has_little_calibration_error():
    generator = np.random.default_rng(6)
    share = generator.random(20_000)
    truth = (generator.random(20_000) < share).astype(int)
    assert expected_calibration_error(np.stack([1 - share, share], axis=1), truth) < 0.02


def test_a_label_that_no_row_has_is_left_out():
    likely, truth = simulated(60, 3)
    found = score_labels(likely, np.minimum(truth, 1), ["a", "b", "c"])
    expected = f1_score(np.minimum(truth, 1), likely.argmax(1), average="macro")
    assert found.measures["macro-f1"].value == pytest.approx(expected)
    assert found.auc is not None and found.confusion[2].sum() == 0


def test_intervals_of_a_classification_are_of_its_scores():
    likely, truth = simulated(300, 4)
    found = score_labels(likely, truth, ["a", "bb", "ccc", "dddd"])
    for name, interval in intervals(found.measures).items():
        assert interval.low < found.measures[name].value < interval.high


def test_a_confusion_matrix_has_recall_and_precision_of_each_label():
    likely = np.log(np.array([[0.8, 0.1, 0.1], [0.3, 0.6, 0.1], [0.1, 0.8, 0.1], [0.2, 0.7, 0.1]]))
    title, columns, rows = confusion_table("base", score_labels(likely, [0, 0, 1, 1], ["yes", "no", "maybe"]))
    assert title == "true labels down, predicted labels across: base"
    assert columns == ["", "yes", "no", "maybe", "recall", "precision"]
    assert rows == [
        ["yes", "1", "1", "0", "50%", "100%"],
        ["no", "0", "2", "0", "100%", "67%"],
        ["maybe", "0", "0", "0", "-", "-"],
    ]


def test_of_many_labels_the_most_frequent_mistake_is_shown():
    labels = [f"label{number}" for number in range(12)]
    likely = np.log(np.eye(12)[[0, 1, 1, 3]] + 0.01)
    _, columns, rows = confusion_table("base", score_labels(likely, [0, 1, 2, 2], labels))
    assert columns[-1] == "most often taken for"
    assert rows[0] == ["label0", "1", "100%", "100%", "-"]
    assert rows[2] == ["label2", "2", "0%", "-", "label1 (1)"]
