"""Promises of `lorakit eval` about what it scores: each base is loaded once, each model is asked in its own words."""

import shutil

import numpy as np
import pytest
from conftest import CHATML, rows_of, write_rows
from eval_runs import Remembers, edit_json, labelled_rows, loss, make_run, score
from merge_runs import merged_run

from lorakit.errors import UserError
from lorakit.evaluate import inference
from lorakit.evaluate.models import resolve_models
from lorakit.evaluate.rendering import render_for_models
from lorakit.evaluate.run import EvalSettings, score_model
from lorakit.progress import Silent


@pytest.fixture(scope="module")
def one(tmp_path_factory, tiny_base):
    return make_run(tmp_path_factory.mktemp("one"), tiny_base)


@pytest.fixture(scope="module")
def two(tmp_path_factory, tiny_base):
    return make_run(tmp_path_factory.mktemp("two"), tiny_base, train={"seed": 7, "learning_rate": 0.01})


@pytest.fixture
def loads(monkeypatch):
    """The bases that are loaded, in their order."""
    found, load_model = [], inference.load_model

    def noted(base, settings, device):
        found.append((base.name, settings.quantization))
        return load_model(base, settings, device)

    monkeypatch.setattr(inference, "load_model", noted)
    return found


def adapter_copy(run, folder, **config):
    shutil.copytree(run.adapter, folder)
    edit_json(folder / "adapter_config.json", **config)
    return folder


def test_adapters_and_their_base_are_scored_in_one_load_in_any_order(one, two, loads, tmp_path):
    copy = adapter_copy(one, tmp_path / "copy")
    found = score(one.folder, copy, two.folder, "base")
    assert len(loads) == 1
    names = [model.name for model in found.models]
    assert names[-1] == found.baseline.name == "base"
    assert loss(found, names[0]) == loss(found, "copy") != loss(found, names[2])
    for run, name in ((one, names[0]), (two, names[2])):
        alone = score(run.folder)
        assert loss(alone, "adapter") == pytest.approx(loss(found, name), rel=1e-6)
        assert loss(alone, "base") == pytest.approx(loss(found, "base"), rel=1e-6)
        assert alone.models[1].answers == found.models[names.index(name)].answers


def test_a_run_alone_means_base_adapter_and_merged(one, tmp_path, tiny_base):
    run = make_run(tmp_path, tiny_base)
    merged_run(run)
    found = score(run.folder)
    assert [model.name for model in found.models] == ["base", "adapter", "merged"]
    assert loss(found, "merged") == pytest.approx(loss(found, "adapter"), rel=1e-4)
    apart = score(run.merged, run.folder, "base")
    assert [model.spec.kind for model in apart.models] == ["merged", "adapter", "base"]
    assert loss(apart, apart.models[0].name) == pytest.approx(loss(found, "merged"))


def test_a_full_fine_tuning_is_scored_against_its_base(tmp_path, tiny_base):
    small = {"learning_rate": 0.002, "steps": 6}
    run = make_run(tmp_path, tiny_base, adapter={"kind": "none", "rank": ..., "alpha": ...}, train=small)
    found = score(run.folder)
    assert [model.name for model in found.models] == ["base", "model"]
    assert loss(found, "model") < loss(found, "base")


def test_the_base_is_held_as_the_run_held_it(tmp_path, tiny_base, loads):
    run = make_run(tmp_path, tiny_base, model={"quantization": "nf4"})
    found = score(run.folder)
    assert loads == [(str(tiny_base), "nf4")]
    apart = score(run.folder, adapter_copy(run, tmp_path / "copy"), tiny_base)
    assert loads[1:] == [(str(tiny_base), "nf4"), (str(tiny_base), "none")]
    assert loss(apart, "copy") == loss(found, "adapter")
    assert loss(apart, tiny_base.name) != loss(found, "base")


def test_an_adapter_beside_a_quantized_run_is_told_to_be_on_its_quantized_base(one, tmp_path, tiny_base):
    run = make_run(tmp_path, tiny_base, model={"quantization": "nf4"})
    folder = adapter_copy(one, tmp_path / "alone")
    for given, quantization in (([str(run.folder), folder], "nf4"), ([str(one.folder), folder], "none")):
        told = Remembers()
        model_set = resolve_models([str(name) for name in given], told)
        assert model_set.specs[-1].settings.quantization == quantization
        assert any("put on its base in nf4" in text for text in told.warned) == (quantization == "nf4")


def test_the_adapter_of_a_run_is_the_run(one):
    found = score(one.adapter, "base")
    assert [model.name for model in found.models] == ["run/adapter", "base"]
    assert found.model_set.run.folder == one.folder


def test_an_adapter_without_a_run_is_put_on_the_base_that_it_names_which_is_said(one, tmp_path, tiny_base):
    progress, copy = Remembers(), adapter_copy(one, tmp_path / "copy")
    found = score(copy, "base", file=write_rows(tmp_path / "rows.jsonl", rows_of(40)[30:]), progress=progress)
    assert any(f"put on {tiny_base}" in line for line in progress.said)
    with_run = score(one.folder)
    assert loss(found, "copy") == pytest.approx(loss(with_run, "adapter"), rel=1e-6)
    assert found.baseline.name == "base" and found.model_set.run is None


def test_a_base_that_cannot_be_had_is_replaced_by_the_runs_and_told(one, tmp_path):
    copy = adapter_copy(one, tmp_path / "copy", base_model_name_or_path="/nowhere/model")
    progress = Remembers()
    found = score(one.folder, copy, progress=progress)
    assert loss(found, "run") == loss(found, "copy")
    assert not any("/nowhere/model" in line for line in progress.warned)  # base.json says that it is the run's
    (copy / "base.json").unlink()
    assert loss(score(one.folder, copy, progress=progress), "copy") == loss(found, "copy")
    assert any("/nowhere/model" in line and "the base of the run" in line for line in progress.warned)
    with pytest.raises(UserError, match="copy: /nowhere/model"):
        score(copy, file=write_rows(tmp_path / "rows.jsonl", rows_of(3)))


@pytest.fixture(scope="module")
def other_base(tmp_path_factory, tokenizer):
    """Other weights, and a tokenizer that cuts words into single bytes, with another template."""
    import torch
    from conftest import TINY_LLAMA
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(8)
    folder = tmp_path_factory.mktemp("other-llama")
    known = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(known, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|im_end|>")
    made.chat_template = CHATML
    config = LlamaConfig(vocab_size=len(made), eos_token_id=made.eos_token_id, bos_token_id=None, **TINY_LLAMA)
    LlamaForCausalLM(config).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def test_models_with_other_tokenizers_are_asked_in_their_own_tokens_and_compared_by_character(one, other_base):
    progress = Remembers()
    found = score(one.folder, other_base, "base", progress=progress)
    run, other, base = found.models
    assert run.rendered is base.rendered is not other.rendered
    assert other.rendered.references == run.rendered.references
    assert other.tokens.sum() > run.tokens.sum()
    assert {"loss", "perplexity"} & found.parts[""].comparisons[other.name].keys() == set()
    assert {"loss", "loss-per-character"} <= found.parts[""].comparisons[run.name].keys()
    characters = sum(len(text) for text in run.rendered.references)
    measured = found.parts[""].scores[other.name]["loss-per-character"].measure.value
    assert measured == pytest.approx(other.nats.sum() / characters)
    assert found.parts[""].comparisons[other.name]["loss-per-character"].rows == 10
    assert any("are not compared" in note for note in found.notes) and found.notes == progress.warned


def test_the_same_rows_are_compared_where_one_tokenizer_drops_some(tmp_path, tiny_base, other_base):
    run = make_run(tmp_path, tiny_base, data={"max_length": 100})
    progress = Remembers()
    found = score(run.folder, other_base, progress=progress)
    first, other = found.models
    assert 0 < len(other.rendered.rows) < 10
    assert [row["where"] for row in first.rendered.rows] == [row["where"] for row in other.rendered.rows]
    assert any("not every model" in line for line in progress.warned)


def test_a_model_without_a_chat_template_gets_the_first_ones(one, tiny_base, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_base, bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    edit_json(bare / "tokenizer_config.json", chat_template=None)
    progress = Remembers()
    found = score(one.folder, bare, "base", progress=progress)
    assert loss(found, "bare") == pytest.approx(loss(found, "base"))
    assert found.models[1].rendered is found.models[0].rendered
    assert any("no chat template of its own" in line for line in progress.warned)
    with pytest.raises(UserError, match=r"has no chat template.*Give a run"):
        score(bare, file=write_rows(tmp_path / "rows.jsonl", rows_of(3)))


def test_rows_of_a_file_are_rendered_as_the_run_renders_its_own(one, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", rows_of(40)[30:])
    with_file, without = score(one.folder, file=rows), score(one.folder)
    assert loss(with_file, "adapter") == loss(without, "adapter")
    assert with_file.rows_used == f"10 rows: {rows}"
    assert "the first 4 of 10 rows" in score(one.folder, rows=4).rows_used


def test_scores_are_broken_down_by_task_and_by_source(tmp_path, tiny_base):
    tmp_path.joinpath("more").mkdir()
    write_rows(tmp_path / "more.jsonl", labelled_rows(12))
    sources = [{"path": "eval.jsonl", "task": "facts"}, {"path": "more.jsonl", "task": "kinds"}]
    run = make_run(tmp_path, tiny_base, data={"eval": sources})
    found = score(run.folder)
    base = found.baseline
    assert {"task facts", "task kinds"} < base.measures.keys() and len(base.measures) == 5
    facts, kinds = (base.measures[f"task {task}"]["rows"]["loss"] for task in ("facts", "kinds"))
    whole = base.measures[""]["rows"]["loss"]
    assert np.allclose(facts.rows.sum(0) + kinds.rows.sum(0), whole.rows.sum(0))
    assert found.parts["task facts"].scores["base"]["exact-match"].to_dict()["rows"] == 10
    assert found.parts["task kinds"].comparisons["adapter"]["loss"].rows == 12
    assert "kinds.label-accuracy" in found.parts[""].scores["base"]


def test_labels_are_scored_by_likelihood(tmp_path, tiny_base, other_base):
    write_rows(tmp_path / "labels.jsonl", labelled_rows(24))
    write_rows(tmp_path / "held.jsonl", labelled_rows(26)[24:])  # two labels of the three
    run = make_run(tmp_path, tiny_base, data={"train": "labels.jsonl", "eval": "held.jsonl"}, evaluate={"metrics": []})
    found = score(run.folder)
    base = found.baseline
    assert base.classifications[""].labels == ("fruit", "place", "thing") and base.answers == []
    likely = base.likelihoods[""]
    assert likely.shape == (2, 3) and (likely < 0).all()
    right = np.mean(likely.argmax(1) == [0, 1])
    assert base.scores["label-accuracy"] == right
    trained = found.models[1].likelihoods[""]
    assert np.exp(trained).sum() > np.exp(likely).sum()
    apart = score(run.folder, other_base)
    assert [model.classifications[""].labels for model in apart.models] == [("fruit", "place")] * 2
    assert apart.parts[""].comparisons[other_base.name]["label-accuracy"].rows == 2


def test_a_probe_is_asked_of_every_subject_while_its_model_is_there(one, two, loads):
    def probe(eval_model):
        model = eval_model.loader.model_of(eval_model.spec)
        return eval_model.spec.name, hasattr(model, "peft_config"), len(eval_model.rendered.rows)

    model_set = resolve_models([str(one.folder)], Silent())
    each, _ = render_for_models(model_set, None, Silent())
    loader, seen = inference.ModelLoader("cpu"), []
    for spec, rendered in zip(model_set.specs, each, strict=True):
        eval_model = inference.EvalModel(spec, rendered, loader, False, Silent())
        seen.append(score_model(eval_model, EvalSettings(), {}, None, probe).examined)
    assert seen == [("base", False, 10), ("adapter", True, 10)]
    assert len(loads) == 1


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["runs/nowhere"], "runs/nowhere: there is no such run"),
        (["./nowhere"], "there is no such run"),
        (["runs"], "runs: is not a run, an adapter or a model"),
        (["a.txt"], "a.txt: is not a run, an adapter or a model: a file"),
        (["base"], "'base' needs a run or an adapter beside it"),
        (["RUN", "RUN"], "is given twice"),
        (["RUN", "RUN/"], "is given twice"),
        (["RUN", "base", "RUN/adapter"], "run/adapter: is given twice"),
        (["no-org/no-model"], "could not find model no-org/no-model"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_a_sentence(one, given, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match=reason):
        resolve_models([name.replace("RUN", str(one.folder)) for name in given], Silent())
