"""The work of a run is counted from what is trained: which blocks, and by which kind of adapter."""

import pytest

from lorakit.hardware.gpus import find_gpu
from lorakit.hardware.machine import cpu_throughput, gpu_throughput
from lorakit.plan.memory import size_run
from lorakit.plan.model_info import find_model_info
from lorakit.plan.runtime import Workload, run_workload, training_seconds
from lorakit.recipe.schema import Adapter, Data, Model, Recipe, Train

SMOL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TWO_CORES = cpu_throughput(275e9, 27e9)


def counted(
    adapter: dict,
    checkpointing: bool = False,
    dtype: str = "float32",
    base: str = SMOL,
    rows: int = 8,
    length: int = 59,
) -> Workload:
    """A step of so many rows at once, counted as a plan counts it."""
    recipe = Recipe(
        model=Model(base=base, dtype=dtype),
        data=Data(train="a/b"),
        adapter=Adapter(**adapter),
        train=Train(batch_size=rows),
    )
    facts = find_model_info(base, "main")
    return run_workload(size_run(recipe, facts, facts.spec, False), 1, checkpointing, length=length, trained=1.0)


def times_lora(adapter: dict, checkpointing: bool = False, **given) -> float:
    """Its time on two cores, over that of a LoRA on every linear layer."""
    changed, plain = counted(adapter, checkpointing, **given), counted({}, **given)
    return training_seconds(changed, TWO_CORES).likely / training_seconds(plain, TWO_CORES).likely


def test_a_gradient_goes_back_no_further_than_the_first_trained_block():
    assert times_lora({"layers": [29]}) < 0.55
    assert times_lora({"layers": [29]}) < times_lora({"layers": ["15-29"]}) < times_lora({"layers": ["1-29"]}) < 1
    assert times_lora({"layers": [0]}) > 0.85, "it goes back through every block"
    assert times_lora({"layers": [29]}, True) == pytest.approx(times_lora({"layers": [29]}), rel=0.05)
    assert times_lora({}, True) > 1.25


def test_full_fine_tuning_of_some_layers_computes_their_gradients_alone():
    assert times_lora({"kind": "none", "layers": [29]}) < 0.6 < 1 < times_lora({"kind": "none"})
    last, mlp, every = (counted({"kind": "none"} | some) for some in ({"layers": [29]}, {"targets": "mlp"}, {}))
    assert (last.layers_back, mlp.layers_back, every.layers_back) == (1, 30, 30)
    assert last.trained_body == every.trained_body / 30 and last.trained_body < mlp.trained_body < every.trained_body
    assert (last.trained_head, every.trained_head) == (False, True)


def test_dora_takes_what_it_was_measured_to_take():
    """docs/benchmarks.md: 12 to 16 % of a plain LoRA's step; docs/adapters.md: a factor of 1.12, in nf4 1.07."""
    for rows, length in ((8, 59), (1, 512), (4, 512)):
        assert 1.03 < times_lora({"kind": "dora"}, rows=rows, length=length) < 1.2
    assert times_lora({"kind": "dora", "dropout": 0.1}) > times_lora({"kind": "dora"}) + 0.3, "W x is computed twice"


def test_dora_takes_its_norms_once_a_micro_batch_in_half_precision_too():
    """Rank 32 on q and v of Llama 3.2 3B: what is computed twice with checkpointing is the scaled outputs alone."""
    rates, chosen = gpu_throughput(find_gpu("L40S"), "bfloat16"), {"rank": 32, "targets": ["q_proj", "v_proj"]}
    lora, lora_again, dora, dora_again = (
        training_seconds(
            counted(chosen | {"kind": kind}, again, "bfloat16", "meta-llama/Llama-3.2-3B", 4, 210), rates
        ).likely
        for kind in ("lora", "dora")
        for again in (False, True)
    )
    assert 0 < dora - lora < dora_again - lora_again < 1.5 * (dora - lora)
