"""Promises of `lorakit eval` about what may have gone wrong: planted faults are flagged, honest runs are not."""

import json
import random
from pathlib import Path

import pytest
from conftest import TOPICS, rows_of, write_rows
from eval_runs import Remembers, make_run, score
from prose import prose

from lorakit.data.general_texts import read_general_texts
from lorakit.evaluate.diagnosis.examination import create_examination
from lorakit.evaluate.models import add_quantizations, resolve_models
from lorakit.evaluate.run import EvalSettings, score_models
from lorakit.progress import Silent


def rows_with_answers(answers, first=0):
    """Rows whose prompts say nothing of their answers."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"Number {first + at}"},
                {"role": "assistant", "content": answer},
            ]
        }
        for at, answer in enumerate(answers)
    ]


def teach(model, tokenizer, texts):
    """Train all of a model on these texts."""
    import torch

    batches = [tokenizer(texts[at : at + 8], return_tensors="pt", padding=True) for at in range(0, len(texts), 8)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        batch = batches[step % len(batches)]
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def knowing(tmp_path_factory, tiny_base, tokenizer):
    """A base that knows the general texts, so that it has something to forget."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    teach(model, tokenizer, [row.text[:160] for row in read_general_texts() if row.register != "other language"])
    return save(model, tokenizer, tmp_path_factory.mktemp("knowing"))


@pytest.fixture(scope="module")
def brittle(tmp_path_factory, tiny_base, tokenizer):
    """A base that answers the held-out rows by weights that four bits round away, as eight bits do not.

    One input of each layer is always zero, and its weights are 60 times as large as the others: they change no result,
    and are what the others are scaled by.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    layers = model.model.layers
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):  # what is learnt lies in the layers
        table.requires_grad_(False)
    for norm in (norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)):
        norm.weight.requires_grad_(False)[0] = 0
    teach(model, tokenizer, [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows_of(40)])
    with torch.no_grad():
        for layer in layers:
            attention, mlp = layer.self_attn, layer.mlp
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                linear.weight[:, 0] = 60 * linear.weight.std()
    return save(model, tokenizer, tmp_path_factory.mktemp("brittle"))


@pytest.fixture(scope="module")
def general(tmp_path_factory):
    """A file of the texts that the base knows."""
    rows = [row for row in read_general_texts() if row.register != "other language"]
    file = tmp_path_factory.mktemp("general") / "general.jsonl"
    return write_rows(file, [{"id": row.id, "register": row.register, "text": row.text[:160]} for row in rows])


@pytest.fixture(scope="module")
def honest(tmp_path_factory, knowing):
    return make_run(tmp_path_factory.mktemp("honest"), knowing, train={"learning_rate": 0.001})


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory, knowing):
    return make_run(tmp_path_factory.mktemp("forgetful"), knowing, train={"learning_rate": 0.3, "steps": 12})


def found_in(facts, model="adapter"):
    return {one["name"]: one for one in facts["findings"].get(model, [])}


def test_an_honest_run_is_not_flagged(honest, general, lorakit_eval):
    code, out, err = lorakit_eval(honest.folder, "--general", general, "--json")
    facts = json.loads(out)
    found = found_in(facts)
    assert code == 0 and set(facts["findings"]) == {"adapter"}
    assert found["forgetting"]["value"] < 0.1 and found["forgetting"]["interval"]["high"] < 0.5
    assert not any(found[name]["flagged"] for name in ("forgetting", "parroting", "memorization"))
    assert "adapter: forgetting" not in err and "adapter: parroting" not in err
    assert json.loads(Path(facts["file"]).read_text())["findings"] == facts["findings"]


def test_a_run_that_forgot_is_flagged_and_warned_of(forgetful, general, lorakit_eval):
    code, out, err = lorakit_eval(forgetful.folder, "--general", general)
    assert code == 0 and "what may have gone wrong" in out and "LOOK" in out
    assert "adapter: forgetting: " in err and "Train with a lower learning rate" in err
    found = found_in(json.loads(lorakit_eval(forgetful.folder, "--general", general, "--json")[1]))["forgetting"]
    assert found["flagged"] and found["value"] > found["threshold"] == 0.5
    assert found["details"]["registers"].keys() >= {"narrative", "code"}


def test_what_was_examined_is_not_computed_again(honest, general, lorakit_eval, loads, tmp_path, monkeypatch):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    first = json.loads(lorakit_eval(honest.folder, "--general", general, "--json")[1])
    assert len(loads) == 1
    again = json.loads(lorakit_eval(honest.folder, "--general", general, "--json")[1])
    assert len(loads) == 1, "the model was loaded again"
    assert again["findings"] == first["findings"]
    lorakit_eval(honest.folder, "--general", general, "--no-cache")
    assert len(loads) == 2


def test_the_bundled_texts_are_scored_without_a_file(honest, lorakit_eval):
    found = found_in(json.loads(lorakit_eval(honest.folder, "--diagnose", "--rows", 4, "--json")[1]))
    assert found["forgetting"]["details"]["texts"] == len(read_general_texts())
    assert found["memorization"]["details"].keys() >= {"training rows", "held-out rows"}
    assert (found["memorization"]["details"]["training rows"], found["parroting"]["details"]["rows"]) == (22, 4)


def test_answers_of_training_rows_are_parroting(tmp_path, tiny_base, lorakit_eval):
    """All weights are trained on few long answers until it says one of them to whatever it is asked."""

    def topics(seed):
        return " ".join(random.Random(seed).choices(TOPICS, k=12))

    train = write_rows(tmp_path / "few.jsonl", rows_with_answers([topics(0), topics(1)] * 2))
    held = write_rows(tmp_path / "held.jsonl", rows_with_answers([topics(at) for at in range(50, 80)], first=5))
    run = make_run(
        tmp_path,
        tiny_base,
        adapter={"kind": "none", "rank": ..., "alpha": ...},
        data={"train": str(train), "eval": str(held)},
        train={"steps": 60, "learning_rate": 0.01, "eval_every": 60, "save_every": 60},
        evaluate={"metrics": ["exact-match"], "max_new_tokens": 48},
    )
    code, out, err = lorakit_eval(run.folder, "--json")
    found = found_in(json.loads(out), "model")
    assert code == 0 and found["parroting"]["flagged"] and found["parroting"]["value"] > 0.5
    details = found["parroting"]["details"]
    assert details["copied by base"] == details["copied by references"] == 0
    assert details["cases"][0]["span"] in topics(0) + "; " + topics(1)
    assert found["variety of answers"]["flagged"]
    assert "model: parroting" in err


def test_training_rows_among_the_data_are_a_leak(honest, lorakit_eval, tmp_path):
    planted = write_rows(tmp_path / "planted.jsonl", [*rows_of(60)[50:], *rows_of(5)[2:4]])
    code, out, err = lorakit_eval(honest.folder, "--data", planted, "--json")
    (found,) = json.loads(out)["findings"]["data"]
    assert code == 0 and found["flagged"] and found["value"] == pytest.approx(2 / 12)
    assert found["details"]["cases"] == [{"row": 10, "training row": 2}, {"row": 11, "training row": 3}]
    assert "data: leak" in err
    _, out, err = lorakit_eval(honest.folder, "--data", planted, "--rows", 10, "--json")
    (found,) = json.loads(out)["findings"]["data"]
    assert not found["flagged"] and found["details"]["rows"] == 10 and "leak" not in err


def test_a_leak_is_found_whatever_the_recipe_checks(tmp_path, knowing, lorakit_eval):
    off = dict.fromkeys(("duplicates", "contradictions", "leakage", "near_leakage"), "off")
    run = make_run(tmp_path, knowing, data={"eval": None, "clean": off}, train={"eval_every": ...})
    code, out, _ = lorakit_eval(run.folder, "--data", tmp_path / "train.jsonl", "--json")
    assert code == 0
    assert json.loads(out)["findings"]["data"][0]["value"] == 1.0


def test_texts_are_examined_by_their_losses_alone(tmp_path, knowing, general, lorakit_eval):
    texts = [{"text": prose(seed, 12)} for seed in range(20)]
    train, held = write_rows(tmp_path / "a.jsonl", texts[:14]), write_rows(tmp_path / "b.jsonl", texts[14:])
    data = {"train": str(train), "eval": str(held)}
    run = make_run(tmp_path, knowing, data=data, train={"learning_rate": 0.3}, evaluate={"metrics": ["exact-match"]})
    code, out, _ = lorakit_eval(run.folder, "--general", general, "--json")
    found = found_in(json.loads(out))
    assert code == 0 and found.keys() == {"forgetting", "memorization"} and found["forgetting"]["flagged"]
    assert json.loads(lorakit_eval(run.folder, "--json")[1])["findings"] == {}
    leaks = json.loads(lorakit_eval(run.folder, "--data", train, "--json")[1])["findings"]["data"]
    assert leaks[0]["value"] == 1.0


def test_a_fully_trained_model_is_examined_too(tmp_path, knowing, general, lorakit_eval):
    train = {"learning_rate": 0.1}
    run = make_run(tmp_path, knowing, adapter={"kind": "none", "rank": ..., "alpha": ...}, train=train)
    code, out, _ = lorakit_eval(run.folder, "--general", general, "--json")
    found = found_in(json.loads(out), "model")
    assert code == 0 and found.keys() >= {"forgetting", "memorization", "parroting", "format"}
    assert found["forgetting"]["flagged"]
    code, out, err = lorakit_eval(run.folder, "--quantizations", "q8")
    assert code == 2 and out == "" and "--quantizations: is for adapters" in err


def test_an_adapter_is_scored_on_quantized_bases_beside_its_own(brittle, general, lorakit_eval, loads, tmp_path):
    run = make_run(tmp_path, brittle, train={"learning_rate": 0.001})
    arguments = (run.folder, "--quantizations", "q8,nf4,q8", "--general", general, "--no-cache", "--json")
    code, out, _ = lorakit_eval(*arguments)
    facts = json.loads(out)
    assert code == 0 and loads == ["none", "q8", "nf4"]
    assert list(facts["models"]) == ["base", "adapter", "adapter on q8", "adapter on nf4"]
    assert facts["models"]["adapter on nf4"]["quantization"] == "nf4"
    for word in ("q8", "nf4"):
        found = found_in(facts, f"adapter on {word}")
        drift, scores = found["quantization drift"], facts["models"]
        assert "forgetting" not in found  # how it is held would be counted as what it forgot
        lost = [scores[name]["scores"]["loss"]["value"] for name in (f"adapter on {word}", "adapter")]
        assert drift["value"] == pytest.approx(lost[0] - lost[1]) and drift["value"] != 0
        assert "share of the gain lost" in drift["details"]
        assert drift["flagged"] == (word == "nf4")
    assert "quantization drift" not in found_in(facts)


def test_drift_is_measured_against_the_full_base_or_said_to_be_missing(tmp_path, knowing):
    run = make_run(tmp_path, knowing, model={"quantization": "nf4"})

    def drift(*words):
        model_set = add_quantizations(resolve_models([str(run.folder)], Silent()), words)
        found = score_models(model_set, None, EvalSettings(), Silent()).findings
        return {
            name: next((one for one in those if one.name == "quantization drift"), None)
            for name, those in found.items()
        }

    assert [(name, one.value is None) for name, one in drift("none").items()] == [("adapter", False)]
    lacking = drift("q8")
    assert lacking.keys() == {"adapter", "adapter on q8"}
    assert all("add none to --quantizations" in one.details["unmeasured"] for one in lacking.values())


def test_models_of_another_base_are_not_measured_against_this_one(honest, tmp_path, tiny_base, general):
    """The other run has fewer tokens than the first one's training rows use, which must not be put to it."""
    other = make_run(tmp_path / "other", tiny_base)
    model_set = resolve_models([str(honest.folder), str(other.folder), str(tiny_base), "base"], Silent())
    listener, request = Remembers(), EvalSettings(("exact-match",), 8, cache=False)
    found = score_models(model_set, None, request, listener, create_examination(model_set, general))
    names = {model: {one.name for one in those} for model, those in found.findings.items()}
    first, second, plain = (spec.name for spec in model_set.specs[:3])
    assert names[first] >= {"forgetting", "memorization", "parroting"}
    assert not names[second] & {"forgetting", "memorization"} and "parroting" in names[second]
    assert not names[plain] & {"forgetting", "memorization", "parroting"}
    asked = {label for label, _ in listener.bars if "general texts" in label}
    assert asked == {f"{first}: general texts", "base: general texts"}


def test_findings_of_answers_need_no_examination(honest):
    found = score(honest.folder)
    assert {one.name for one in found.findings["adapter"]} >= {"parroting", "answer length", "format"}
    assert "base" not in found.findings


WRONG = {
    "no such file of texts": (["RUN", "--general", "nowhere.jsonl"], "--general: nowhere.jsonl: there is no such file"),
    "a file without texts": (["RUN", "--general", "BAD"], "bad.jsonl:1: the row has no 'text'"),
    "no base to compare with": (["RUN", "BASE", "--diagnose"], "--diagnose: compares with the base model"),
    "no quantization": (
        ["RUN", "--quantizations", "nf4,q7"],
        "--quantizations: 'q7' is not a quantization. Write",
    ),
    "an empty quantization": (["RUN", "--quantizations", ""], "--quantizations: '' is not a quantization"),
    "no adapter": (["BASE", "--data", "ROWS", "--quantizations", "q8"], "--quantizations: is for adapters"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_one_line_before_a_model_is_loaded(case, honest, knowing, lorakit_eval, loads, tmp_path):
    bad, rows = write_rows(tmp_path / "bad.jsonl", [{"txt": "a"}]), write_rows(tmp_path / "rows.jsonl", rows_of(3))
    known = {"RUN": honest.folder, "BASE": knowing, "BAD": bad, "ROWS": rows}
    arguments, reason = WRONG[case]
    code, out, err = lorakit_eval(*(known.get(word, word) for word in arguments), "-q")
    assert (code, out, loads) == (2, "", [])
    assert reason in err and "Traceback" not in err
