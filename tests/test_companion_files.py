"""A model's configuration means the same to every release that reads it."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, Qwen2Config

from lorakit.model.companion_files import with_older_keys, write_companion_files

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        (Qwen2Config(rope_parameters={"rope_theta": 1e6, "rope_type": "default"}), None),
        (LlamaConfig(rope_parameters={"rope_theta": 1e6, **LLAMA3}), LLAMA3),
    ],
    ids=["plain", "scaled"],
)
def test_positions_are_told_under_the_names_of_older_releases_too(tmp_path, config, scaling):
    config.dtype = torch.bfloat16
    config.save_pretrained(tmp_path)
    written = with_older_keys(json.loads((tmp_path / "config.json").read_text()))
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert (written["rope_theta"], written["rope_scaling"], written["torch_dtype"]) == (1e6, scaling, "bfloat16")
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.rope_parameters == config.rope_parameters and again.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "names", [{"torch_dtype"}, {"dtype"}, {"dtype", "torch_dtype"}, set()], ids=lambda names: " ".join(sorted(names))
)
def test_another_type_of_the_weights_is_told_under_the_bases_own_name(tmp_path, tiny_base, tokenizer, names):
    base, out = tmp_path / "base", tmp_path / "out"
    out.mkdir()
    shutil.copytree(tiny_base, base)
    config = json.loads((base / "config.json").read_text())
    del config["dtype"]
    (base / "config.json").write_text(json.dumps(config | dict.fromkeys(names, "float32")))
    write_companion_files(base, tokenizer, [2], config | dict.fromkeys(names, "float32"), out, "bfloat16")
    written = json.loads((out / "config.json").read_text())
    assert written == config | dict.fromkeys(names or {"dtype"}, "bfloat16")
    assert AutoConfig.from_pretrained(out).dtype == torch.bfloat16
