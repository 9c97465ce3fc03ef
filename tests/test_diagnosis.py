"""What goes wrong with adapters is flagged where it is planted, and not where the adapter is honest."""

import json
import random
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from conftest import write_rows
from prose import WORDS, prose
from runs_of_tests import run_recipe

from lorakit.data.cleaning.row_stats import compute_row_stats
from lorakit.data.general_texts import read_general_texts
from lorakit.data.rows import Conversation
from lorakit.errors import LorakitError, UserError
from lorakit.evaluate.diagnosis.copying import find_copied, index_spans, measure_leak, measure_parroting
from lorakit.evaluate.diagnosis.examination import (
    compute_text_losses,
    measure_drift,
    measure_forgetting,
    measure_memorization,
)
from lorakit.evaluate.diagnosis.style import measure_style
from lorakit.model.load import load_model
from lorakit.model.peft_adapter import load_adapter
from lorakit.prepare import reopen_run
from lorakit.progress import Silent

TRAINING = [prose(seed) for seed in range(300)]
PROMPTS = [prose(seed, 12) for seed in range(1000, 1060)]
REFERENCES = [prose(seed) for seed in range(2000, 2060)]
HONEST = [prose(seed) for seed in range(3000, 3060)]


def package(seed):
    """An answer in a strict form: nine words of form and five of content, of which the first is frequent."""
    draw = random.Random(seed)
    keys = ("section", "interface", "language", "licence", "maintainer")
    return json.dumps({f"the {key} is": draw.choices(WORDS[:5], weights=[9, 4, 2, 1, 1])[0] for key in keys})


def parrots(answers, references=REFERENCES, prompts=PROMPTS, training=TRAINING, base=None):
    return measure_parroting(answers, prompts, references, index_spans(training), base)


def test_answers_copied_from_training_rows_are_flagged():
    found = parrots([*TRAINING[:30], *HONEST[30:]], base=HONEST)
    assert found.flagged and found.value == 0.5 and found.interval.low > 0.05
    assert found.details["copied by base"] == found.details["copied by references"] == 0
    case = found.details["cases"][0]
    assert case["words"] == 40 and case["span"] == TRAINING[case["training answer"]]


def test_a_training_answer_with_words_around_it_is_still_copied():
    assert parrots([f"{prose(row, 20)}: {TRAINING[row].upper()}!" for row in range(60)]).value == 1.0


def test_answers_of_ones_own_are_not_flagged():
    found = parrots(HONEST, base=HONEST)
    assert not found.flagged and found.value == 0.0 and found.interval.high < 0.1


def test_a_single_copied_answer_is_no_reason_for_a_flag():
    assert not parrots([TRAINING[0], *HONEST[1:]]).flagged


def test_answers_in_a_strict_form_are_not_flagged():
    """Nearly every right answer is that of some training row as well."""
    training, references, answers = ([package(seed + at) for seed in range(400)] for at in (0, 5000, 9000))
    found = parrots(answers, references, PROMPTS[:1] * 400, training)
    assert found.details["copied"] > 0.1 and not found.flagged


def test_what_stands_in_the_prompt_or_the_reference_is_not_copied():
    assert parrots(TRAINING[:60], prompts=TRAINING[:60]).value == 0.0
    assert not parrots(TRAINING[:60], references=TRAINING[:60]).flagged


def test_what_most_training_answers_say_is_not_copied():
    opening = prose(77, 30)
    training = [f"{opening} {text}" for text in TRAINING]
    assert parrots([f"{opening} {text[:40]}" for text in HONEST], training=training).details["copied"] == 0.0


def test_spans_of_seven_words_are_chance_and_of_eight_are_not():
    index = index_spans(TRAINING)
    words = TRAINING[9].split()
    assert find_copied(" ".join(["x", *words[5:12], "y"]), index).covered == 0
    found = find_copied("x " + ", ".join(words[5:13]) + " y", index)
    assert (found.covered, found.longest, found.answer, found.words) == (8, 8, 9, 10)
    assert found.text == ", ".join(words[5:13])


def test_scripts_without_spaces_are_compared_by_character():
    texts = [row.text for row in read_general_texts() if row.id.startswith(("chinese", "japanese"))]
    index = index_spans(texts)
    assert find_copied(texts[0][20:60], index).share == 1.0
    assert find_copied(texts[0][20:35], index).covered == 0
    assert find_copied(texts[1], index_spans(texts[:1])).covered == 0


def test_no_answers_and_empty_answers_are_not_copied():
    assert parrots([], [], []).value is None and "no answers" in parrots([], [], []).details["unmeasured"]
    assert parrots([""] * 60).value == 0.0
    assert find_copied("some words", index_spans([])).covered == 0


def test_an_index_of_fifty_thousand_answers_takes_seconds():
    texts = [prose(seed) for seed in range(5000)]
    start = time.perf_counter()
    index = index_spans(texts * 2)
    assert time.perf_counter() - start < 10 and len(index.hashes) == 5000 * 33


def losses(rows, per_token, spread=0.0, seed=0):
    tokens = np.random.default_rng(seed).integers(20, 60, rows)
    noise = np.random.default_rng(seed + 1).normal(0, spread, rows)
    return tokens * (per_token + noise), tokens


def learned(train, held_out, rows=100):
    base, tokens = losses(rows, 3.0, 0.3)
    tuned, _ = losses(rows, 3.0 - train, 0.3)
    other_base, other_tokens = losses(rows, 3.1, 0.3, seed=5)
    other, _ = losses(rows, 3.1 - held_out, 0.3, seed=5)
    tuned = tuned + tokens * np.random.default_rng(9).normal(0, 0.1, rows)
    return measure_memorization((base, tuned, tokens), (other_base, other, other_tokens))


def test_what_only_training_rows_show_is_memorized():
    found = learned(2.5, 0.5)
    assert found.flagged and found.value == pytest.approx(0.8, abs=0.03) and found.interval.low > 0.5
    assert found.details["gap (nats)"]["value"] == pytest.approx(2.1, abs=0.15)


def test_what_held_out_rows_show_too_is_learned():
    for held_out in (2.5, 2.0):
        assert not learned(2.5, held_out).flagged
    assert "not learned" in learned(-0.2, 0.1).details["unmeasured"]
    assert "too few rows" in learned(2.5, 0.1, rows=2).details["unmeasured"]


def test_a_higher_loss_on_general_text_is_forgetting():
    registers = ["narrative"] * 30 + ["code"] * 30
    base, tokens = losses(60, 3.0, 0.3)
    worse = base + tokens * np.where(np.arange(60) < 30, 0.1, 2.1)
    found = measure_forgetting(base, worse, tokens, registers)
    assert found.flagged and found.value == pytest.approx(1.1, abs=0.2)
    assert found.details["registers"]["code"]["difference"] == pytest.approx(2.1)
    assert found.details["registers"]["narrative"]["interval"] is None  # the same in each text
    little, _ = losses(60, 3.02, 0.3)
    assert not measure_forgetting(base, little, tokens, registers).flagged
    assert not measure_forgetting(base, base - tokens, tokens, registers).flagged


def test_a_higher_loss_on_a_quantized_base_is_drift():
    full, tokens = losses(80, 0.2, 0.05)
    noise = np.random.default_rng(3).normal(0, 0.02, 80)
    nats = {"none": full, "q8": full + tokens * (0.002 + noise), "nf4": full + tokens * (0.4 + noise)}
    found = measure_drift(nats, tokens, base_nats=full + tokens * 2.0)
    assert [name for name, one in found.items() if one.flagged] == ["nf4"]
    assert found["nf4"].details["share of the gain lost"] == pytest.approx(0.2, abs=0.01)


def styles(answers, references=REFERENCES, prompts=PROMPTS, cut=None, references_longer=None):
    none = [False] * len(answers)
    found = measure_style(answers, references, prompts, cut or none, references_longer or none)
    assert all(json.dumps(asdict(one)) for one in found)
    return {one.name: one for one in found}


def flagged(findings):
    return [name for name, one in findings.items() if one.flagged]


def test_answers_like_the_references_are_not_flagged():
    found = styles(HONEST)
    assert not flagged(found) and all(one.value is not None for one in found.values())
    assert found["variety of answers"].value == pytest.approx(1.0)


def test_strict_forms_are_not_flagged():
    prompts = [prose(seed, 9) for seed in range(200)]
    references, answers = ([package(seed + at) for seed in range(200)] for at in (0, 7000))
    assert not flagged(styles(answers, references, prompts))


def test_one_answer_to_everything_is_a_collapse():
    found = styles([HONEST[0]] * 60)
    assert flagged(found) == ["variety of answers"] and found["variety of answers"].value == 0.0
    assert found["variety of answers"].details["most frequent answers"][0]["share"] == 1.0
    few = styles([HONEST[row % 4] for row in range(60)])
    assert flagged(few) == ["variety of answers"]
    assert flagged(styles(["yes"] * 60, ["yes", "no"] * 30)) == ["variety of answers"]


def test_rare_labels_given_a_little_less_often_are_no_collapse():
    references = (["a"] * 6 + ["b"] * 3 + ["c"]) * 6
    answers = (["a"] * 7 + ["b"] * 3) * 6
    assert not flagged(styles(answers, references))


def test_prompts_that_are_the_same_may_have_the_same_answer():
    found = styles([HONEST[row % 6] for row in range(60)], prompts=[PROMPTS[row % 6] for row in range(60)])
    assert not found["variety of answers"].flagged
    assert found["variety of answers"].details["different prompts"] == 6


def test_answers_of_another_length_are_flagged():
    short = styles([" ".join(text.split()[:9]) for text in HONEST])
    assert flagged(short) == ["answer length"]
    assert short["answer length"].details["answers over references"] == pytest.approx(9 / 40)
    assert short["answer length"].interval.low <= short["answer length"].value <= short["answer length"].interval.high
    assert "answer length" in flagged(styles([text * 3 for text in HONEST]))
    assert "answer length" in flagged(styles([""] * 60))
    assert not flagged(styles([" ".join(text.split()[:26]) for text in HONEST]))


def test_answers_that_do_not_end_are_flagged_and_long_references_are_not():
    cut = [row % 2 == 0 for row in range(60)]
    assert flagged(styles(HONEST, cut=cut)) == ["unfinished answers"]
    assert not flagged(styles(HONEST, cut=cut, references_longer=cut))


def test_answers_that_repeat_themselves_are_flagged():
    found = styles([" ".join(text.split()[:2] * 20) for text in HONEST])
    assert flagged(found) == ["vocabulary"]
    assert found["vocabulary"].details["distinct-2"]["references"] > 0.5


def test_answers_of_another_format_are_flagged():
    half = [json.dumps({"answer": text}) if row % 2 else text for row, text in enumerate(HONEST)]
    found = styles(half)
    assert flagged(found) == ["format"] and found["format"].details["format"] == "JSON"
    assert found["format"].value == 0.5
    lists = styles([f"- {text}" for text in HONEST], [f"1. {text}" for text in REFERENCES])
    assert not flagged(lists) and lists["format"].details["formats of answers"] == {"list": 1.0}


def asked(rows):
    return [
        Conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}])
        for prompt, answer in rows
    ]


def test_evaluation_rows_of_the_training_are_a_leak():
    rows = [(prose(seed, 15), prose(seed + 500)) for seed in range(200)]
    train = compute_row_stats(asked(rows[:150]), near=True, style=False)
    clean = measure_leak(train, compute_row_stats(asked(rows[150:]), near=True, style=False))
    assert not clean.flagged and clean.value == 0.0 and clean.details["nearly the same"] == 0
    planted = [
        (rows[3][0].upper(), f" {rows[3][1]}"),
        (rows[4][0], "another answer"),
        (rows[5][0], rows[5][1] + " indeed"),
        *rows[150:],
    ]
    found = measure_leak(train, compute_row_stats(asked(planted), near=True, style=False))
    assert found.flagged and found.value == pytest.approx(1 / 53)
    assert found.details["cases"] == [{"row": 0, "training row": 3}]
    assert found.details["near cases"] == [{"row": 2, "training row": 5}]
    assert found.details["same prompt, other answer"] == 2
    assert measure_leak(train, compute_row_stats([], near=True, style=False)).value is None


def test_a_label_that_training_rows_have_too_is_no_leak():
    train, held_out = ([(prose(seed + at, 15), "yes" if seed % 2 else "no") for seed in range(60)] for at in (0, 900))
    assert not measure_leak(
        *(compute_row_stats(asked(rows), near=True, style=False) for rows in (train, held_out))
    ).flagged


def test_the_bundled_texts_are_many_and_apart():
    rows = read_general_texts()
    assert len(rows) >= 60 and len({row.id for row in rows}) == len(rows)
    assert len({row.register for row in rows}) == 9
    assert all(250 <= len(row.text) <= 1000 for row in rows if not row.id.startswith(("chinese", "japanese")))
    for number, row in enumerate(rows):
        others = [other.text for other in rows[:number] + rows[number + 1 :]]
        assert find_copied(row.text, index_spans(others)).longest <= 12


def test_general_texts_come_from_a_file(tmp_path):
    file = write_rows(tmp_path / "own.jsonl", [{"text": "one"}, {"id": 7, "register": "letter", "text": "two"}])
    assert [(row.id.rsplit("/")[-1], row.register, row.text) for row in read_general_texts(file)] == [
        ("own.jsonl:1", "", "one"),
        ("7", "letter", "two"),
    ]
    (tmp_path / "own.txt").write_text("A text.\n\nOf two parts.\n", encoding="utf-8")
    (row,) = read_general_texts(tmp_path / "own.txt")
    assert row.text.startswith("A text.")


def test_files_without_texts_are_errors_that_name_the_line(tmp_path):
    file = write_rows(tmp_path / "own.jsonl", [{"text": "one"}, {"txt": "two"}])
    with pytest.raises(UserError, match=r"own.jsonl:2: the row has no 'text'"):
        read_general_texts(file)
    with pytest.raises(UserError, match="no such file"):
        read_general_texts(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="has no texts"):
        read_general_texts(write_rows(tmp_path / "empty.jsonl", []))


def test_losses_of_texts_are_those_of_the_whole_logits(tiny_base, tokenizer):
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    texts = ["apples and rivers", "", "a", "number 3 of the lamps. " * 60]
    nats, tokens = compute_text_losses(model, tokenizer, texts, Silent())
    assert nats[1] == tokens[1] == 0 and tokens[3] == 255  # no more than the model has positions
    for row, text in enumerate(texts):
        ids = torch.tensor([tokenizer(text)["input_ids"][:256]])
        if ids.shape[1] > 1:
            with torch.no_grad():
                expected = cross_entropy(model(ids.long()).logits[0, :-1], ids[0, 1:].long(), reduction="sum")
            assert nats[row] == pytest.approx(float(expected), rel=1e-4)
            assert tokens[row] == ids.shape[1] - 1
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(LorakitError, match="weights are broken"):
        compute_text_losses(model, tokenizer, texts, Silent())


def fitted(model, tokenizer, texts, steps, learning_rate):
    """The model after some steps on random texts, of those weights that are not frozen."""
    import torch

    from lorakit.data.batches import collate
    from lorakit.model.loss import supervised_loss

    rows = [{"input_ids": ids, "labels": ids} for ids in (tokenizer(text)["input_ids"][:64] for text in texts)]
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=learning_rate)
    draw = random.Random(1)
    model.train()
    for _ in range(steps):
        total, count = supervised_loss(model, **collate(draw.sample(rows, 8), 0))
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_a_model_trained_too_hard_has_forgotten_and_an_honest_one_has_not(tiny_base, tokenizer):
    """A model that knows the general texts, with adapters trained on answers of one kind."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    rows = [row for row in read_general_texts() if row.register != "other language"]
    texts, registers = [row.text[:200] for row in rows], [row.register for row in rows]
    torch.manual_seed(2)
    known = fitted(AutoModelForCausalLM.from_pretrained(tiny_base), tokenizer, texts, 150, 1e-2)
    base, tokens = compute_text_losses(known, tokenizer, texts, Silent())
    assert base.sum() / tokens.sum() < 4  # it knows more than that 400 tokens are possible
    plain = {name: value.clone() for name, value in known.state_dict().items()}
    found = {}
    for name, learning_rate in (("hard", 0.3), ("honest", 1e-3)):
        adapted = get_peft_model(known, LoraConfig(r=4, target_modules="all-linear"))
        fitted(adapted, tokenizer, [package(seed) for seed in range(40)], 30, learning_rate)
        found[name] = measure_forgetting(
            base, compute_text_losses(adapted, tokenizer, texts, Silent())[0], tokens, registers
        )
        known = adapted.unload()
        known.load_state_dict(plain)
    assert found["hard"].flagged and found["hard"].value > 1.0
    assert not found["honest"].flagged


def test_a_model_that_learned_its_rows_by_heart_is_flagged(tiny_base, tokenizer):
    from transformers import AutoModelForCausalLM

    train, held_out = ([prose(seed, 12) for seed in seeds] for seeds in (range(16), range(900, 930)))

    def measured(model):
        return [compute_text_losses(model, tokenizer, texts, Silent()) for texts in (train, held_out)]

    words = [prose(seed, 12) for seed in range(100, 200)]  # what both kinds of rows have in common is known already
    model = fitted(AutoModelForCausalLM.from_pretrained(tiny_base), tokenizer, words, 150, 1e-2)
    before = measured(model)
    after = measured(fitted(model, tokenizer, train, 150, 1e-2))
    found = measure_memorization(*((one[0], other[0], one[1]) for one, other in zip(before, after, strict=True)))
    assert found.flagged, found


@pytest.mark.smollm2
@pytest.mark.slow
def test_smollm2_trained_at_a_rate_far_too_high_has_forgotten(users_cache, tmp_path):
    recipe = Path(__file__).parent.parent / "recipes" / "debian-json" / "recipe.yaml"
    rows = read_general_texts()[::6]

    settings = ["train.steps=10", "data.eval=null", "train.save_every=10", "train.learning_rate=0.02"]
    run, _ = run_recipe(recipe, tmp_path / "run", *settings)
    _, prepared = reopen_run(run.folder, Silent())
    model = load_adapter(load_model(prepared.base, prepared.model, "cpu"), run.adapter)
    texts = [row.text for row in rows]
    tuned, tokens = compute_text_losses(model, prepared.tokenizer, texts, Silent())
    with model.disable_adapter():
        base, _ = compute_text_losses(model, prepared.tokenizer, texts, Silent())
    assert measure_forgetting(base, tuned, tokens, [row.register for row in rows]).flagged
