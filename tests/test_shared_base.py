"""Promises of a base that serves many: what is computed on it does not depend on what was put on it before."""

import random
import shutil

import pytest
import torch
from conftest import TINY_LLAMA, rows_of, write_rows
from eval_runs import edit_json, make_run, score
from peft_adapters import KINDS, save_peft_adapter
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lorakit.evaluate import inference as cache
from lorakit.evaluate.inference import ModelLoader
from lorakit.evaluate.models import resolve_models
from lorakit.evaluate.rating.sheet import answer_questions, read_questions
from lorakit.evaluate.run import default_settings
from lorakit.model.adapters import InitContext
from lorakit.model.load import load_model
from lorakit.model.peft_adapter import (
    SharedBase,
    attach_adapter,
    fingerprint_of,
    load_adapter,
    save_adapter,
    trained_weights,
)
from lorakit.model.resolve import resolve_base
from lorakit.model.targets import select_targets
from lorakit.progress import Silent
from lorakit.recipe.schema import Adapter, Model

IDS = torch.tensor([[5, 6, 7, 3, 9, 30]])


@pytest.fixture(scope="module")
def tied_base(tmp_path_factory, tokenizer):
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("tied")
    config = LlamaConfig(
        vocab_size=len(tokenizer), tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, **TINY_LLAMA
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def reader(folder):
    settings = Model(base=str(folder), dtype="float32", attention="sdpa")
    return lambda: load_model(resolve_base(str(folder), "main", Silent()), settings, "cpu")


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module", params=["untied", "tied"])
def base(request, tiny_base, tied_base):
    return tiny_base if request.param == "untied" else tied_base


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """An adapter of every kind of PEFT's, and of every kind of ours beside whole modules."""
    folder, made = tmp_path_factory.mktemp("adapters"), {}
    for number, (name, config) in enumerate(KINDS.items()):
        made[name] = save_peft_adapter(base, folder / str(number), config(), seed=number)
    for kind in ("lora", "dora", "rslora", "pissa", "olora"):
        settings = Adapter(kind=kind, rank=4, train_modules=["lm_head"])
        model = reader(base)()
        targets = select_targets(model, settings)
        adapted = attach_adapter(model, settings, 0, targets, InitContext(None, None, Silent()))
        for tensor in trained_weights(adapted).values():
            tensor.add_(0.1 * torch.randn_like(tensor))
        made[f"our {kind}"] = folder / f"our-{kind}"
        save_adapter(adapted, made[f"our {kind}"])
    return made


def test_what_an_adapter_computes_does_not_depend_on_those_before_it(base, adapters):
    shared, load = SharedBase(reader(base)), reader(base)
    alone = {name: logits(load_adapter(load(), folder)) for name, folder in adapters.items()} | {None: logits(load())}
    assert len({tensor.sum().item() for tensor in alone.values()}) == len(alone)
    order = [name for name in adapters for name in (name, None)]
    for name in [*order, *random.Random(0).sample(order, len(order))]:
        assert torch.equal(logits(shared.model_with(name and adapters[name])), alone[name]), name
    for name in random.Random(1).sample(list(adapters), len(adapters)):
        copied = load_adapter(shared.copied(), adapters[name])
        assert torch.equal(logits(copied), alone[name]), name
        copied.config.use_cache = not copied.config.use_cache
    assert torch.equal(logits(shared.copied()), alone[None])


def test_a_base_that_comes_back_as_it_was_is_not_read_again(tiny_base, tmp_path):
    read, times = reader(tiny_base), []
    shared = SharedBase(lambda: times.append(1) or read())
    folders = [save_peft_adapter(tiny_base, tmp_path / name, KINDS[name](), 1) for name in ("lora", "dora", "rslora")]
    for folder in (None, *folders, None):
        logits(shared.model_with(folder))
    assert len(times) == 1
    shared.model_with(save_peft_adapter(tiny_base, tmp_path / "head", KINDS["head"]()))
    shared.model_with(folders[0])
    assert len(times) == 2
    for folder in folders:
        logits(load_adapter(shared.copied(), folder))
    assert len(times) == 3
    first = logits(shared.copied())
    next(shared.copied().parameters())[0, 0] += 1
    assert torch.equal(logits(shared.copied()), first) and len(times) == 4


def test_the_fingerprint_tells_every_bit_every_tie_every_module_and_the_config(tied_base):
    model = AutoModelForCausalLM.from_pretrained(tied_base, dtype=torch.bfloat16)
    first = fingerprint_of(model)
    assert fingerprint_of(AutoModelForCausalLM.from_pretrained(tied_base, dtype=torch.bfloat16)) == first
    for tensor in [*model.parameters(), *model.buffers()]:
        bits = tensor.data.view(torch.uint8).view(-1)
        for at in {0, bits.numel() // 2, bits.numel() - 1}:
            bits[at] ^= 1
            assert fingerprint_of(model) != first
            bits[at] ^= 1
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.flip(0)
    assert fingerprint_of(model) != first
    weight.data = weight.data.flip(0)
    assert fingerprint_of(model) == first
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    assert fingerprint_of(model) != first
    model.tie_weights()
    handle = model.model.norm.register_forward_hook(lambda *_: None)
    assert fingerprint_of(model) != first
    handle.remove()
    model.config.rms_norm_eps *= 2
    assert fingerprint_of(model) != first


@pytest.fixture(scope="module")
def trained_head(tmp_path_factory, tiny_base):
    """A run whose head is trained whole, and one that is not."""
    folder = tmp_path_factory.mktemp("runs")
    head = make_run(folder / "head", tiny_base, adapter={"rank": 4, "alpha": 8, "train_modules": ["lm_head"]})
    return head, make_run(folder / "plain", tiny_base, train={"seed": 7})


def losses(found):
    return {model.spec.given: model.nats.tolist() for model in found.models}


def test_runs_are_scored_alike_in_any_order_and_alone(trained_head, tmp_path, tiny_base):
    head, plain = (run.folder for run in trained_head)
    foreign = save_peft_adapter(tiny_base, tmp_path / "foreign", KINDS["pissa of random parts"]())
    file = write_rows(tmp_path / "rows.jsonl", rows_of(6))
    one = losses(score(head, foreign, plain, file=file))
    other = losses(score(plain, foreign, head, file=file))
    alone = [losses(score(plain, "base", file=file)), losses(score(foreign, "base", file=file))]
    assert one == other
    for found in alone:
        assert all(one[name] == nats for name, nats in found.items() if name != "base")


def test_questions_are_answered_on_an_untouched_base(trained_head, tmp_path, tiny_base):
    plain = str(trained_head[1].folder)
    head = str(save_peft_adapter(tiny_base, tmp_path / "head", KINDS["head"](), strength=1))
    questions = write_rows(tmp_path / "questions.jsonl", [{"prompt": f"Tell of lamps, number {n}."} for n in "12"])

    def answers(*given):
        model_set = resolve_models(given, Silent())
        tokens = default_settings(model_set.prepared).max_new_tokens
        return answer_questions(model_set, read_questions(questions), tokens, False, Silent())

    one, other = answers(head, plain), answers(plain, head)
    assert one == other and len(set(map(tuple, one.values()))) == 2


def test_bases_of_the_same_weights_and_another_config_are_not_one(trained_head, tiny_base, tmp_path, loads):
    other = shutil.copytree(tiny_base, tmp_path / "other")
    edit_json(other / "config.json", rms_norm_eps=0.5)
    model_set = resolve_models([str(tiny_base), str(other)], Silent())
    loaded = ModelLoader("cpu")
    first, second = (logits(loaded.model_of(spec)) for spec in model_set.specs)
    assert len(loads) == 2 and not torch.equal(first, second)


def test_caches_of_older_versions_are_not_read(monkeypatch, tmp_path):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    now = cache.open_cache("losses", {"base": "x"})
    now.add({"row": 1.0})
    assert cache.open_cache("losses", {"base": "x"}).lines == {"row": 1.0}
    monkeypatch.setattr(cache, "_VERSION", cache._VERSION - 1)
    assert cache.open_cache("losses", {"base": "x"}).lines == {}
