"""Every adapter kind on every quantization that it goes with: trained, saved, loaded by plain PEFT, and merged."""

import json

import pytest
import torch
from conftest import rows_of
from peft import PeftModel
from runs_of_tests import losses, run_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorakit.train.run
from lorakit.merge.inputs import input_of_run
from lorakit.merge.run import merge
from lorakit.model.load import load_model
from lorakit.prepare import reopen_run
from lorakit.progress import Silent
from lorakit.registry import ADAPTERS, QUANTIZERS

PAIRS = [
    (kind.name, quantization)
    for kind in ADAPTERS
    for quantization in QUANTIZERS.names()
    if quantization in (kind.quantizations or (quantization,))
]
# Their defaults are made for runs of a hundred steps and more.
WORDS = {
    "adalora": {"adalora": {"every": 1, "initial_rank": 6}},
    "flexlora": {"flexlora": {"every": 1, "moved": 2}},
    "eva": {"eva": {"converged": 0.9}},
}


@pytest.fixture
def trained(monkeypatch):
    """The models that runs trained, each with its frozen weights as they were before the first step."""
    seen = []
    begin = lorakit.train.run.set_up_training

    def watched(*args):
        begun = begin(*args)
        frozen = {
            name: tensor.detach().clone()
            for name, tensor in [*begun.model.named_parameters(), *begun.model.named_buffers()]
            if not tensor.requires_grad
        }
        seen.append((begun.model, frozen))
        return begun

    monkeypatch.setattr(lorakit.train.run, "set_up_training", watched)
    return seen


def ids_of(folder):
    row = rows_of(40)[31]["messages"]
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(row, return_tensors="pt")["input_ids"]


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize(("kind", "quantization"), PAIRS)
def test_every_kind_trains_and_plain_peft_loads_what_it_left(
    recipe_file, tmp_path, tiny_base, trained, kind, quantization
):
    adapter = {"kind": WORDS.get(kind, kind), "rank": 4, "alpha": 8}
    if kind == "none":
        adapter = {"kind": "none", "rank": ..., "alpha": ...}
    path = recipe_file(
        adapter=adapter,
        model={"quantization": quantization},
        train={"steps": 8, "epochs": None, "learning_rate": "auto", "save_every": 8, "eval_every": 8},
    )
    run, _ = run_recipe(path, tmp_path / "run")
    ((model, before),) = trained
    found = losses(run)
    assert found[-1] < found[0] - 0.02
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert all(torch.equal(tensor, after[name].detach()) for name, tensor in before.items())

    ids = ids_of(tiny_base)
    expected = logits(model, ids)
    prepared = reopen_run(run.folder, Silent())[1]
    base = load_model(prepared.base, prepared.model, "cpu")
    if kind == "none":
        again = AutoModelForCausalLM.from_pretrained(run.model)
    else:
        untrained = logits(base, ids)
        again = PeftModel.from_pretrained(base, run.adapter)
        config = json.loads((run.adapter / "adapter_config.json").read_text())
        assert (config["peft_type"], config["init_lora_weights"], config["inference_mode"]) == ("LORA", True, True)
        assert not torch.allclose(expected, untrained, atol=1e-3)
    assert torch.allclose(logits(again, ids), expected, atol=2e-5 * float(expected.abs().max()))
    assert run.read_manifest()["parameters"]["trainable"] > 0
    if kind != "none":
        proof = merge(input_of_run(run, prepared, Silent()), run.merged, Silent()).proof
        assert proof.max_logit_difference <= 1e-4 * proof.logit_scale
        merged = AutoModelForCausalLM.from_pretrained(run.merged, dtype=torch.float32)
        assert torch.allclose(logits(merged, ids), expected, atol=1e-4 * float(expected.abs().max()))
