"""`lorakit export --to gguf:TYPE`: what is written is read back, and refused where it is not what was trained."""

import json
import shutil
from pathlib import Path

import pytest
from eval_runs import edit_json, make_run
from gguf_models import spm_base

from lorakit.errors import UserError
from lorakit.model.gguf_file import read_gguf
from lorakit.model.llama_cpp import GgufModel, Token


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    return make_run(folder, spm_base(folder / "base"))


def copy_of(run, name):
    """The run without its merge, beside its rows."""
    return Path(shutil.copytree(run.folder, run.folder.parent / name, ignore=shutil.ignore_patterns("merged")))


@pytest.mark.slow
def test_types_are_read_back_and_nothing_falls_back_on_widths_of_256(run, lorakit, tmp_path):
    words = "gguf:f16,gguf:q8_0,gguf:q6_k,gguf:q4_k_m,gguf:q2_k"
    code, out, err = lorakit("export", run.folder, "--to", words, "--output", tmp_path, "--json")
    assert code == 0, err
    exports = {one["target"]: one for one in json.loads(out)["exports"]}
    assert exports["gguf:f16"]["formats"] == {"F16": 1.0}
    assert exports["gguf:q8_0"]["formats"] == {"Q8_0": 1.0}
    assert set(exports["gguf:q2_k"]["formats"]) <= {"Q2_K", "Q3_K", "Q4_K", "Q6_K"}
    assert all(
        one["fallback_share"] == 0 and all(check["holds"] for check in one["checks"]) for one in exports.values()
    )
    for target, one in exports.items():
        folder = tmp_path / target.replace(":", "-")
        document = json.loads((folder / "export.json").read_text())
        assert document["merge_proof"]["top1_agreement"] > 0.99 and document["sha256"].keys() > {one["file"]}
        assert sorted(document["files"]) == sorted(path.name for path in folder.iterdir())


def test_llama_cpp_begins_prompts_as_the_training_did(run, lorakit, tmp_path):
    code, _, err = lorakit("export", run.folder, "--to", "gguf:q8_0", "--output", tmp_path)
    assert code == 0 and "told not to begin prompts with <s>" in err
    with GgufModel(tmp_path / "gguf-q8_0" / "tiny-Q8_0.gguf") as model:
        assert model.opening == [] and model.tokenize_prompt("apples") == model.tokenize("apples")


@pytest.mark.slow
def test_llama_cpp_reads_each_added_token_as_one(lorakit, tmp_path):
    base = spm_base(tmp_path / "base")
    run = make_run(tmp_path, base, model={"base": str(base), "add_tokens": ["<topic>", "<|note|>"]}, train={"steps": 1})
    code, out, err = lorakit("export", run.folder, "--to", "gguf:q8_0", "--output", tmp_path / "out")
    assert code == 0 and "added tokens: <topic>, <|note|>" in out, err
    with GgufModel(tmp_path / "out" / "gguf-q8_0" / "tiny-Q8_0.gguf") as model:
        first, _, second, _ = model.tokenize("<topic>a<|note|>b")
        assert [model.piece(first), model.piece(second)] == ["<topic>", "<|note|>"]


# ggml-common.h: the bytes of a block over the numbers in it.
BITS = {"q8_0": 8.5, "q6_k": 6.5625, "q5_0": 5.5, "q4_0": 4.5}


@pytest.mark.slow
def test_a_file_takes_the_bits_of_its_format(lorakit, tmp_path):
    base = spm_base(tmp_path / "base", hidden_size=512, intermediate_size=1536, num_hidden_layers=4)
    words = ",".join(f"gguf:{word}" for word in (*BITS, "q4_k_m", "q2_k"))
    code, out, err = lorakit("export", base, "--to", words, "--output", tmp_path / "out", "--json")
    assert code == 0, err
    exports = {one["target"].partition(":")[2]: one for one in json.loads(out)["exports"]}
    assert not any(one["fallback_share"] for one in exports.values())
    matrices = sum(one.numbers for one in read_gguf(file_of(tmp_path, "q8_0")).tensors if one.dimensions > 1)
    for word, bits in BITS.items():
        assert exports[word]["bytes"] == pytest.approx(matrices * bits / 8, rel=0.02), word
    # Mixtures of several formats: llama.cpp's README has 4.8 to 4.9 and 2.6 to 3.4 bits for models of 7 and 8 billion.
    assert 4.5 < exports["q4_k_m"]["bits_per_weight"] < 5.6 and 2.6 < exports["q2_k"]["bits_per_weight"] < 3.8


def file_of(folder, word):
    return folder / "out" / f"gguf-{word}" / f"base-{word.upper()}.gguf"


def test_llama_cpp_predicts_what_the_merged_model_predicts(run, lorakit, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    code, _, err = lorakit("export", run.folder, "--to", "gguf:f32", "--output", tmp_path)
    assert code == 0, err
    model = AutoModelForCausalLM.from_pretrained(run.merged, dtype=torch.float32)
    ids = [5, 9, 40, 77, 120, 33]
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    with GgufModel(tmp_path / "gguf-f32" / "tiny-F32.gguf", exact=True) as loaded:
        loaded.reserve(64, 1)
        logits = loaded.decode([Token(0, at, token, True) for at, token in enumerate(ids)])
    assert abs(logits - expected).max() < 1e-4


def test_a_merge_without_a_proof_is_refused(run, lorakit):
    folder = copy_of(run, "unproved")
    assert lorakit("merge", folder, "--no-proof")[0] == 0
    code, _, err = lorakit("export", folder, "--to", "gguf:q8_0")
    assert code == 2 and "merged without a proof" in err and not (folder / "export" / "gguf-q8_0").exists()


def test_the_merge_of_another_adapter_is_refused(run, lorakit):
    folder = copy_of(run, "other")
    code, _, err = lorakit("merge", folder)
    assert code == 0, err
    edit_json(folder / "merged" / "merge.json", adapter_sha256="0" * 64)
    code, _, err = lorakit("export", folder, "--to", "gguf:q8_0")
    assert code == 2 and "is the merge of another adapter" in err


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("gguf", "gguf needs a type"),
        ("gguf:q4", "is not a type that gguf takes. Did you mean gguf:q4_"),
        ("ggfu:q8_0", "Did you mean gguf?"),
        ("gguf:q8_0,gguf:q8_0", "is there twice"),
    ],
)
def test_a_wrong_target_is_named_before_anything_is_read(lorakit, tmp_path, word, says):
    code, _, err = lorakit("export", tmp_path / "nothing", "--to", word)
    assert code == 2 and says in err


@pytest.mark.slow
def test_a_family_that_llama_cpp_lacks_is_named(lorakit, tmp_path):
    base = spm_base(tmp_path / "base")
    edit_json(base / "config.json", architectures=["UnknownForCausalLM"])
    code, _, err = lorakit("export", base, "--to", "gguf:f16", "--output", tmp_path / "out")
    assert code == 2 and "cannot convert this model" in err and not list((tmp_path / "out").glob("gguf*"))


@pytest.mark.slow
def test_a_file_that_is_cut_short_is_named(tmp_path, run, lorakit):
    assert lorakit("export", run.folder, "--to", "gguf:f16", "--output", tmp_path)[0] == 0
    file = tmp_path / "gguf-f16" / "tiny-F16.gguf"
    assert read_gguf(file).chat_template
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"llama\.cpp cannot load it"):
        GgufModel(file)
    with pytest.raises(UserError, match="not a readable GGUF file"):
        read_gguf(file)
