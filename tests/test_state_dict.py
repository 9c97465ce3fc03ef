"""Promises of reading and writing a checkpoint one tensor at a time: what transformers reads is what we read."""

import pytest
import torch
from model_families import FAMILIES
from transformers import AutoModelForCausalLM

from lorakit.model.safetensors_io import read_tensor
from lorakit.model.state_dict import open_weights


def saved(family, folder, **options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family].config)
    model.save_pretrained(folder, **options)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_the_one_that_transformers_loads(family, tmp_path):
    model = saved(family, tmp_path, max_shard_size="20KB")
    weights = open_weights(tmp_path)
    assert not weights.unused
    state = model.state_dict()
    assert all(torch.equal(weights.read(path), value.float()) for path, value in state.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_goes_back_into_the_tensors_of_the_files(family, tmp_path):
    saved(family, tmp_path)
    weights = open_weights(tmp_path)
    for group in weights.groups:
        back = weights.names_in_files(group, weights.read_group(group))
        assert set(back) == set(group.names)
        for name, value in back.items():
            assert torch.equal(value.float(), read_tensor(weights.tensors[name]).float()), name
