"""FlexLoRA: ranks move between modules, the model does not jump when they do, and the optimizer goes on."""

import pytest
import torch
from conftest import TINY_LLAMA
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_adalora import PATHS, STEPS, adapted, logits_of, optimizer_of, saved, tiny_llama, train

from lorakit.errors import UserError
from lorakit.model.adapters import FlexLora
from lorakit.model.adapters.svd import FlexLoraScheduler, entropy, svd_modules, svd_to_lora

RANK = 4
SETTINGS = FlexLora(moved=2)


def fresh(paths=PATHS):
    return adapted(tiny_llama(), paths, rank=RANK, first=RANK)


def ranks_of(model):
    return [len(module.e) for module in svd_modules(model)]


def with_energies(*energies):
    """A model whose modules hold these numbers in E."""
    model = fresh(PATHS[: len(energies)])
    for module, e in zip(svd_modules(model), energies, strict=True):
        module.e.data = torch.tensor(e)[:, None]
        module.a.data, module.b.data = module.a.data[: len(e)], module.b.data[:, : len(e)]
    return model


def stepped(model, moved, gradient=1.0):
    """One step of an optimizer at rate 0, and one move after it; the optimizer."""
    optimizer = optimizer_of(model, rate=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient) if parameter.requires_grad else None
    optimizer.step()
    FlexLoraScheduler(model, FlexLora(moved=moved, every=1, move_to=0.9), 10).after_step(5, optimizer)
    return optimizer


def test_ranks_really_move_and_their_sum_stays():
    model, seen = fresh(), []
    scheduler = FlexLoraScheduler(model, SETTINGS, STEPS)
    losses = train(model, scheduler, optimizer_of(model), range(1, STEPS + 1), lambda _: seen.append(ranks_of(model)))
    assert seen[2] == [RANK] * len(PATHS) != seen[3] != seen[8] != seen[13] == seen[-1]
    assert {sum(ranks) for ranks in seen} == {RANK * len(PATHS)}
    assert [module.layer.r["default"] for module in svd_modules(model)] == seen[-1]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_ranks_move_in_the_shortest_runs_too(steps):
    model = fresh()
    train(model, FlexLoraScheduler(model, SETTINGS, steps), optimizer_of(model), range(1, steps + 1))
    assert len(set(ranks_of(model))) > 1


def test_the_module_of_low_entropy_gives_and_the_one_of_high_entropy_gets():
    model = with_energies([0.9, 0.1, -0.1], [0.5, -0.5, 0.4], [0.6, 0.5, 0.2])
    stepped(model, moved=1)
    assert ranks_of(model) == [2, 4, 3]


def test_the_direction_given_up_is_the_one_of_smallest_size_whatever_its_sign():
    model = with_energies([-0.9, 0.02, 0.3], [0.5, 0.5])
    giver, taker = svd_modules(model)
    a, b = giver.a.detach().clone(), giver.b.detach().clone()
    stepped(model, moved=1)
    assert torch.allclose(giver.e.flatten(), torch.tensor([-0.9, 0.3]))
    assert torch.equal(giver.a, a[[0, 2]]) and torch.equal(giver.b, b[:, [0, 2]])
    assert torch.equal(taker.e.flatten(), torch.tensor([0.5, 0.5, 0.0]))


def test_entropy_is_defined_everywhere():
    assert entropy(torch.zeros(4, 1)) == 0
    assert entropy(torch.ones(1, 1)) == 0
    assert entropy(torch.tensor([[1e-3], [0.0], [0.0]])) == 0
    assert torch.isclose(entropy(torch.tensor([[0.2], [-0.2], [0.2]])), torch.tensor(1.0, dtype=torch.float64))


def test_a_module_keeps_its_last_direction_and_none_gets_beyond_full_rank():
    model = with_energies([0.5], [0.4])
    stepped(model, moved=1)
    assert ranks_of(model) == [1, 1]
    full = [0.5] * TINY_LLAMA["hidden_size"]
    model = with_energies([0.9, 0.1], full)
    stepped(model, moved=1)
    assert ranks_of(model) == [2, len(full)]


def test_a_new_direction_changes_nothing_and_has_the_scale_of_the_first_ones():
    model = with_energies([0.9, 0.0], [0.5, 0.5])
    before = logits_of(model)
    stepped(model, moved=1)
    taker = svd_modules(model)[1]
    assert torch.allclose(logits_of(model), before, atol=1e-6)
    assert 0.01 < taker.a[2].std() < 0.03
    assert 0.01 < taker.b[:, 2].std() < 0.03


def test_the_optimizer_keeps_what_it_knows_of_the_directions_that_stay():
    model = with_energies([0.9, 0.1, 0.3], [0.5, 0.5])
    giver, taker = svd_modules(model)
    optimizer = stepped(model, moved=1, gradient=2.0)
    for parameter in (giver.a, giver.e, giver.b, taker.a, taker.e, taker.b):
        state = optimizer.state[parameter]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
        assert torch.allclose(state["exp_avg_sq"], torch.tensor(0.004))
    assert torch.allclose(optimizer.state[giver.a]["exp_avg"], torch.tensor(0.2))
    assert torch.allclose(optimizer.state[taker.e]["exp_avg"].flatten(), torch.tensor([0.2, 0.2, 0.0]))


def test_training_goes_on_while_the_graph_of_the_last_step_lives():
    model = fresh()
    optimizer, ids = optimizer_of(model), torch.arange(12)[None]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    FlexLoraScheduler(model, SETTINGS, 1).after_step(1, optimizer)
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    assert loss.grad_fn is not None
    assert all(module.a.grad.shape == module.a.shape for module in svd_modules(model))


@pytest.mark.parametrize("stop", [2, 6, 16])
def test_going_on_from_a_state_equals_never_having_stopped(tmp_path, stop):
    whole = fresh()
    train(whole, FlexLoraScheduler(whole, SETTINGS, STEPS), optimizer_of(whole), range(1, STEPS + 1))
    first = fresh()
    scheduler, optimizer = FlexLoraScheduler(first, SETTINGS, STEPS), optimizer_of(first)
    train(first, scheduler, optimizer, range(1, stop + 1))
    save_file(scheduler.state(), tmp_path / "driver")
    second = fresh()
    resumed = FlexLoraScheduler(second, SETTINGS, STEPS)
    torch.manual_seed(99)
    weights = {name: parameter.detach().clone() for name, parameter in first.named_parameters()}
    resumed.restore(load_file(tmp_path / "driver"), weights)
    again = optimizer_of(second)
    second.load_state_dict(weights, strict=False)
    again.load_state_dict(optimizer.state_dict())
    train(second, resumed, again, range(stop + 1, STEPS + 1))
    assert ranks_of(second) == ranks_of(whole)
    for one, other in zip(svd_modules(whole), svd_modules(second), strict=True):
        assert torch.equal(one.a, other.a) and torch.equal(one.e, other.e) and torch.equal(one.b, other.b)


def test_plain_peft_loads_what_was_trained(tmp_path):
    model = fresh()
    train(model, FlexLoraScheduler(model, SETTINGS, STEPS), optimizer_of(model), range(1, STEPS + 1))
    loaded = PeftModel.from_pretrained(tiny_llama(), saved(model, tmp_path / "adapter"))
    assert (logits_of(model) - logits_of(tiny_llama())).abs().max() > 0.1
    assert torch.allclose(logits_of(loaded), logits_of(model), atol=1e-5)


def test_alpha_is_the_rank_in_every_module_of_the_plain_adapter():
    model = with_energies([0.9, 0.1, 0.3], [0.5])
    config, weights = svd_to_lora(model)
    assert config.r == config.lora_alpha == 3
    assert config.rank_pattern == config.alpha_pattern == {PATHS[1]: 1}
    assert weights[f"base_model.model.{PATHS[1]}.lora_A.weight"].shape == (1, TINY_LLAMA["hidden_size"])


def test_one_module_alone_is_refused():
    with pytest.raises(UserError, match=r"^adapter\.targets: flexlora moves ranks between modules"):
        FlexLoraScheduler(fresh(PATHS[:1]), SETTINGS, STEPS)
