"""Promises of `lorakit train`."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import rows_of, write_rows
from runs_of_tests import adapter_weights, losses, run_recipe
from transformers import AutoTokenizer

from lorakit.errors import LorakitError, UserError
from lorakit.run_dir import Run, open_run
from lorakit.train.trainer import SupervisedTrainer, evaluations_without_gain


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_leaves_a_whole_folder_and_the_loss_falls(recipe_file, tmp_path):
    run, outcome = run_recipe(recipe_file(), tmp_path / "run")
    assert {path.name for path in run.folder.iterdir()} == {
        "adapter",
        "checkpoints",
        "log.jsonl",
        "manifest.json",
        "recipe.yaml",
        "samples.jsonl",
    }
    found = losses(run)
    assert len(found) == outcome.steps == 12  # 22 rows in batches of 4 are 6 steps an epoch
    assert found[-1] < found[0] - 0.2
    manifest = run.read_manifest()
    assert manifest["status"] == "complete"
    assert manifest["base"]["sha256"].keys() >= {"model.safetensors", "tokenizer.json", "config.json"}
    assert len(manifest["data"]["files"]) == 2
    assert manifest["parameters"]["trainable"] == sum(weight.numel() for weight in adapter_weights(run).values())
    assert "base_model" in (run.adapter / "README.md").read_text()


def test_plain_peft_loads_the_adapter_and_only_the_adapter_was_trained(recipe_file, tmp_path, tiny_base):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = (tiny_base / "model.safetensors").read_bytes()
    run, outcome = run_recipe(recipe_file(), tmp_path / "run")
    assert (tiny_base / "model.safetensors").read_bytes() == before
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), run.adapter)
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    row = rows_of(40)[30]["messages"]
    ids = tokenizer.apply_chat_template(row, return_tensors="pt")["input_ids"]
    with torch.no_grad(), model.disable_adapter():
        plain = model(input_ids=ids, labels=ids).loss
    with torch.no_grad():
        tuned = model(input_ids=ids, labels=ids).loss
    assert tuned < plain - 0.05
    assert outcome.eval_loss is not None


@pytest.mark.parametrize("kind", ["lora", pytest.param("rslora", marks=pytest.mark.slow)])
def test_the_split_into_micro_batches_does_not_change_the_trajectory(recipe_file, tmp_path, kind):
    path = recipe_file(adapter={"kind": kind, "rank": 4, "alpha": 8}, train={"learning_rate": 0.001})
    whole, _ = run_recipe(path, tmp_path / "whole", "train.micro_batch=4")
    single, _ = run_recipe(path, tmp_path / "single", "train.micro_batch=1")
    uneven, _ = run_recipe(path, tmp_path / "uneven", "train.micro_batch=3")
    assert losses(whole) == pytest.approx(losses(single), rel=1e-4)
    assert losses(whole) == pytest.approx(losses(uneven), rel=1e-4)
    other = adapter_weights(single)
    for name, weight in adapter_weights(whole).items():
        assert torch.allclose(weight, other[name], atol=2e-4), name


def test_gradient_checkpointing_does_not_change_the_trajectory(recipe_file, tmp_path):
    path = recipe_file(train={"learning_rate": 0.001})
    off, _ = run_recipe(path, tmp_path / "off", "train.gradient_checkpointing=false")
    on, _ = run_recipe(path, tmp_path / "on", "train.gradient_checkpointing=true")
    assert losses(off) == pytest.approx(losses(on), rel=1e-4)


def interrupted_after(step: int, monkeypatch) -> None:
    """Make the trainer see a stop request once `step` steps are done, as after SIGTERM."""
    original = SupervisedTrainer.__init__

    def with_stop(self, *, stopping, **options):
        original(self, stopping=stopping, **options)
        compute = self.training_step

        def compute_and_stop(*arguments, **named):
            if self.state.global_step + 1 >= step:
                stopping.signal = signal.SIGTERM
            return compute(*arguments, **named)

        self.training_step = compute_and_stop

    monkeypatch.setattr(SupervisedTrainer, "__init__", with_stop)


@pytest.mark.parametrize("step", [1, 6, *(pytest.param(step, marks=pytest.mark.slow) for step in (3, 4, 9))])
def test_resume_equals_uninterrupted(recipe_file, tmp_path, monkeypatch, step):
    """Dropout and shuffling on; stopped inside an epoch, at its end, at an evaluation, and in the second epoch."""
    path = recipe_file(adapter={"rank": 4, "alpha": 8, "dropout": 0.2}, train={"micro_batch": 2})
    straight, _ = run_recipe(path, tmp_path / "straight")
    with monkeypatch.context() as patch:
        interrupted_after(step, patch)
        with pytest.raises(LorakitError, match=f"stopped after step {step} of 12"):
            run_recipe(path, tmp_path / "resumed")
    resumed, outcome = run_recipe(path, tmp_path / "resumed", resume=True)
    assert outcome.steps == 12
    assert same(adapter_weights(straight), adapter_weights(resumed))
    steps = [json.loads(line) for line in straight.log.read_text().splitlines()]
    again = [json.loads(line) for line in resumed.log.read_text().splitlines()]
    timeless = [{k: v for k, v in line.items() if "second" not in k} for line in steps]
    assert timeless == [{k: v for k, v in line.items() if "second" not in k} for line in again]


def test_resume_equals_uninterrupted_when_stopped_during_an_evaluation(recipe_file, tmp_path, monkeypatch):
    path = recipe_file(adapter={"rank": 4, "alpha": 8, "dropout": 0.2})
    straight, _ = run_recipe(path, tmp_path / "straight")
    original = SupervisedTrainer.evaluate

    def stopped(self, *arguments, **named):
        self.stopping.signal = signal.SIGTERM
        return original(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(SupervisedTrainer, "evaluate", stopped)
        with pytest.raises(LorakitError, match="stopped during an evaluation"):
            run_recipe(path, tmp_path / "resumed")
        with pytest.raises(LorakitError, match="stopped during an evaluation"):  # again, in the one that is made up
            run_recipe(path, tmp_path / "resumed", resume=True)
    resumed, _ = run_recipe(path, tmp_path / "resumed", resume=True)
    assert same(adapter_weights(straight), adapter_weights(resumed))


def test_sigterm_writes_a_checkpoint_and_exits_130(recipe_file, tmp_path):
    path = recipe_file(train={"epochs": None, "steps": 100000, "save_every": 50000, "eval_every": 50000})
    command = [sys.executable, "-m", "lorakit", "train", str(path), "-o", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "--resume" in err
    run = Run(tmp_path / "run")
    (checkpoint,) = run.complete_checkpoints()
    assert int(checkpoint.name.removeprefix("step-")) == len(losses(run))
    assert not run.adapter.exists()


def test_kill_leaves_no_half_written_checkpoint_and_the_run_resumes(recipe_file, tmp_path):
    path = recipe_file(train={"epochs": None, "steps": 100000, "save_every": 1, "eval_every": 50000})
    command = [sys.executable, "-m", "lorakit", "train", str(path), "-q", "-o", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    run = Run(tmp_path / "run")
    deadline = time.monotonic() + 120
    while len(run.complete_checkpoints()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    complete = {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert all(complete <= {file.name for file in folder.iterdir()} for folder in run.complete_checkpoints())
    done = int(run.complete_checkpoints()[-1].name.removeprefix("step-"))
    with pytest.raises(UserError, match=r"train\.steps: 100000 then"):
        run_recipe(path, run.folder, f"train.steps={done + 3}", resume=True)


def test_checkpoints_kept_are_the_newest_and_the_best(recipe_file, tmp_path):
    run, outcome = run_recipe(recipe_file(train={"keep": 1, "save_every": 1}), tmp_path / "run")
    kept = {int(folder.name.removeprefix("step-")) for folder in run.complete_checkpoints()}
    assert kept == {12, outcome.best_step}


def test_the_best_checkpoint_is_the_adapter_that_is_kept(recipe_file, tmp_path):
    """A learning rate that ruins the second half: the adapter is that of the best evaluation, not of the last step."""
    from safetensors.torch import load_file

    path = recipe_file(
        train={"steps": 16, "epochs": None, "learning_rate": 0.3, "schedule": "constant", "eval_every": 1}
    )
    run, outcome = run_recipe(path, tmp_path / "run")
    lines = [json.loads(line) for line in run.log.read_text().splitlines()]
    evaluations = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert len(evaluations) == 16
    assert outcome.eval_loss == min(evaluations.values())
    assert outcome.best_step == min(evaluations, key=evaluations.__getitem__)
    assert same(adapter_weights(run), load_file(run.checkpoint(outcome.best_step) / "adapter_model.safetensors"))


def test_early_stopping_ends_a_run_that_no_longer_improves(recipe_file, tmp_path):
    settings = {"steps": 200, "epochs": None, "learning_rate": 0.5, "eval_every": 1, "save_every": 100}
    path = recipe_file(train={**settings, "schedule": "constant", "early_stopping": {"patience": 2, "min_delta": 0.01}})
    _, outcome = run_recipe(path, tmp_path / "run")
    assert outcome.stopped_early
    assert outcome.steps < 200


def test_evaluations_without_gain():
    assert evaluations_without_gain([3.0, 2.0, 2.5, 2.1], 0.0) == 2
    assert evaluations_without_gain([3.0, 2.0, 1.99], 0.05) == 1
    assert evaluations_without_gain([3.0, 2.0, 1.0], 0.0) == 0


def test_a_loss_that_is_no_number_stops_the_run_with_step_and_rows(recipe_file, tmp_path):
    with pytest.raises(LorakitError, match=r"step \d+: the (loss|gradient) is .*") as caught:
        run_recipe(recipe_file(train={"learning_rate": 1e30, "max_grad_norm": 0}), tmp_path / "run")
    assert "train.jsonl:" in str(caught.value)
    assert "train.learning_rate" in str(caught.value)


def test_a_run_never_writes_into_anothers_results(recipe_file, tmp_path):
    path = recipe_file(train={"steps": 1, "epochs": None})
    run, _ = run_recipe(path, tmp_path / "run")
    before = (run.adapter / "adapter_model.safetensors").read_bytes()
    with pytest.raises(UserError, match="holds another run's results"):
        run_recipe(path, tmp_path / "run")
    with pytest.raises(UserError, match="this run has ended"):
        run_recipe(path, tmp_path / "run", resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not empty"):
        run_recipe(path, tmp_path / "mine")
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == before


def test_overwriting_deletes_a_runs_results_and_nothing_else(recipe_file, tmp_path):
    run, _ = run_recipe(recipe_file(train={"steps": 1, "epochs": None}), tmp_path / "run")
    (run.folder / ".git").mkdir()
    (run.folder / "notes.txt").write_text("mine")
    with open_run(run.folder, resume=False, overwrite=True):
        assert run.adapter.is_dir(), "nothing is deleted before the new run has begun"
        run.clear()
    assert sorted(path.name for path in run.folder.iterdir()) == [".git", "manifest.json", "notes.txt"]


def test_resume_refuses_changed_data(recipe_file, tmp_path, monkeypatch):
    path = recipe_file()
    with monkeypatch.context() as patch:
        interrupted_after(2, patch)
        with pytest.raises(LorakitError, match="stopped after"):
            run_recipe(path, tmp_path / "run")
    write_rows(tmp_path / "train.jsonl", rows_of(23))
    with pytest.raises(UserError, match=r"train\.jsonl changed"):
        run_recipe(path, tmp_path / "run", resume=True)


def test_the_resolved_recipe_repeats_the_run(recipe_file, tmp_path):
    first, _ = run_recipe(recipe_file(train={"learning_rate": "auto"}), tmp_path / "one" / "run")
    assert "auto" not in first.recipe.read_text().replace("format: auto", "")
    second, _ = run_recipe(first.recipe, tmp_path / "two")
    assert same(adapter_weights(first), adapter_weights(second))


@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_trains_its_adapter_in_float32_and_leaves_the_base(recipe_file, tmp_path, double_quant):
    path = recipe_file(model={"quantization": "nf4", "double_quant": double_quant}, train={"steps": 6, "epochs": None})
    run, _ = run_recipe(path, tmp_path / "run")
    assert losses(run)[-1] < losses(run)[0]
    assert all(weight.dtype == torch.float32 for weight in adapter_weights(run).values())
    assert run.read_manifest()["base"]["quantization"] == "nf4"


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_half_precision_computes_under_autocast_and_trains_the_adapter_in_float32(recipe_file, tmp_path, quantization):
    """The way a GPU goes, on the processor."""
    path = recipe_file(model={"dtype": "bfloat16", "quantization": quantization}, train={"learning_rate": 0.001})
    run, _ = run_recipe(path, tmp_path / "run")
    exact, _ = run_recipe(path, tmp_path / "exact", "model.dtype=float32")
    assert losses(run) == pytest.approx(losses(exact), rel=0.05)
    assert all(weight.dtype == torch.float32 for weight in adapter_weights(run).values())


def test_processes_of_a_launcher_that_have_not_joined_are_refused(recipe_file, tmp_path, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LorakitError, match="has not joined"):
        run_recipe(recipe_file(), tmp_path / "run")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_gpu_trains_in_bfloat16(recipe_file, tmp_path, quantization):
    run, _ = run_recipe(recipe_file(model={"quantization": quantization}), tmp_path / "run")
    assert losses(run)[-1] < losses(run)[0]
    assert all(weight.dtype == torch.float32 for weight in adapter_weights(run).values())


def test_files_of_a_run_are_readable_by_their_owner_alone_only_where_asked(recipe_file, tmp_path):
    run, _ = run_recipe(recipe_file(train={"steps": 1, "epochs": None}), tmp_path / "run")
    mask = os.umask(0)
    os.umask(mask)
    assert (run.adapter.stat().st_mode & 0o777) == 0o777 & ~mask
    assert isinstance(run.folder, Path)


def test_a_padding_token_that_the_model_has_no_embedding_for_is_not_put_in(recipe_file, tmp_path, tiny_base, lorakit):
    """Bases whose tokenizer was given a token for padding, and whose embeddings did not grow."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    tokenizer.save_pretrained(base)
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    assert tokenizer.pad_token_id >= vocabulary
    path = recipe_file(model={"base": str(base)}, train={"epochs": None, "steps": 2, "batch_size": 4})
    run, outcome = run_recipe(path, tmp_path / "run")
    assert outcome.steps == 2
    plain, _ = run_recipe(path, tmp_path / "plain", f"model.base={tiny_base}")
    assert losses(run) == losses(plain)
    assert lorakit("eval", run.folder)[0] == 0
    assert (run.adapter / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
