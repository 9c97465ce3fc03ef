"""Memory that runs out in a step costs speed, never the run, and never its result."""

import json
import shutil
import sys
import weakref
from dataclasses import dataclass

import pytest
import torch
from runs_of_tests import adapter_weights, losses, run_recipe
from test_training import interrupted_after, same

from lorakit.errors import LorakitError
from lorakit.hardware.memory import OutOfMemory, is_out_of_memory, within_memory
from lorakit.model.generation import in_batches
from lorakit.recipe.load import load
from lorakit.run_dir import Run
from lorakit.train import micro_batching
from lorakit.train.batch_layout import BatchLayout
from lorakit.train.checkpoint import resumed_recipe
from lorakit.train.gradient_checkpointing import uses_gradient_checkpointing
from lorakit.train.preflight import states_do_not_fit

SETTINGS = {"learning_rate": 0.005, "steps": 4, "epochs": None, "eval_every": 2, "save_every": 2}
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory."),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] data. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@dataclass
class Small:
    """A device on which a pass with more tokens than `rows` of the longest rows have runs out of memory, once
    `passes_before` of them are done."""

    rows: float
    passes_before: int = 0
    backward: bool = False
    recomputed: float = 0
    """The rows that fit where activations are computed again."""

    def __post_init__(self) -> None:
        self.done, self.failed, self.held, self.longest = 0, 0, [], 0

    def check(self, model, tokens: int) -> None:
        most = max(self.recomputed, self.rows) if uses_gradient_checkpointing(model) else self.rows
        if tokens > most * self.longest and self.done >= self.passes_before:
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture
def small_memory(monkeypatch):
    """Make the passes of training run out of memory as a `Small` says."""

    def put(small: Small) -> Small:
        real = micro_batching.supervised_loss

        def limited(model, input_ids, **named):
            if not torch.is_grad_enabled():
                return real(model, input_ids, **named)
            assert all(reference() is None for reference in small.held), "the failed pass is still held"
            if not small.backward:
                small.check(model, input_ids.numel())
            total, count = real(model, input_ids, **named)
            if small.backward:
                failing = total * 1.0
                small.held = [weakref.ref(failing)]
                failing.register_hook(lambda _: small.check(model, input_ids.numel()))
                total = failing
            small.done += 1
            return total, count

        def noted(*arguments, longest, **named):
            small.longest = longest
            return BatchLayout(*arguments, longest=longest, **named)

        monkeypatch.setattr(micro_batching, "supervised_loss", limited)
        monkeypatch.setattr(micro_batching, "BatchLayout", noted)
        return small

    return put


def events(run: Run) -> list[dict]:
    return [line for line in map(json.loads, run.log.read_text().splitlines()) if "out_of_memory" in line]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_memory_that_ran_out_is_known_by_type_and_by_words(error):
    def fail():
        raise error

    assert is_out_of_memory(error)
    assert isinstance(within_memory(fail), OutOfMemory)
    assert within_memory(lambda: 3) == 3


def test_no_other_error_is_taken_for_it():
    def fail():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        within_memory(fail)


def test_what_failed_is_let_go_before_it_is_tried_again():
    held = []

    def fail():
        tensor = torch.ones(4)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError

    within_memory(fail)
    assert held[0]() is None
    calls = []

    def work(batch):
        calls.append(len(batch))
        return [] if len(batch) < 2 else fail()

    in_batches([1, 2], lambda item: item, 8, 100, work)
    assert calls == [2, 1, 1] and all(reference() is None for reference in held)


@pytest.mark.parametrize(("packing", "backward"), [("off", False), ("on", True)])
def test_at_the_first_step_it_becomes_the_run_that_was_planned_smaller(
    recipe_file, tmp_path, small_memory, packing, backward
):
    """Bit for bit, with dropout."""
    path = recipe_file(
        adapter={"rank": 4, "alpha": 8, "dropout": 0.2},
        data={"packing": packing},
        train={**SETTINGS, "batch_size": 8, "micro_batch": 4},
    )
    planned, _ = run_recipe(path, tmp_path / "planned", "train.micro_batch=2")
    small = small_memory(Small(2, backward=backward))
    run, outcome = run_recipe(path, tmp_path / "run")
    assert small.failed == 1 and outcome.micro_batch == 2
    assert same(adapter_weights(planned), adapter_weights(run))
    assert losses(planned) == losses(run)
    assert [line["out_of_memory"] for line in events(run)] == [
        {"micro_batch": 4, "now": 2, "gradient_checkpointing": False}
    ]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward with gradient checkpointing"])
def test_in_the_middle_of_a_later_step_it_goes_on_as_if_stopped_and_resumed_smaller(
    recipe_file, tmp_path, small_memory, monkeypatch, backward
):
    """Bit for bit, with dropout: in step 3 one micro-batch is done, the second runs out."""
    path = recipe_file(
        adapter={"rank": 4, "alpha": 8, "dropout": 0.2},
        data={"eval": None},
        train={**SETTINGS, "batch_size": 6, "micro_batch": 3, "save_every": 1, "gradient_checkpointing": backward},
    )
    with monkeypatch.context() as patch:
        interrupted_after(2, patch)
        with pytest.raises(LorakitError, match="stopped after step 2"):
            run_recipe(path, tmp_path / "resumed")
    resumed, _ = run_recipe(path, tmp_path / "resumed", "train.micro_batch=2", resume=True)
    small = small_memory(Small(2, passes_before=5 + backward, backward=backward))
    run, _ = run_recipe(path, tmp_path / "run")
    assert small.failed == 1
    assert [line["step"] for line in events(run)] == [3]
    assert same(adapter_weights(resumed), adapter_weights(run))


def test_without_dropout_the_adapter_is_that_of_the_smaller_plan_within_rounding(recipe_file, tmp_path, small_memory):
    path = recipe_file(train={**SETTINGS, "batch_size": 6, "micro_batch": 6})
    planned, _ = run_recipe(path, tmp_path / "planned", "train.micro_batch=2")
    small = small_memory(Small(2, passes_before=2))
    run, outcome = run_recipe(path, tmp_path / "run")
    assert small.failed == 2 and outcome.micro_batch == 2
    assert [line["out_of_memory"]["now"] for line in events(run)] == [3, 2]
    other = adapter_weights(planned)
    for name, weight in adapter_weights(run).items():
        assert torch.allclose(weight, other[name], atol=1e-6), name
    assert losses(run) == pytest.approx(losses(planned), rel=1e-6)


def test_a_driver_is_asked_once_a_step_whatever_ran_out(recipe_file, tmp_path, small_memory):
    path = recipe_file(
        adapter={"kind": {"adalora": {"every": 1}}, "rank": 4},
        data={"eval": None},
        train={**SETTINGS, "batch_size": 6, "micro_batch": 3},
    )
    planned, _ = run_recipe(path, tmp_path / "planned", "train.micro_batch=2")
    small_memory(Small(2, backward=True))
    run, _ = run_recipe(path, tmp_path / "run")
    assert same(adapter_weights(planned), adapter_weights(run))


def test_one_row_that_does_not_fit_is_trained_with_gradient_checkpointing(recipe_file, tmp_path, small_memory):
    path = recipe_file(train={**SETTINGS, "micro_batch": 2, "gradient_checkpointing": False})
    planned, _ = run_recipe(path, tmp_path / "planned", "train.micro_batch=1", "train.gradient_checkpointing=true")
    small_memory(Small(0.5, recomputed=1))
    run, outcome = run_recipe(path, tmp_path / "run")
    assert (outcome.micro_batch, outcome.gradient_checkpointing) == (1, True)
    assert same(adapter_weights(planned), adapter_weights(run))
    assert "gradient_checkpointing: true" in run.recipe.read_text()


def test_what_no_way_fits_is_said_with_what_to_write(recipe_file, tmp_path, small_memory):
    path = recipe_file(train={**SETTINGS, "micro_batch": 4})
    small_memory(Small(0.5))
    with pytest.raises(LorakitError, match=r"out of memory at step 1: one row of \d+ tokens does not fit") as caught:
        run_recipe(path, tmp_path / "run")
    assert caught.value.exit_code == 1
    for remedy in ("data.max_length", "model.quantization: nf4", "adapter.targets", "lorakit plan", "2.00 GiB"):
        assert remedy in str(caught.value)
    assert "gradient_checkpointing" not in str(caught.value), "it was tried"


def test_a_family_without_gradient_checkpointing_is_told_so(recipe_file, tmp_path, small_memory, monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(LorakitError, match=r"train\.gradient_checkpointing: LlamaForCausalLM has none"):
        run_recipe(recipe_file(train={"gradient_checkpointing": True}), tmp_path / "asked")
    small_memory(Small(0.5))
    with pytest.raises(LorakitError, match="out of memory at step 1: one row"):
        run_recipe(recipe_file(train={"micro_batch": 1, "gradient_checkpointing": False}), tmp_path / "run")


def test_a_held_out_evaluation_takes_fewer_rows(recipe_file, tmp_path, monkeypatch):
    path = recipe_file(train={**SETTINGS, "micro_batch": 4})
    planned, whole = run_recipe(path, tmp_path / "planned")
    real, seen = micro_batching.supervised_loss, []

    def limited(model, input_ids, **named):
        if not torch.is_grad_enabled():
            seen.append(len(input_ids))
            if len(input_ids) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(model, input_ids, **named)

    monkeypatch.setattr(micro_batching, "supervised_loss", limited)
    run, outcome = run_recipe(path, tmp_path / "run")
    assert seen == [4, 2, *[1] * 20], "10 held-out rows, twice"
    assert outcome.micro_batch == 4 and same(adapter_weights(planned), adapter_weights(run))
    assert outcome.eval_loss == pytest.approx(whole.eval_loss, rel=1e-6)


def test_the_optimizers_step_is_not_tried_again(recipe_file, tmp_path, monkeypatch):
    from lorakit.train.trainer import SupervisedTrainer

    create = SupervisedTrainer.create_optimizer

    def failing(self, model=None):
        def step(*_, **__):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        made = create(self, model)
        made.step = step
        return made

    monkeypatch.setattr(SupervisedTrainer, "create_optimizer", failing)
    with pytest.raises(LorakitError, match=r"out of memory at step 1: the optimizer's states of [\d,]+") as caught:
        run_recipe(recipe_file(train=SETTINGS), tmp_path / "run")
    assert "adamw-8bit" in str(caught.value) and "adapter.rank" in str(caught.value)
    assert "adamw-8bit" not in states_do_not_fit(torch.nn.Linear(2, 2), "paged-adamw-8bit", "at step 1")


def test_memory_that_runs_out_elsewhere_is_no_traceback(recipe_file, tmp_path, monkeypatch):
    def full(*_):
        raise MemoryError("no room")

    monkeypatch.setattr("lorakit.train.run.check_loss", full)
    says = r"the training stopped: out of memory: no room\. Close other programs"
    with pytest.raises(LorakitError, match=says) as caught:
        run_recipe(recipe_file(), tmp_path / "run")
    assert caught.value.exit_code == 1


def lorakit_train(capsys, monkeypatch, *arguments) -> tuple[int, str]:
    from lorakit.cli import main

    monkeypatch.setattr(sys, "argv", ["lorakit", "train", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0), " ".join(capsys.readouterr().err.split())


def test_the_command_recovers_says_so_and_resumes_with_what_fitted(
    recipe_file, tmp_path, small_memory, monkeypatch, capsys
):
    path = recipe_file(
        adapter={"rank": 4, "alpha": 8, "dropout": 0.2}, train={**SETTINGS, "micro_batch": 4, "save_every": 1}
    )
    planned, _ = run_recipe(path, tmp_path / "planned", "train.micro_batch=2")
    small = small_memory(Small(2))
    with monkeypatch.context() as patch:
        interrupted_after(3, patch)
        code, told = lorakit_train(capsys, patch, path, "-o", tmp_path / "run")
    assert code == 130
    assert "out of memory at step 1 with micro_batch 4: micro-batches of 2 from here on" in told
    run = Run(tmp_path / "run")
    assert "micro_batch: 2" in run.recipe.read_text()
    shutil.rmtree(run.checkpoint(3))  # as after kill -9, which leaves the step before
    code, told = lorakit_train(capsys, monkeypatch, path, "-o", run.folder, "--resume")
    assert code == 0 and "ran out of memory before: train.micro_batch is 2" in told
    assert small.failed == 1, "what ran out is not tried again, though the recipe asks for it"
    assert same(adapter_weights(planned), adapter_weights(run))
    manifest = run.read_manifest()
    assert manifest["result"]["micro_batch"] == 2
    assert manifest["out_of_memory"] == [{"step": 1, "micro_batch": 4, "now": 2, "gradient_checkpointing": False}]
    repeated, _ = run_recipe(run.recipe, tmp_path / "repeated")
    assert small.failed == 1 and same(adapter_weights(planned), adapter_weights(repeated))


def test_what_ran_out_may_be_tried_again_by_hand(recipe_file, tmp_path, small_memory, monkeypatch):
    path = recipe_file(train={**SETTINGS, "micro_batch": 4})
    small_memory(Small(2))
    with monkeypatch.context() as patch:
        interrupted_after(2, patch)
        with pytest.raises(LorakitError, match="stopped after"):
            run_recipe(path, tmp_path / "run")
    run = Run(tmp_path / "run")
    for written, settled in (([], 2), (["train.micro_batch=4"], 4), (["train.micro_batch=1"], 1)):
        assert resumed_recipe(run, load(path, written)).train.micro_batch == settled
    path.write_text(path.read_text().replace("micro_batch: 4", "micro_batch: 3"))
    assert resumed_recipe(run, load(path)).train.micro_batch == 3, "another wish than what ran out"
