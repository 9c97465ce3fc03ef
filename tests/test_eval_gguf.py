"""Promises of `lorakit eval` about GGUF files: llama.cpp's own figures beside those of the run."""

import json
import shutil

import numpy as np
import pytest
from conftest import CHATML, rows_of, write_rows
from eval_runs import Remembers, edit_json, labelled_rows, loss, make_run, score
from gguf_models import spm_base
from rank_processes import run_on

from lorakit.cli.export import open_source, parse_targets
from lorakit.distributed.processes import rank
from lorakit.errors import LorakitError, UserError
from lorakit.evaluate import forward, inference, llama_cpp_forward
from lorakit.evaluate.diagnosis.examination import create_examination
from lorakit.evaluate.models import resolve_models
from lorakit.evaluate.run import EvalSettings, score_models
from lorakit.export.conversion import run_converter
from lorakit.export.run import export as write_exports
from lorakit.model.gguf_file import read_gguf
from lorakit.model.gguf_tokenizer import missed_stops
from lorakit.model.llama_cpp import GgufModel
from lorakit.prepare import reopen_run
from lorakit.progress import Silent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    return make_run(folder, spm_base(folder / "base"))


@pytest.fixture(scope="module")
def export(run):
    """The run's model as a GGUF file of a type."""

    def of(word):
        folder = run.exports / f"gguf-{word}"
        if not folder.exists():
            with open_source(str(run.folder), None, None, Silent()) as source:
                write_exports(source, parse_targets([f"gguf:{word}"]), run.exports, False, Silent())
        return folder / f"tiny-{word.upper()}.gguf"

    return of


def test_llama_cpp_gives_the_losses_and_answers_of_torch(run, export):
    found = score(run.folder, export("f32"), "base")
    adapter, gguf, _ = found.models
    assert gguf.spec.kind == "gguf" and gguf.rendered is adapter.rendered
    np.testing.assert_allclose(gguf.nats, adapter.nats, rtol=1e-3)
    assert gguf.answers == adapter.answers and gguf.ended == adapter.ended
    assert loss(found, "base") != pytest.approx(loss(found, gguf.name), rel=1e-3)
    assert {"loss", "exact-match"} <= found.parts[""].comparisons[gguf.name].keys()
    named = {finding.name: finding.value for finding in found.findings[gguf.name]}
    assert named["chat template"] == named["tokens"] == named["stop tokens"] == 0


def test_a_file_is_scored_without_a_run_by_its_own_tokenizer_and_template(run, export, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", rows_of(40)[30:])
    alone, beside = score(export("f32"), file=rows), score(run.folder, export("f32"), file=rows)
    assert alone.model_set.run is None
    assert loss(alone, "tiny-F32.gguf") == pytest.approx(loss(beside, "run"), rel=1e-3)
    assert alone.models[0].answers


def test_likelihoods_of_labels_are_those_of_torch(run, export, tmp_path):
    rows = write_rows(tmp_path / "labels.jsonl", labelled_rows(12))
    found = score(run.folder, export("f32"), file=rows, metrics=())
    adapter, gguf = found.models
    assert gguf.likelihoods[""].shape[1] == 3
    np.testing.assert_allclose(gguf.likelihoods[""], adapter.likelihoods[""], rtol=1e-3)


def _scored_by_first(gguf, rows):
    def refuse(*given):
        pytest.fail("is loaded")

    if rank():
        inference.ModelLoader.model_of = refuse
    (model,) = score(gguf, file=rows).models
    return model.nats.tolist(), model.answers


@pytest.mark.slow
def test_of_several_processes_the_first_one_runs_the_file(export, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", rows_of(40)[30:])
    assert run_on(2, _scored_by_first, export("f32"), rows) == [_scored_by_first(export("f32"), rows)] * 2


def test_rows_and_prompts_are_computed_alike_alone_and_together(run, export, monkeypatch):
    together = score(export("f32"), run.folder).models[0]
    monkeypatch.setattr(llama_cpp_forward, "_SEQUENCES", 1)
    monkeypatch.setattr(llama_cpp_forward, "_LOGITS", 3 * 400)
    alone = score(export("f32"), run.folder).models[0]
    np.testing.assert_allclose(alone.nats, together.nats, rtol=1e-4)
    assert alone.answers == together.answers


def test_what_was_computed_is_not_computed_again(run, export, monkeypatch):
    first = score(run.folder, export("f32"), cache=True)
    monkeypatch.setattr("lorakit.evaluate.inference.ModelLoader.model_of", lambda *given: pytest.fail("is loaded"))
    again = score(run.folder, export("f32"), cache=True)
    np.testing.assert_array_equal(first.models[1].nats, again.models[1].nats)


def changed(file, target, **values):
    """A copy of a GGUF file with other metadata."""
    import gguf

    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = values.pop(name.replace(".", "_"), field.contents())
        if value is not None:
            of_list = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, value, field.types[0], sub_type=of_list)
    if "position_embd" in values:
        writer.add_tensor("position_embd.weight", values.pop("position_embd"))
    assert not values, values
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_another_chat_template_is_told_by_the_prompts_that_it_writes_otherwise(run, export, tmp_path):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}assistant: "
    other = changed(export("f32"), tmp_path / "other.gguf", tokenizer_chat_template=template)
    named = {finding.name: finding for finding in score(run.folder, other).findings["other.gguf"]}
    assert named["chat template"].value == 1 and named["chat template"].flagged
    assert not named["tokens"].flagged
    # Other words, the same prompts: nothing to look at.
    same = changed(export("f32"), tmp_path / "same.gguf", tokenizer_chat_template=CHATML + "{# a remark #}")
    named = {finding.name: finding for finding in score(run.folder, same).findings["same.gguf"]}
    assert named["chat template"].value == 0 and not named["chat template"].details["same text"]


def test_a_file_with_another_vocabulary_is_asked_in_its_own_tokens(run, export, tmp_path):
    tokens = read_gguf(export("f32")).tokens
    tokens[300:] = reversed(tokens[300:])
    other = changed(export("f32"), tmp_path / "other.gguf", tokenizer_ggml_tokens=tokens)
    found = score(run.folder, other)
    assert found.models[1].rendered is not found.models[0].rendered
    assert "loss" not in found.parts[""].comparisons["other.gguf"]


def test_a_file_of_another_adapter_is_told(run, export, tmp_path):
    folder = shutil.copytree(export("f32").parent, tmp_path / "gguf")
    edit_json(folder / "export.json", adapter_sha256="0" * 64)
    progress = Remembers()
    score(run.folder, folder / "tiny-F32.gguf", progress=progress)
    assert any("was exported from another adapter" in text for text in progress.warned)


def test_files_that_cannot_be_run_are_named(run, export, lorakit, tmp_path):
    def says(file):
        code, _, err = lorakit("eval", run.folder, file)
        assert code == 2, err
        return err

    assert "there is no such file" in says(tmp_path / "none.gguf")
    cut = tmp_path / "cut.gguf"
    for size in (5000, export("f32").stat().st_size - 9000):
        cut.write_bytes(export("f32").read_bytes()[:size])
        assert "cut.gguf" in says(cut)
    text = tmp_path / "text.gguf"
    text.write_text("not a model")
    assert "not a readable GGUF file" in says(text)
    adapter = changed(export("f32"), tmp_path / "adapter.gguf", general_type="adapter")
    assert "is an adapter alone" in says(adapter)
    code, _, err = lorakit("benchmark", run.folder, export("f32"), "--tasks", "x")
    assert code == 2 and "not on GGUF files" in err


def test_an_architecture_that_llama_cpp_lacks_is_named(run, export, lorakit, tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "new.gguf", "newllama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    code, _, err = lorakit("eval", run.folder, tmp_path / "new.gguf")
    assert code == 2 and "unknown model architecture" in err and "newllama" in err


@pytest.mark.slow
def test_the_document_says_what_the_file_is(run, export, lorakit):
    code, out, err = lorakit("eval", run.folder, export("q8_0"), "--json")
    assert code == 0, err
    facts = json.loads(out)["models"]["tiny-Q8_0.gguf"]
    assert facts["kind"] == "gguf" and facts["quantization"] == "Q8_0" and facts["file"]["bytes"] > 0
    assert len(facts["identity"]["gguf"][0]) == 64


@pytest.mark.slow
def test_models_without_keys_and_values_share_beginnings_too(tmp_path):
    """Mamba's state is copied whole, where a transformer's keys and values are shared."""
    from transformers import LlamaTokenizer, MambaConfig, MambaForCausalLM

    folder = spm_base(tmp_path / "mamba")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    vocabulary = len(LlamaTokenizer.from_pretrained(folder))
    sizes = {"vocab_size": vocabulary, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16}
    model = MambaForCausalLM(MambaConfig(**sizes, bos_token_id=1, eos_token_id=4, pad_token_id=0)).eval()
    model.save_pretrained(folder)
    (folder / "tokenizer.json").unlink()  # by which the converter would take it for BPE
    run_converter("model", folder, tmp_path / "mamba.gguf", None, "--outtype", "f32")
    random = np.random.default_rng(0)
    texts = [[*range(20, 40), *random.integers(20, 300, 4 + at).tolist()] for at in range(20)]
    rows = [{"input_ids": ids, "labels": [-100] * 21 + ids[21:]} for ids in texts]
    labels = [(50,), (60, 70), (60, 80, 90)]
    with GgufModel(tmp_path / "mamba.gguf") as gguf:
        losses = llama_cpp_forward.row_losses(gguf, rows, 0, "loss", Silent())
        scores = llama_cpp_forward.label_loglikelihoods(gguf, texts[:3], labels, 0, Silent())
    np.testing.assert_allclose(losses, forward.row_losses(model, rows, 0, "loss", Silent()), rtol=1e-3)
    np.testing.assert_allclose(scores, forward.label_loglikelihoods(model, texts[:3], labels, 0, Silent()), rtol=1e-3)


def test_answers_end_where_a_model_has_no_more_embeddings_of_positions(export):
    with GgufModel(export("f32"), limit=30) as model:
        answers = llama_cpp_forward.greedy_answers(model, [[*range(20, 45)], [30, 31]], [], 12, 0, "", Silent())
        assert [len(answer.tokens) for answer in answers] == [6, 12] and not any(one.ended for one in answers)
        with pytest.raises(UserError, match="a prompt of 31 tokens is more than the model's 30 positions"):
            llama_cpp_forward.greedy_answers(model, [[*range(20, 51)]], [], 12, 0, "", Silent())


def test_positions_with_embeddings_are_a_limit_and_rotations_are_none(export, tmp_path):
    assert not read_gguf(export("f32")).positions.hard
    learned = changed(export("f32"), tmp_path / "learned.gguf", position_embd=np.zeros((256, 256), np.float32))
    assert read_gguf(learned).positions.hard and read_gguf(learned).positions.limit == 256


def test_tokens_at_which_llama_cpp_goes_on_are_known(run, export):
    ends = reopen_run(run.folder, Silent())[1].stop_ids
    with GgufModel(export("f32")) as model:
        assert missed_stops(model, [*ends, 20]) == [20]


def test_a_row_that_memory_cannot_hold_is_told(export):
    with (
        GgufModel(export("f32")) as model,
        pytest.raises(LorakitError, match=r"out of memory on one row.*shorter rows"),
    ):
        llama_cpp_forward.greedy_answers(model, [[20, 21]], [], 1 << 40, 0, "", Silent())


@pytest.mark.slow
def test_base_files_are_known_to_be_about_forgetting_only_where_they_are_of_the_run(run, export, tmp_path):
    alone = shutil.copy(export("f32"), tmp_path / "sent.gguf")  # without its export.json
    found = score_diagnosed(run, export("f32"), alone)
    ours, sent = ({finding.name for finding in found.findings[name]} for name in ("tiny-F32.gguf", "sent.gguf"))
    assert {"forgetting", "parroting"} <= ours and not {"forgetting", "parroting"} & sent
    by_torch = next(one for one in found.findings["run"] if one.name == "forgetting")
    by_llama = next(one for one in found.findings["tiny-F32.gguf"] if one.name == "forgetting")
    assert by_llama.value == pytest.approx(by_torch.value, rel=1e-2)


def score_diagnosed(run, *files):
    """The run, its base and files, with what `--diagnose` measures."""
    model_set = resolve_models(["base", str(run.folder), *map(str, files)], Silent())
    settings = EvalSettings(("exact-match",), 4, cache=False)
    return score_models(model_set, None, settings, Silent(), create_examination(model_set))
