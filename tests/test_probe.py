"""The probe tells what the longest micro-batch takes, and leaves nothing behind."""

import pytest
import torch
from test_out_of_memory import Small, small_memory  # noqa: F401 (a fixture)

from lorakit.errors import LorakitError
from lorakit.hardware import memory
from lorakit.hardware.memory import measure_peak
from lorakit.prepare import prepare_run
from lorakit.progress import Silent
from lorakit.recipe.load import load
from lorakit.train.micro_batching import MicroBatchRunner, compute_optimizations
from lorakit.train.preflight import describe_probe, probe_longest, probe_run, state_bytes
from lorakit.train.setup import set_up_training

MEGABYTE = 1 << 20
CPU = torch.device("cpu")


def prepared(path, *overrides):
    return prepare_run(load(path, overrides).recipe, Silent())


@pytest.mark.skipif(not memory._CLEAR.exists(), reason="needs Linux' /proc")
def test_the_peak_is_that_of_the_work_alone():
    held = torch.ones(30 * MEGABYTE // 4)
    for size in (60, 120, 40):  # the last is smaller than what was held before it
        with measure_peak(CPU) as found:
            torch.ones(size * MEGABYTE // 4)
        assert found.exact
        assert found.peak - found.before == pytest.approx(size * MEGABYTE, abs=2 * MEGABYTE)
    assert len(held)


def test_where_the_peak_cannot_be_begun_anew_it_is_an_upper_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "missing" / "clear_refs")
    with measure_peak(CPU) as found:
        torch.ones(MEGABYTE)
    assert not found.exact
    assert found.peak >= found.before > 0


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        (["train.micro_batch=3"], lambda lengths: 3 * lengths[0]),
        (["train.micro_batch=2", "data.packing=on"], lambda lengths: 2 * lengths[0]),
        (["train.micro_batch=1", "train.gradient_checkpointing=true"], lambda lengths: lengths[0]),
        (["train.micro_batch=4", "model.quantization=nf4"], lambda lengths: 4 * lengths[0]),
    ],
)
def test_the_longest_micro_batch_is_tried(recipe_file, settings, tokens):
    run = prepared(recipe_file(adapter={"rank": 4, "dropout": 0.2}), *settings)
    found = probe_run(run, Silent())
    lengths = sorted(run.train.lengths().tolist(), reverse=True)
    assert found.tokens == tokens(lengths)
    assert found.micro_batch == run.recipe.train.micro_batch and found.halved == ()
    assert 0 < found.before <= found.peak == found.reserved
    assert found.seconds > 0
    assert f"{found.tokens:,} tokens" in describe_probe(found, run)


@pytest.mark.parametrize("kind", ["lora", "dora", {"adalora": {"every": 1}}, "none"])
def test_everything_is_left_as_it_was(recipe_file, small_memory, kind):  # noqa: F811
    """Also where it had to halve, and to turn gradient checkpointing on."""
    adapter = {"kind": kind, "dropout": 0.2} if kind != "none" else {"kind": kind, "rank": ..., "alpha": ...}
    run = prepared(recipe_file(adapter=adapter), "train.micro_batch=4", "train.gradient_checkpointing=false")
    begun = set_up_training(run, None, Silent())
    model = begun.model
    modes = [module.training for module in model.modules()]
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    random = torch.get_rng_state()
    small = small_memory(Small(0.5, recomputed=1))
    with compute_optimizations(model, "float32"):
        found = probe_longest(MicroBatchRunner(begun, run, Silent()))
    assert small.failed == 3 and found.halved == (4, 2, 1)
    assert (found.micro_batch, found.gradient_checkpointing) == (1, True)
    assert torch.equal(random, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert modes == [module.training for module in model.modules()]
    assert forwards == [module.__dict__.get("forward") for module in model.modules()]
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())


def test_a_run_is_probed_twice_and_each_size_that_ran_out_is_named_once(recipe_file, small_memory):  # noqa: F811
    run = prepared(recipe_file(), "train.micro_batch=4")
    small = small_memory(Small(2))
    found = probe_run(run, Silent())
    assert (found.micro_batch, found.halved, small.failed, small.done) == (2, (4,), 1, 2)


def test_what_cannot_fit_is_said(recipe_file, small_memory):  # noqa: F811
    run = prepared(recipe_file(), "train.micro_batch=4")
    small_memory(Small(0.5))
    with pytest.raises(LorakitError, match=r"in the probe of the longest rows: one row of \d+ tokens does not fit"):
        probe_run(run, Silent())


def test_room_is_held_for_the_states_that_the_optimizer_will_make(recipe_file):
    """The states of a real optimizer, counted after its step."""
    begun = set_up_training(prepared(recipe_file(adapter={"rank": 64, "alpha": 64})), None, Silent())
    trained = [parameter for parameter in begun.model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    from bitsandbytes.optim import AdamW

    for word, optimizer in (("adamw", torch.optim.AdamW(trained)), ("adamw-8bit", AdamW(trained, optim_bits=8))):
        optimizer.step()
        states = [
            state for per in optimizer.state.values() for name, state in per.items() if not name.startswith("qmap")
        ]
        held = sum(one.numel() * one.element_size() for one in states if isinstance(one, torch.Tensor) and one.dim())
        assert state_bytes(begun.model, word) == held, word
