"""What `auto` takes of gradient checkpointing and micro-batches is what the planner's own times say is faster."""

import itertools
from dataclasses import replace

import pytest

from lorakit.hardware.gpus import Gpu, find_gpu, match_gpu
from lorakit.hardware.machine import Machine, machine_with
from lorakit.plan.auto import resolve_auto
from lorakit.plan.estimate import Plan, RowEstimate, plan_run
from lorakit.plan.model_info import find_model_info
from lorakit.recipe.schema import Adapter, Data, Model, Recipe, Train

GIB = 1 << 30
LLAMA = "meta-llama/Llama-3.1-8B"
QWEN = "Qwen/Qwen2.5-1.5B-Instruct"


def planned(
    card: Gpu, base: str, length: int, mean: float, quantization: str = "none", trained: float = 0.5, **train
) -> Plan:
    recipe = Recipe(
        model=Model(base=base, quantization=quantization),
        data=Data(train="a/b", max_length=length),
        adapter=Adapter(),
        train=Train(**{"kernels": "off", **train}),  # whether they are installed here must not decide
    )
    rows = RowEstimate(1000, 0, length, mean, trained, 0.0, "as given")
    return plan_run(recipe, find_model_info(base, "main"), rows, machine_with(card))


def chosen(machine: Machine, base: str = LLAMA, length: int = 435, **train) -> dict:
    recipe = Recipe(
        model=Model(base=base), data=Data(train="a/b", max_length=length), train=Train(kernels="off", **train)
    )
    _, choices = resolve_auto(recipe, machine, find_model_info(base, "main"), length)
    return {choice.path: choice for choice in choices}


CARDS = ("4GB", "6GB", "RTX 4090", "A10", "21GB", "24GB", "26GB", "A100 40GB", "H100 SXM")


@pytest.mark.parametrize("gpu", CARDS)
@pytest.mark.parametrize(("base", "quantization"), [(LLAMA, "none"), (LLAMA, "nf4"), (QWEN, "none"), (QWEN, "nf4")])
@pytest.mark.parametrize(("length", "mean"), [(435, 150.0), (1024, 1024.0), (2048, 60.0)])
def test_auto_takes_what_is_planned_faster_of_what_fits(gpu, base, quantization, length, mean):
    card = find_gpu(gpu)
    both = [planned(card, base, length, mean, quantization, gradient_checkpointing=way) for way in (False, True)]
    fitting = [plan for plan in both if plan.fits == "yes"]
    found = planned(card, base, length, mean, quantization)
    if fitting:
        assert found.time.likely == min(plan.time.likely for plan in fitting)
    else:
        assert found.recipe.train.gradient_checkpointing is True, "the least memory"


def test_both_ways_are_taken_somewhere():
    """So that the test above is of a choice. On a fast card micro-batches of one short row wait for their kernels."""
    fast = replace(find_gpu("H100 SXM"), memory=20 * GIB)
    assert planned(fast, LLAMA, 435, 435.0).recipe.train.gradient_checkpointing is True
    assert planned(find_gpu("RTX 4090"), LLAMA, 435, 435.0).recipe.train.gradient_checkpointing is False


@pytest.mark.parametrize("gpu", ["RTX 4090", "L4", "H100 SXM"])
def test_more_memory_never_plans_slower(gpu):
    """With few trained tokens: the head of many is computed twice, which takes a hundredth more."""
    card = find_gpu(gpu)
    sizes = [replace(card, memory=memory * GIB) for memory in range(19, 81)]
    times = [planned(size, LLAMA, 435, 150.0, trained=0.05).time.likely for size in sizes]
    assert all(more <= less for less, more in itertools.pairwise(times))
    assert times[-1] < times[0]


def test_the_reason_is_the_comparison():
    reason = chosen(machine_with(find_gpu("RTX 4090")))["train.gradient_checkpointing"].reason
    assert reason == "2 rows at once without it is planned faster than 16 rows at once with it: x 0.71"


def test_a_card_that_is_here_chooses_as_it_is_planned(monkeypatch):
    """`lorakit check` and `lorakit train` ask the machine, `lorakit plan` the table."""
    for card in (find_gpu("RTX 4090"), find_gpu("A10")):
        here = Machine("cuda", card.name, card.memory, True, card=match_gpu(f"NVIDIA {card.name}", card.memory))
        planned_for = machine_with(card)
        assert here.card == card
        for name in ("train.gradient_checkpointing", "train.micro_batch"):
            assert chosen(here)[name].value == chosen(planned_for)[name].value


def test_a_card_that_is_not_known_chooses_as_one_of_its_memory():
    unknown, sized = Machine("cuda", "some GPU", 24 * GIB, bfloat16=True), machine_with(find_gpu("24GB"))
    for name in ("train.gradient_checkpointing", "train.micro_batch"):
        assert chosen(unknown)[name].value == chosen(sized)[name].value
    assert "for those of this card are not known" in chosen(unknown)["train.gradient_checkpointing"].reason


def test_a_processor_recomputes_only_where_not_one_row_fits():
    for memory, checkpointing in ((48, True), (56, False), (90, False)):
        found = chosen(Machine("cpu", "a processor", memory * GIB, bfloat16=False), length=1024)
        assert found["train.gradient_checkpointing"].value is checkpointing, memory


def test_a_micro_batch_that_is_written_is_made_to_fit():
    card = machine_with(find_gpu("RTX 4090"))
    assert chosen(card, micro_batch=2)["train.gradient_checkpointing"].value is False
    assert chosen(card, micro_batch=8)["train.gradient_checkpointing"].value is True
