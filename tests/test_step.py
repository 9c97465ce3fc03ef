"""A step: its micro-batches, what it makes of the gradients, and that it waits for its device once. That is found on
the CPU, by what is asked of tensors."""

import traceback
from collections import Counter

import pytest
import torch
from runs_of_tests import adapter_weights, run_recipe
from test_training import interrupted_after, same
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit.errors import LorakitError
from lorakit.prepare import prepare_run
from lorakit.progress import Silent
from lorakit.recipe.load import load
from lorakit.train.batch_layout import count_trained_tokens
from lorakit.train.micro_batching import MicroBatchRunner, compute_optimizations
from lorakit.train.setup import set_up_training
from lorakit.train.trainer import SupervisedTrainer

ASKING = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "unique", "_unique2"}
READING = {"tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__"}


def _asked_by_transformers() -> bool:
    """Whether its code looks at a mask or at positions, which it does once a pass, before the layers."""
    return any("masking_utils" in frame.filename for frame in traceback.extract_stack(limit=9))


class Waits:
    """Counts what would wait for a device: numbers that are read, and shapes that depend on them."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        found = self.found

        class Operations(TorchDispatchMode):
            def __torch_dispatch__(self, operation, types, arguments=(), named=None):
                name = operation.overloadpacket.__name__
                masks = [one for one in (arguments[1] if name == "index" else []) if one is not None]
                if (name in ASKING or any(one.dtype == torch.bool for one in masks)) and not _asked_by_transformers():
                    found[name] += 1
                return operation(*arguments, **(named or {}))

        class Methods(TorchFunctionMode):
            def __torch_function__(self, function, types, arguments=(), named=None):
                if getattr(function, "__name__", "") in READING and not _asked_by_transformers():
                    found[function.__name__] += 1
                return function(*arguments, **(named or {}))

        self.modes = Operations(), Methods()

    def __enter__(self):
        for mode in self.modes:
            mode.__enter__()
        return self.found

    def __exit__(self, *error):
        for mode in reversed(self.modes):
            mode.__exit__(*error)


def longest_first(rows):
    return sorted(rows, key=lambda row: -len(row["input_ids"]))


def runner_of(path, *overrides):
    prepared = prepare_run(load(path, overrides).recipe, Silent())
    return MicroBatchRunner(set_up_training(prepared, None, Silent()), prepared, Silent())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"adapter": {"dropout": 0.1}, "train": {"gradient_checkpointing": True}},
        {"data": {"packing": "on"}},
        {"model": {"dtype": "bfloat16"}, "adapter": {"kind": "dora"}},
        {"model": {"dtype": "bfloat16", "quantization": "nf4"}},
    ],
    ids=["lora", "checkpointing", "packed", "dora in bfloat16", "nf4 in bfloat16"],
)
def test_the_passes_of_a_step_wait_for_nothing_and_its_loss_is_read_at_once(recipe_file, settings):
    runner = runner_of(recipe_file(**settings), "train.micro_batch=2", "train.batch_size=8")
    rows = longest_first(runner.prepared.train.rows[at] for at in range(8))
    batches = runner._lay_out(rows)
    assert len(batches.batches) > 2
    with compute_optimizations(runner.model, runner.recipe.model.dtype):
        runner.ahead = batches
        runner.run_step(rows, count_trained_tokens(rows), 1)  # the first one warms up
        runner.drop_gradients()
        runner.ahead = runner._lay_out(rows)
        with Waits() as waits:
            loss = runner.run_step(rows, count_trained_tokens(rows), 2)
            norm = torch.nn.utils.clip_grad_norm_(runner.model.parameters(), 1.0)
            assert waits == {}
            number, length = runner.read_loss(loss, norm)
    assert waits == {"tolist": 1}
    assert number == pytest.approx(float(loss.total)) and length == pytest.approx(float(norm))


def test_the_loop_around_it_reads_no_tensor_and_steps_a_fused_optimizer(recipe_file, tmp_path, monkeypatch):
    """The library adds the loss up in main memory."""
    seen, step = [], SupervisedTrainer.training_step

    def noted(self, *arguments, **named):
        seen.append(self._tr_loss.device.type)
        return step(self, *arguments, **named)

    monkeypatch.setattr(SupervisedTrainer, "training_step", noted)
    run, outcome = run_recipe(recipe_file(), tmp_path / "run", "train.epochs=1", "train.lora_plus=4")
    assert set(seen) == {"cpu"} and outcome.loss > 0
    state = torch.load(run.complete_checkpoints()[-1] / "optimizer.pt", weights_only=True)
    assert [group["fused"] for group in state["param_groups"]] == [True, True], "A and B, of LoRA+"


def test_rows_that_are_laid_out_a_step_ahead_train_the_same_and_resume_bit_for_bit(recipe_file, tmp_path, monkeypatch):
    """As a GPU has them; over the end of an epoch, and with dropout."""
    path = recipe_file(adapter={"dropout": 0.2}, train={"save_every": 1})
    plain, _ = run_recipe(path, tmp_path / "plain")
    make, ready = MicroBatchRunner.__init__, []

    def ahead(self, *arguments):
        make(self, *arguments)
        self.works_ahead = True
        prepare = self.prepare_ahead
        self.prepare_ahead = lambda rows: ready.append(len(rows)) or prepare(rows)

    monkeypatch.setattr(MicroBatchRunner, "__init__", ahead)
    straight, outcome = run_recipe(path, tmp_path / "ahead")
    assert len(ready) == outcome.steps - 2, "all steps but the first of each epoch"
    with monkeypatch.context() as patch:
        interrupted_after(4, patch)
        with pytest.raises(LorakitError, match="stopped after step 4"):
            run_recipe(path, tmp_path / "resumed")
    resumed, _ = run_recipe(path, tmp_path / "resumed", resume=True)
    assert same(adapter_weights(plain), adapter_weights(straight))
    assert same(adapter_weights(plain), adapter_weights(resumed))


@pytest.mark.parametrize("packing", ["off", "on"])
def test_gradients_do_not_depend_on_how_a_step_is_cut(recipe_file, packing):
    path = recipe_file(data={"packing": packing}, adapter={"kind": "pissa"})
    runner = runner_of(path, "train.batch_size=10")
    rows, counts = longest_first(runner.prepared.train.rows[at] for at in range(10)), []
    found = []
    for micro_batch in (10, 4, 3, 2, 1):
        runner.micro_batch = micro_batch
        counts.append(len(runner._lay_out(rows).batches))
        loss, _ = runner.read_loss(runner.run_step(rows, count_trained_tokens(rows), 1))
        found.append((loss, [weight.grad for weight in runner.model.parameters() if weight.grad is not None]))
        runner.drop_gradients()
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] <= 10 and len(set(counts)) > 3
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        for gradient, other in zip(gradients, found[0][1], strict=True):
            assert torch.allclose(gradient, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("packing", ["off", "on"])
def test_a_loss_that_is_no_number_names_the_step_and_its_rows(recipe_file, packing):
    runner = runner_of(recipe_file(data={"packing": packing}), "train.micro_batch=1", "train.batch_size=4")
    rows = [runner.prepared.train.rows[at] for at in range(4)]
    own = {token for row in rows[:2] + rows[3:] for token in row["input_ids"]}
    alone = next(token for token in rows[2]["input_ids"] if token not in own)
    with torch.no_grad():
        runner.model.get_input_embeddings().weight[alone] = torch.nan
    loss = runner.run_step(rows, count_trained_tokens(rows), 3)
    with pytest.raises(LorakitError, match=r"step 3: the loss is nan; rows: train\.jsonl:3") as caught:
        runner.read_loss(loss)
    assert packing == "on" or "train.jsonl:2" not in str(caught.value)
