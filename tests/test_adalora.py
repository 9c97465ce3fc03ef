"""AdaLoRA: directions are taken away where they matter least, until the budget holds, and stay away."""

from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_LLAMA
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lorakit.model.adapters import AdaLora, _svd
from lorakit.model.adapters.svd import AdaLoraScheduler, orthogonality, svd_modules, svd_to_lora
from lorakit.model.loss import supervised_loss
from lorakit.registry import ADAPTERS

STEPS, RANK, FIRST = 20, 4, 6
PATHS = [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")]


def adapted(base, paths=PATHS, rank=RANK, first=FIRST, whole=()):
    """A base with a fresh adapter of the SVD form, the same at every call."""
    torch.manual_seed(5)
    settings = SimpleNamespace(rank=rank, alpha=8.0, dropout=0.0)
    return get_peft_model(
        base, _svd(settings, SimpleNamespace(modules=paths, whole=list(whole), tied=False, tokens={}), first)
    )


def tiny_llama(**more):
    torch.manual_seed(7)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **TINY_LLAMA, **more)).requires_grad_(False)


def optimizer_of(model, rate=5e-2):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0, fused=True)


def train(model, scheduler, optimizer, steps, watch=lambda step: None):
    """Some steps as the trainer makes them; the losses without the penalty."""
    losses = []
    ids = torch.arange(48).reshape(4, 12) * 7 % 64
    for step in steps:
        total, count = supervised_loss(model, ids, torch.ones_like(ids), ids)
        loss = total / count
        (loss + scheduler.penalty()).backward()
        optimizer.step()
        scheduler.after_step(step, optimizer)
        optimizer.zero_grad()
        losses.append(loss.item())
        watch(step)
    return losses


def ranks_of(model):
    return [int((module.e != 0).sum()) for module in svd_modules(model)]


def logits_of(model):
    """In training mode, as bitsandbytes computes otherwise in evaluation: there is no dropout."""
    with torch.no_grad():
        return model.train()(input_ids=torch.arange(20)[None]).logits


def saved(model, folder):
    """The adapter folder that `svd_to_lora` makes of a model."""
    config, weights = svd_to_lora(model)
    folder.mkdir()
    config.save_pretrained(folder)
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def test_ranks_really_shrink_to_the_budget_and_stay():
    model = adapted(tiny_llama())
    scheduler, sums = AdaLoraScheduler(model, AdaLora(), STEPS), []
    losses = train(
        model, scheduler, optimizer_of(model), range(1, STEPS + 1), lambda _: sums.append(sum(ranks_of(model)))
    )
    assert sums[2] == FIRST * len(PATHS) > sums[3] > sums[8] > sums[13] == RANK * len(PATHS)
    assert set(sums[13:]) == {RANK * len(PATHS)}
    assert len(set(ranks_of(model))) > 1
    assert losses[-1] < losses[0] - 0.1


def test_a_direction_taken_away_stays_away():
    model, kept = adapted(tiny_llama()), []
    scheduler = AdaLoraScheduler(model, AdaLora(), STEPS)
    note = lambda _: kept.append([(module.e != 0).flatten().tolist() for module in svd_modules(model)])  # noqa: E731
    train(model, scheduler, optimizer_of(model), range(1, STEPS + 1), note)
    assert all(later == kept[13] for later in kept[13:])
    assert kept[13] != kept[8]


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_the_shortest_runs_end_at_the_budget(steps):
    model = adapted(tiny_llama())
    train(model, AdaLoraScheduler(model, AdaLora(), steps), optimizer_of(model), range(1, steps + 1))
    assert sum(ranks_of(model)) == RANK * len(PATHS)


def test_a_module_that_matters_keeps_its_rank_and_one_that_does_not_loses_it():
    base = tiny_llama()
    with torch.no_grad():
        base.model.layers[0].self_attn.o_proj.weight.zero_()  # whatever this attention does is thrown away
    needless, needed = PATHS[0], PATHS[5]
    model = adapted(base, [needless, needed], rank=3, first=6)
    settings = AdaLora(orthogonality=0)  # as published, the penalty's gradient counts as importance too
    train(model, AdaLoraScheduler(model, settings, STEPS), optimizer_of(model), range(1, STEPS + 1))
    assert ranks_of(model) == [0, 6]


@pytest.mark.parametrize("stop", [5, 10, 16])
def test_going_on_from_a_state_equals_never_having_stopped(tmp_path, stop):
    whole = adapted(tiny_llama())
    train(whole, AdaLoraScheduler(whole, AdaLora(), STEPS), optimizer_of(whole), range(1, STEPS + 1))
    first = adapted(tiny_llama())
    scheduler, optimizer = AdaLoraScheduler(first, AdaLora(), STEPS), optimizer_of(first)
    train(first, scheduler, optimizer, range(1, stop + 1))
    second = adapted(tiny_llama())
    resumed, again = AdaLoraScheduler(second, AdaLora(), STEPS), optimizer_of(second)
    weights = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    save_file(scheduler.state(), tmp_path / "driver")
    resumed.restore(load_file(tmp_path / "driver"), weights)
    second.load_state_dict(weights)
    again.load_state_dict(optimizer.state_dict())
    train(second, resumed, again, range(stop + 1, STEPS + 1))
    wanted, found = get_peft_model_state_dict(whole), get_peft_model_state_dict(second)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_more_directions_than_the_budget_are_asked_for():
    ((_, reason, remedy),) = ADAPTERS["adalora"].mistakes(AdaLora(initial_rank=RANK), SimpleNamespace(rank=RANK))
    assert reason.startswith(f"{RANK} is not above adapter.rank, {RANK}") and remedy == f"Write {RANK + 1} or more."


def test_a_step_whose_gradients_overflowed_is_not_taken_note_of():
    model = adapted(tiny_llama())
    scheduler, optimizer = AdaLoraScheduler(model, AdaLora(), STEPS), optimizer_of(model)
    train(model, scheduler, optimizer, [1])
    for part in model.parameters():
        part.grad = torch.full_like(part, torch.inf) if part.requires_grad else None
    scheduler.after_step(2, optimizer)
    assert all(tensor.isfinite().all() for tensor in scheduler.state().values())


def test_the_penalty_is_the_published_one():
    modules = svd_modules(adapted(tiny_llama()))
    grams = [gram for module in modules for gram in (module.a @ module.a.T, module.b.T @ module.b)]
    published = sum(torch.norm(gram - torch.eye(len(gram))) for gram in grams) / len(grams)
    assert torch.isclose(orthogonality(modules), published)
    for part in (modules[0].a, modules[0].b):
        ours, theirs = (
            torch.autograd.grad(one, part, retain_graph=True)[0] for one in (orthogonality(modules), published)
        )
        assert torch.allclose(ours, theirs, atol=1e-8)


def test_orthonormal_directions_have_no_penalty():
    (module,) = svd_modules(adapted(tiny_llama(), PATHS[:1]))
    module.a.data, module.b.data = torch.eye(FIRST, 32), torch.eye(32, FIRST)
    penalty = orthogonality([module])
    assert penalty == 0
    assert not torch.autograd.grad(penalty, module.a)[0].any()


@pytest.mark.parametrize(
    "quantization", [{}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}]
)
def test_plain_peft_loads_what_was_trained(tmp_path, quantization):
    tiny_llama().save_pretrained(tmp_path / "base")
    given = {"quantization_config": BitsAndBytesConfig(**quantization), "device_map": "cpu"} if quantization else {}
    load = lambda: LlamaForCausalLM.from_pretrained(tmp_path / "base", **given).requires_grad_(False)  # noqa: E731
    model = adapted(load(), whole=["lm_head"])
    before = logits_of(model)
    train(model, AdaLoraScheduler(model, AdaLora(), STEPS), optimizer_of(model), range(1, STEPS + 1))
    folder = saved(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(), folder)
    effect = (logits_of(model) - before).abs().max()
    assert effect > 0.1
    assert (logits_of(loaded) - logits_of(model)).abs().max() < 1e-5 * effect.clamp(min=1)


def test_plain_peft_loads_layers_of_gpt2(tmp_path):
    def base():
        torch.manual_seed(3)
        config = GPT2Config(
            vocab_size=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=32,
            bos_token_id=None,
            eos_token_id=None,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
        return GPT2LMHeadModel(config).requires_grad_(False)

    model = adapted(base(), [f"transformer.h.{i}.{name}" for i in (0, 1) for name in ("attn.c_attn", "mlp.c_proj")])
    train(model, AdaLoraScheduler(model, AdaLora(), STEPS), optimizer_of(model), range(1, STEPS + 1))
    loaded = PeftModel.from_pretrained(base(), saved(model, tmp_path / "adapter"))
    assert (logits_of(model) - logits_of(base())).abs().max() > 0.1
    assert torch.allclose(logits_of(loaded), logits_of(model), atol=1e-5)


def test_an_untrained_adapter_is_a_plain_one_that_adds_nothing(tmp_path):
    loaded = PeftModel.from_pretrained(tiny_llama(), saved(adapted(tiny_llama()), tmp_path / "adapter"))
    assert torch.equal(logits_of(loaded), logits_of(tiny_llama()))
