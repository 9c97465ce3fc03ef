"""Activations that wait in main memory: the same gradients, each tensor sent once, and nothing left behind. On a
processor there is no other memory to send them to: copies stand for those in main memory."""

from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from lorakit.errors import UserError
from lorakit.hardware.gpus import find_gpu
from lorakit.hardware.machine import Machine, machine_with
from lorakit.plan.auto import resolve_auto
from lorakit.plan.changes import memory_reductions
from lorakit.plan.estimate import RowEstimate, plan_run
from lorakit.plan.model_info import find_model_info
from lorakit.plan.runtime import training_seconds
from lorakit.prepare import prepare_run
from lorakit.progress import Silent
from lorakit.recipe.load import RecipeErrors, load
from lorakit.recipe.schema import Adapter, Data, Model, Recipe, Train
from lorakit.train import offloading
from lorakit.train.batch_layout import count_trained_tokens
from lorakit.train.micro_batching import MicroBatchRunner, compute_optimizations
from lorakit.train.offloading import keep_once, offload_activations
from lorakit.train.setup import set_up_training


class MainMemory:
    """Keeps copies, of which each may be taken out once, as the library's does."""

    def __init__(self) -> None:
        self.held: dict[int, torch.Tensor] = {}
        self.sent = self.bytes = 0

    def hooks(self, *_):
        return keep_once(self.keep, self.restore)

    def keep(self, tensor):
        self.sent, self.bytes = self.sent + 1, self.bytes + tensor.nbytes
        self.held[self.sent] = tensor.detach().clone()
        return self.sent

    def restore(self, handle):
        return self.held.pop(handle)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["pissa", "dora"])
def test_gradients_are_the_same_and_every_activation_comes_back(recipe_file, monkeypatch, kind, checkpointing):
    path = recipe_file(adapter={"kind": kind}, train={"gradient_checkpointing": checkpointing})
    prepared = prepare_run(load(path).recipe, Silent())
    runner = MicroBatchRunner(set_up_training(prepared, None, Silent()), prepared, Silent())
    rows, memory = [prepared.train.rows[at] for at in range(4)], MainMemory()
    monkeypatch.setattr(offloading, "library_hooks", memory.hooks)
    forward, found = runner.model.get_base_model().model.__dict__.get("forward"), []
    for on in (False, True):
        with compute_optimizations(runner.model, "float32"), offload_activations(runner.model, on):
            loss = runner.run_step(rows, count_trained_tokens(rows), 1)
            gradients = [weight.grad for weight in runner.model.parameters() if weight.grad is not None]
            found.append((runner.read_loss(loss)[0], gradients))
            runner.drop_gradients()
    assert found[0][0] == found[1][0]
    assert all(torch.equal(one, other) for one, other in zip(found[0][1], found[1][1], strict=True))
    assert memory.sent > (2 if checkpointing else 20) and memory.held == {}
    assert runner.model.get_base_model().model.__dict__.get("forward") is forward


def test_what_several_operations_save_is_sent_once():
    memory = MainMemory()
    shared, scale = torch.randn(64, 32), torch.randn(64, 32, requires_grad=True)
    with saved_tensors_hooks(*memory.hooks()):
        parts = [(shared * scale).sum() for _ in range(3)]
    other = torch.randn(64, 32)
    with saved_tensors_hooks(*memory.hooks()):
        parts.append((other * scale).sum())
    assert memory.sent == 2, "of four that were saved"
    sum(parts).backward()
    assert memory.held == {}
    assert torch.allclose(scale.grad, 3 * shared + other, atol=1e-5)


def test_a_tensor_that_is_changed_in_place_is_another():
    memory = MainMemory()
    weight, value = torch.ones(8, requires_grad=True), torch.zeros(8)
    with saved_tensors_hooks(*memory.hooks()):
        first = (value + 1) * weight
        second = value.add_(2) * weight
    (first + second).sum().backward()
    assert weight.grad.tolist() == [3.0] * 8


def recipe_with(**train) -> Recipe:
    return Recipe(
        model=Model(base="meta-llama/Llama-3.1-8B"), data=Data(train="a/b"), adapter=Adapter(), train=Train(**train)
    )


def test_it_is_refused_where_there_is_no_other_memory(recipe_file):
    for machine in (Machine("cpu", "a processor", 1 << 36, False), machine_with(find_gpu("M2 Max 64GB"))):
        with pytest.raises(UserError, match=r"train\.offload_activations: .* Write false"):
            resolve_auto(recipe_with(offload_activations=True), machine, None)
    with pytest.raises(RecipeErrors, match="Write offload_activations: false, or sharding: none"):
        load(recipe_file(), ["train.offload_activations=true", "train.sharding=fsdp"])
    info = find_model_info("meta-llama/Llama-3.1-8B", "main")
    resolve_auto(recipe_with(offload_activations=True), machine_with(find_gpu("RTX 4090")), info)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_planner_takes_them_off_the_card_and_reckons_with_the_way(checkpointing):
    """What autograd keeps of all blocks but the one that is computed goes to main memory, over PCIe and back."""
    card, info = machine_with(find_gpu("RTX 4090")), find_model_info("meta-llama/Llama-3.1-8B", "main")
    rows, plans = RowEstimate(1000, 0, 512, 512.0, 0.5, 0.0, "as given"), {}
    for on in (False, True):
        recipe = recipe_with(offload_activations=on, micro_batch=4, gradient_checkpointing=checkpointing)
        plans[on] = plan_run(recipe, info, rows, card)
    kept, sent = plans[False], plans[True]
    assert kept.offloaded == 0 < sent.offloaded
    assert sent.longest.total < kept.longest.total
    on_card = kept.load.memory(4, 512, checkpointing).activations - sent.load.memory(4, 512, checkpointing).activations
    assert on_card < sent.offloaded
    tokens = 4 * 512 * 4096 * 2  # hidden states of a micro-batch
    assert sent.offloaded == 32 * tokens if checkpointing else sent.offloaded > 32 * 10 * tokens
    assert sent.time.likely >= kept.time.likely
    slow = replace(sent.rates, link=1e9)
    assert training_seconds(sent.work, slow).likely >= 2 * sent.work.offloaded / 1e9 > sent.time.likely


def test_a_plan_that_does_not_fit_may_be_told_of_it():
    card, info = machine_with(find_gpu("RTX 4090")), find_model_info("meta-llama/Llama-3.1-8B", "main")
    plan = plan_run(recipe_with(), info, RowEstimate(1000, 0, 512, 512.0, 0.5, 0.0, "as given"), card)
    assert "train.offload_activations" in {change.key for change in memory_reductions(plan, info)}
    already = plan_run(recipe_with(offload_activations=True), info, plan.rows, card)
    assert "train.offload_activations" not in {change.key for change in memory_reductions(already, info)}
