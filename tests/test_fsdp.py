"""Promise 3 where the processes share out the base model (FSDP2): every kind of adapter, on every quantization, trains
what it trains alone; the base is held in parts; files are those of any other run."""

import gc
import os
import signal

import pytest
import torch
from conftest import TINY_LLAMA
from distributed_runs import environment, failed_training_on, train_here, train_on
from rank_processes import run_on
from runs_of_tests import run_recipe
from safetensors.torch import load_file
from test_data_parallel import STEPS, assert_same_training, assert_same_weights
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from lorakit.distributed.processes import rank, world_size
from lorakit.merge.inputs import input_of_run
from lorakit.merge.run import merge
from lorakit.model.peft_adapter import TRAINED_WEIGHTS
from lorakit.prepare import prepare_run, reopen_run
from lorakit.progress import Silent
from lorakit.recipe.load import RecipeErrors, load
from lorakit.run_dir import Run
from lorakit.train.batch_layout import count_trained_tokens
from lorakit.train.micro_batching import MicroBatchRunner
from lorakit.train.preflight import probe_longest, state_bytes
from lorakit.train.setup import set_up_training
from lorakit.train.trainer import TrainingCallback

FSDP = "train.sharding=fsdp"
FULL = {"adapter": {"kind": "none", "rank": ..., "alpha": ...}}


def of_kind(kind, quantization="none", train=None, **adapter):
    return {"adapter": {"kind": kind, **adapter}, "model": {"quantization": quantization}, "train": train or {}}


CASES = {
    "full": FULL,
}
SLOW = {
    "dora nf4": of_kind("dora", "nf4"),
    "lora": of_kind("lora"),
    "rslora q4": of_kind("rslora", "q4"),
    "lora q8": of_kind("lora", "q8"),
    "dora q8": of_kind("dora", "q8", train={"gradient_checkpointing": True}),
    "dora q4": of_kind("dora", "q4", train={"gradient_checkpointing": True}),
    "adalora": of_kind({"adalora": {"shrink_from": 0.1, "shrink_to": 0.5}}),
    "adalora nf4": of_kind({"adalora": {"shrink_from": 0.1, "shrink_to": 0.5}}, "nf4"),
    "flexlora": of_kind({"flexlora": {"moved": 2, "move_from": 0.1, "move_to": 0.5}}),
    "flexlora q8": of_kind({"flexlora": {"moved": 2, "move_from": 0.1, "move_to": 0.5}}, "q8"),
    "pissa": of_kind("pissa"),
    "pissa nf4": of_kind("pissa", "nf4"),
    "olora q8": of_kind("olora", "q8"),
    "eva": of_kind("eva"),
    "eva nf4": of_kind("eva", "nf4"),
    "loftq": of_kind("loftq"),
    "a module trained whole": of_kind("lora", "nf4", train_modules=["embed_tokens", "lm_head"]),
    "packed": {"data": {"packing": "on"}, "train": {"gradient_checkpointing": True}},
    "full, recomputed": {**FULL, "train": {"gradient_checkpointing": True}},
    "full, of some modules": {"adapter": {**FULL["adapter"], "targets": ["down_proj", "q_proj"], "layers": [1]}},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)])
def test_processes_that_share_out_the_base_train_what_one_does(case, recipe_file, tmp_path):
    """On two, and full fine-tuning on three, whose shards are uneven and of which one has no row in the last step of an
    epoch."""
    sections = (CASES | SLOW)[case]
    path = recipe_file(**{**sections, "train": {**STEPS, "batch_size": 5, **sections.get("train", {})}})
    one, alone = run_recipe(path, tmp_path / "one")
    count = 3 if case == "full" else 2
    sharded, outcomes = train_on(count, path, tmp_path / "several", FSDP)
    assert_same_training(one, sharded)
    assert [outcome.eval_loss for outcome in outcomes] == [pytest.approx(alone.eval_loss, abs=1e-5)] * count


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "none"])
@pytest.mark.parametrize("family", ["experts", "tied"])
def test_experts_and_tied_embeddings_are_shared_out_too(kind, family, recipe_file, tmp_path, tokenizer):
    torch.manual_seed(3)
    options = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, **TINY_LLAMA}
    if family == "experts":
        model = MixtralForCausalLM(MixtralConfig(num_local_experts=4, **options))
    else:
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **options))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapter = FULL["adapter"] if kind == "none" else {"kind": kind}
    path = recipe_file(model={"base": str(tmp_path / "base")}, adapter=adapter, train={**STEPS, "batch_size": 5})
    one, _ = run_recipe(path, tmp_path / "one")
    assert_same_training(one, train_on(2, path, tmp_path / "two", FSDP)[0])


def _bytes_in_memory():
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    storages = [getattr(tensor, "_local_tensor", tensor).untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _shares(path):
    """Of the base's bytes, the share that this process has in memory once it is set up, and after a step."""
    before = _bytes_in_memory()
    prepared = prepare_run(load(path, [FSDP]).recipe, Silent())
    state = set_up_training(prepared, None, Silent())
    frozen = [parameter for parameter in state.model.parameters() if not parameter.requires_grad]
    base = sum(parameter.numel() * parameter.element_size() for parameter in frozen)
    set_up = _bytes_in_memory() - before
    rows = [prepared.train.rows[index] for index in range(5)]
    runner = MicroBatchRunner(state, prepared, Silent())
    runner.run_step(rows, count_trained_tokens(rows), 1)
    runner.held_out_loss(rows, 1)
    runner.drop_gradients()
    return set_up / base, (_bytes_in_memory() - before) / base


@pytest.mark.parametrize(
    "quantization", [pytest.param("none", marks=pytest.mark.slow), "nf4", pytest.param("q8", marks=pytest.mark.slow)]
)
def test_each_process_has_its_part_of_the_base_in_memory_and_no_more(quantization, recipe_file, tmp_path, tokenizer):
    """Beside it an adapter of rank 1, and the scales of the quantized weights."""
    torch.manual_seed(5)
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **TINY_LLAMA | sizes)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = {"base": str(tmp_path / "base"), "quantization": quantization}
    path = recipe_file(model=model, adapter={"rank": 1, "targets": ["q_proj"]})
    scales = {"none": 0.0, "nf4": 0.125 * 0.8, "q8": 0.03}[quantization]  # 4 bytes for 32; for a row
    for shares in run_on(2, _shares, path, **environment()):
        assert all(0.5 <= share < 0.55 + scales for share in shares), shares


def _probe(path):
    """What is tried before a run on a GPU."""
    prepared = prepare_run(load(path, [FSDP]).recipe, Silent())
    runner = MicroBatchRunner(set_up_training(prepared, None, Silent()), prepared, Silent())
    return probe_longest(runner).micro_batch, state_bytes(runner.model, "adamw", runner.sharding)


@pytest.mark.slow
def test_the_longest_rows_are_tried_by_all_with_room_for_the_states_of_their_parts(recipe_file, tiny_base):
    path = recipe_file(**FULL, train={"batch_size": 6, "micro_batch": 3})
    whole = 8 * LlamaForCausalLM.from_pretrained(tiny_base).num_parameters()
    (ours, part), (theirs, rest) = run_on(2, _probe, path, **environment())
    assert (ours, theirs) == (3, 3) and part + rest == whole


def test_checkpoints_hold_what_is_trained_and_the_merged_model_is_that_of_one_process(recipe_file, tmp_path):
    path = recipe_file(train={**STEPS, "steps": 4})
    runs = [run_recipe(path, tmp_path / "one")[0], train_on(2, path, tmp_path / "two", FSDP)[0]]
    ours, theirs = (load_file(run.complete_checkpoints()[-1] / TRAINED_WEIGHTS) for run in runs)
    assert_same_weights(ours, theirs)
    assert all(".lora_" in name for name in theirs)
    sums = []
    for run in runs:
        merged = tmp_path / f"merged-{run.folder.name}"
        merge(input_of_run(*reopen_run(run.folder, Silent()), Silent()), merged, Silent())
        weights = load_file(merged / "model.safetensors").values()
        sums.append(sum(float(weight.double().abs().sum()) for weight in weights))
    assert sums[1] == pytest.approx(sums[0], rel=1e-7)


def _goes_on(path, folder, stop, overrides, resume):
    """The last process gets a signal in step `stop`."""

    def noted(self, args, state, control, **others):
        if rank() == world_size() - 1 and state.global_step + 1 == stop:
            self.trainer.stopping.signal = signal.SIGTERM

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingCallback, "on_step_begin", noted)
        return train_here(path, folder, overrides, resume)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "adalora"])
def test_a_run_goes_on_with_another_sharding_and_another_number_of_processes(kind, recipe_file, tmp_path):
    """Data parallel on two, then shared out over three, then one alone."""
    sections = (CASES | SLOW)[kind]
    path, folder = recipe_file(**{**sections, "train": {**STEPS, "steps": 12}}), tmp_path / "run"
    whole, _ = run_recipe(path, tmp_path / "whole")
    for step, count, sharding in ((4, 2, "none"), (9, 3, "fsdp")):
        overrides = (f"train.sharding={sharding}",)
        first, *_ = failed_training_on(count, _goes_on, path, folder, step, overrides, step > 4)
        assert first[0] == "Interrupted", first[1]
    run, _ = run_recipe(path, folder, resume=True)
    assert_same_training(whole, run)


def _runs_short(path, folder, resume):
    """Memory runs out on the second process, for more than two rows at once."""
    run_micro_batch = MicroBatchRunner.run_micro_batch

    def short(self, batch, tokens, step):
        if rank() == 1 and step == 5 and len(batch.packs) > 2:
            raise torch.OutOfMemoryError("there is no more")
        return run_micro_batch(self, batch, tokens, step)

    MicroBatchRunner.run_micro_batch = short
    return train_here(path, folder, (FSDP,), resume)


@pytest.mark.slow
def test_memory_that_runs_out_ends_the_run_which_goes_on_with_less_when_it_is_resumed(recipe_file, tmp_path):
    path, folder = recipe_file(train={**STEPS, "steps": 8, "batch_size": 6}), tmp_path / "run"
    one, _ = run_recipe(path, tmp_path / "one")
    first, second = failed_training_on(2, _runs_short, path, folder, False)
    assert (first[0], second[0]) == ("FailedElsewhere", "LorakitError"), (first, second)
    assert "out of memory at step 5 on rank 1 with micro_batch 3" in second[1] and "--resume goes on" in second[1]
    run = Run(folder)
    assert run.complete_checkpoints()[-1].name == "step-000004"
    assert [(change["step"], change["now"]) for change in run.read_manifest()["out_of_memory"]] == [(5, 2)]
    outcomes = failed_training_on(2, _runs_short, path, folder, True)
    assert [(error, outcome.micro_batch) for error, outcome in outcomes] == [("", 2)] * 2
    assert_same_training(one, run)


def _fails(path, folder, error):
    run_micro_batch = MicroBatchRunner.run_micro_batch

    def failing(self, batch, tokens, step):
        if rank() == 1 and step == 6:
            if error == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if error:
                raise ValueError(error)
            for weight in self.model.parameters():
                weight.data.fill_(float("nan"))
        return run_micro_batch(self, batch, tokens, step)

    MicroBatchRunner.run_micro_batch = failing
    return train_here(path, folder, (FSDP,))


@pytest.mark.parametrize(
    ("fault", "words"), [pytest.param("", "step 6: the loss is nan", marks=pytest.mark.slow), ("a fault", "a fault")]
)
def test_what_ends_one_process_ends_all_and_is_told_once(fault, words, recipe_file, tmp_path):
    path, folder = recipe_file(train=STEPS), tmp_path / "run"
    outcomes = failed_training_on(2, _fails, path, folder, fault)
    told = [text for error, text in outcomes if error != "FailedElsewhere"]
    assert len(told) == 1 and words in told[0], outcomes
    assert Run(folder).complete_checkpoints()[-1].name == "step-000004"


@pytest.mark.slow
def test_a_killed_process_ends_the_others_inside_their_pass(recipe_file, tmp_path):
    path, folder = recipe_file(train=STEPS), tmp_path / "run"
    first, second = failed_training_on(2, _fails, path, folder, "killed")
    assert (first[0], second[0]) == ("ProcessLost", "EOFError"), (first, second)
    assert_same_training(run_recipe(path, tmp_path / "one")[0], train_on(2, path, folder, FSDP, resume=True)[0])


def test_what_cannot_be_shared_out_is_refused_with_a_remedy(recipe_file):
    path = recipe_file(**FULL)
    with pytest.raises(RecipeErrors, match="Write optimizer: adamw, or sharding: none"):
        load(path, [FSDP, "train.optimizer=adamw-8bit"])
    with pytest.raises(RecipeErrors, match="Write dtype: bfloat16 or float32"):
        load(path, [FSDP, "model.dtype=float16"])
