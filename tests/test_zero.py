"""Promise 3 under DeepSpeed: ZeRO-2 and ZeRO-3 train what one process trains, and each process holds a part."""

import signal
from typing import Any

import pytest
from distributed_runs import failed_training_on, train_here, train_on
from runs_of_tests import losses, run_recipe
from test_data_parallel import CASES, STEPS, adapter_or_model, assert_same_training
from torch import nn

from lorakit.distributed.processes import rank, world_size
from lorakit.errors import Interrupted
from lorakit.model import loss
from lorakit.run_dir import Run
from lorakit.train import zero
from lorakit.train.trainer import TrainingCallback

pytest.importorskip("deepspeed", reason="the extra lorakit[deepspeed] is not installed")

FULL = CASES["full"]
SHORT = {**STEPS, "steps": 6, "batch_size": 5}
SLOW = CASES | {
    "dora-nf4": {"adapter": {"kind": "dora"}, "model": {"quantization": "nf4"}},
    "pissa": {"adapter": {"kind": "pissa"}},
    "loftq": {"adapter": {"kind": "loftq"}},
    "whole-modules": {"adapter": {"train_modules": ["embed_tokens", "lm_head"]}},
    "lora-plus": {"train": {"lora_plus": 16, "weight_decay": 0.1, "max_grad_norm": 0}},
    "checkpointing": {"train": {"gradient_checkpointing": True}},
}


def _train(path, folder, overrides=(), resume=False):
    """What a process does; of the tiny model's weights none is so small that it stays whole."""
    zero._SMALL = 0
    return train_here(path, folder, overrides, resume)


def trained_alike(path, tmp_path, sharding, count=2, function=_train):
    """A training alone and one by several processes, which have to be the same; what each process returned."""
    one, _ = run_recipe(path, tmp_path / "one")
    outcomes = failed_training_on(count, function, path, tmp_path / "several", (f"train.sharding={sharding}",))
    assert [error for error, _ in outcomes] == [""] * count, outcomes[0][1]
    assert_same_training(one, Run(tmp_path / "several"))
    return one, [value for _, value in outcomes]


def _parts(path, folder, overrides) -> tuple[int, int, int, int, bool]:
    """A training with so small chunks of the loss that processes have different numbers of them. Of this process the
    numbers in AdamW's states and in the model's parts, those of the trained weights and of all, and whether torch is
    left as it was."""
    shares: list[int] = []
    close, linear = zero.close, nn.functional.linear

    def noted(run: Any) -> None:
        states = [state["exp_avg"].numel() for state in run.optimizer.state.values()]
        parameters = list(run.model.parameters())
        local = [zero.local(parameter).numel() for parameter in parameters]
        sizes = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters]
        trained = sum(size for size, one in zip(sizes, parameters, strict=True) if one.requires_grad)
        shares.extend([sum(states), sum(local), trained, sum(sizes)])
        close(run)

    loss._CHUNK_LOGITS = 1 << 15
    zero.close = noted
    _train(path, folder, overrides)
    return (*shares, nn.functional.linear is linear)


@pytest.mark.parametrize(
    ("sharding", "sections"),
    [("zero-2", {}), pytest.param("zero-3", {}, marks=pytest.mark.slow), ("zero-3", FULL)],
)
def test_two_processes_train_what_one_does_and_each_holds_its_part(sharding, sections, recipe_file, tmp_path):
    _, shares = trained_alike(recipe_file(**sections, train=SHORT), tmp_path, sharding, function=_parts)
    for states, local, trained, total, restored in shares:
        assert states == pytest.approx(trained / 2, rel=0.02) and restored  # parts are filled up to one length
        frozen = total - trained
        expected = {"zero-2": total, "zero-3": frozen / 2 + trained * (1 / 2 if sections else 1)}[sharding]
        assert local == pytest.approx(expected, rel=0.02)


def _stops(path, folder, *overrides):
    """The last process gets a signal in the third step."""

    def noted(self, args, state, control, **others):
        if rank() == world_size() - 1 and state.global_step + 1 == 3:
            self.trainer.stopping.signal = signal.SIGTERM

    TrainingCallback.on_step_begin = noted
    return _train(path, folder, overrides)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sections", "first", "second"),
    [
        pytest.param({}, (2, "zero-2"), (1, "none"), marks=pytest.mark.slow),
        ({}, (1, "none"), (2, "zero-3")),
        pytest.param(FULL, (3, "zero-3"), (2, "zero-2"), marks=pytest.mark.slow),
        pytest.param(FULL, (2, "fsdp"), (3, "zero-3"), marks=pytest.mark.slow),
        pytest.param(CASES["adalora"], (2, "zero-3"), (2, "none"), marks=pytest.mark.slow),
        pytest.param({"train": {"lora_plus": 4}}, (3, "zero-2"), (2, "zero-3"), marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_another_strategy(sections, first, second, recipe_file, tmp_path, monkeypatch):
    path, folder = recipe_file(**{**sections, "train": SHORT | sections.get("train", {})}), tmp_path / "run"
    whole, _ = run_recipe(path, tmp_path / "whole")
    if first[0] == 1:
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(TrainingCallback, "on_step_begin", None)
            _stops(path, folder)
    else:
        outcomes = failed_training_on(first[0], _stops, path, folder, f"train.sharding={first[1]}")
        assert outcomes[0][0] == "Interrupted", outcomes[0][1]
    assert Run(folder).complete_checkpoints()[-1].name == "step-000003"
    if second[0] == 1:
        run, _ = run_recipe(path, folder, resume=True)
    else:
        outcomes = failed_training_on(second[0], _train, path, folder, (f"train.sharding={second[1]}",), True)
        assert outcomes[0][0] == "", outcomes[0][1]
        run = Run(folder)
    assert_same_training(whole, run)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("case", SLOW)
@pytest.mark.parametrize("sharding", ["zero-2", "zero-3"])
def test_every_kind_is_trained_as_by_one_process(sharding, case, count, recipe_file, tmp_path):
    """20 steps of 5 rows, in micro-batches of 2; the last batch of an epoch gives one of three processes no row."""
    train = STEPS | {"batch_size": 5, "micro_batch": 2} | SLOW[case].get("train", {})
    one, _ = trained_alike(recipe_file(**{**SLOW[case], "train": train}), tmp_path, sharding, count)
    alone, together = (
        sum(float(weight.abs().sum()) for weight in adapter_or_model(run).values())
        for run in (one, Run(tmp_path / "several"))
    )
    assert together == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["zero-2", "zero-3"])
def test_in_bfloat16_the_adapter_stays_float32_and_the_losses_are_those_of_one(sharding, recipe_file, tmp_path):
    """Products in bfloat16 round at 2^-8; ZeRO-3 takes them in another order."""
    path = recipe_file(model={"dtype": "bfloat16"}, train=SHORT)
    one, _ = run_recipe(path, tmp_path / "one")
    several, _ = train_on(2, path, tmp_path / "two", f"train.sharding={sharding}")
    assert losses(several) == pytest.approx(losses(one), rel=2e-2)
    assert {str(weight.dtype) for weight in adapter_or_model(several).values()} == {"torch.float32"}
    for run in (one, several):
        weights = list(adapter_or_model(run).values())
        assert any((weight != weight.bfloat16()).any() for weight in weights)  # not rounded to bfloat16 on the way


@pytest.mark.slow
def test_int8_is_trained_under_zero_2(recipe_file, tmp_path):
    trained_alike(recipe_file(model={"quantization": "q8"}, train=SHORT), tmp_path, "zero-2")
