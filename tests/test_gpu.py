"""What only an NVIDIA GPU can show: LLM.int8 and 4 bits by CUDA's kernels, bfloat16, paged and 8-bit optimizers."""

import math
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from conftest import TINY_LLAMA, rows_of, write_rows
from runs_of_tests import losses, run_recipe
from test_kernels import CONFIGS, COVERED, IDS, adapted, made
from test_out_of_memory import events
from test_step import longest_first
from test_training import interrupted_after
from transformers import AutoModelForCausalLM, LlamaConfig

from lorakit.data.batches import collate_packed
from lorakit.errors import LorakitError
from lorakit.hardware.memory import free_memory, measure_peak
from lorakit.merge.inputs import input_of_run
from lorakit.merge.run import merge
from lorakit.model.attention import _of_gpu, _row_by_row, use_varlen
from lorakit.model.kernels import liger_kernels, use_kernels
from lorakit.model.load import load_model, summarize_quantization
from lorakit.model.loss import body_of
from lorakit.model.resolve import Base
from lorakit.prepare import prepare_run, reopen_run
from lorakit.progress import Silent
from lorakit.recipe.attention import ATTENTIONS
from lorakit.recipe.load import load
from lorakit.recipe.schema import Model
from lorakit.run_dir import Run
from lorakit.train.batch_layout import count_trained_tokens
from lorakit.train.micro_batching import MicroBatchRunner, compute_optimizations
from lorakit.train.offloading import offload_activations
from lorakit.train.preflight import probe_longest, probe_run
from lorakit.train.setup import set_up_training

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use"),
]

TRAIN = {"epochs": None, "steps": 8, "batch_size": 4, "learning_rate": 0.005, "eval_every": 4, "save_every": 4}


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory, tiny_base, tokenizer):
    """A Llama in bfloat16 that is wide enough for 8-bit optimizer states: they begin at 4096 numbers a tensor."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    shutil.copytree(tiny_base, folder)
    sizes = {**TINY_LLAMA, "hidden_size": 256, "intermediate_size": 512}
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **sizes)
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def on_gpu(folder, **values):
    settings = Model(base=str(folder), **{"dtype": "bfloat16", "attention": "sdpa", **values})
    return load_model(Base(folder.name, folder, "local folder"), settings, "cuda")


@pytest.mark.parametrize("quantization", ["none", "q8", "q4", "nf4"])
def test_a_run_on_a_gpu_and_its_merge(recipe_file, tmp_path, wide_base, quantization):
    path = recipe_file(
        model={"base": str(wide_base), "quantization": quantization}, adapter={"rank": 16, "alpha": 16}, train=TRAIN
    )
    run_recipe(path, tmp_path / "run")
    run, prepared = reopen_run(tmp_path / "run", Silent())
    manifest = run.read_manifest()
    assert manifest["machine"]["device"] == "cuda"
    assert prepared.recipe.model.dtype == "bfloat16"
    assert manifest["base"]["held_as"]["effective"] == quantization
    assert losses(run)[-1] < losses(run)[0]
    proof = merge(input_of_run(run, prepared, Silent()), run.merged, Silent()).proof
    assert proof.mean_kl < 1e-3
    assert math.isclose(manifest["result"]["eval_loss"], proof.adapter_loss, rel_tol=0.05)
    card = (run.merged / "README.md").read_text()
    assert ("rounds the inputs of every layer" in card) is (quantization == "q8")


@pytest.mark.parametrize("quantization", ["q8", "q4", "nf4"])
def test_quantized_weights_lie_on_the_gpu_and_save_memory(wide_base, quantization):
    model = on_gpu(wide_base, quantization=quantization)
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    held = summarize_quantization(model)
    assert held.quantization == quantization
    assert held.bytes < held.unquantized_bytes
    ids = torch.arange(24, device="cuda").reshape(2, 12)
    with torch.no_grad():
        found, plain = model(ids).logits.float(), on_gpu(wide_base)(ids).logits.float()
    assert 0 < (found - plain).norm() < 0.5 * plain.norm()


@pytest.mark.parametrize("word", ["q8", "nf4"])
def test_a_checkpoint_quantized_on_a_gpu_is_trained_as_it_is(recipe_file, tmp_path, wide_base, word):
    folder = tmp_path / "quantized"
    shutil.copytree(wide_base, folder)
    (folder / "model.safetensors").unlink()
    on_gpu(wide_base, quantization=word).save_pretrained(folder)
    path = recipe_file(model={"base": str(folder)}, adapter={"rank": 16, "alpha": 16}, train=TRAIN)
    run, _ = run_recipe(path, tmp_path / "run")
    assert run.read_manifest()["base"]["held_as"]["effective"] == word
    assert losses(run)[-1] < losses(run)[0]


def moments(run) -> list[torch.Tensor]:
    """AdamW's moments in the last checkpoint; bitsandbytes puts them into a dictionary of their own."""
    state = torch.load(run.complete_checkpoints()[-1] / "optimizer.pt", weights_only=True)["state"]
    own = [part for kept in state.values() for part in kept.values() if isinstance(part, dict)]
    return [part[name] for part in own for name in ("state1", "state2")]


@pytest.mark.parametrize("optimizer", ["adamw-8bit", "paged-adamw", "paged-adamw-8bit"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_optimizers_of_bitsandbytes_train_and_resume(
    recipe_file, tmp_path, monkeypatch, wide_base, optimizer, quantization
):
    """States are in 8 bits from 4096 numbers a tensor on, and paged from 100,000 on."""
    path = recipe_file(
        model={"base": str(wide_base), "quantization": quantization},
        adapter={"rank": 400, "alpha": 400},
        train={**TRAIN, "optimizer": optimizer, "learning_rate": 0.001},
    )
    with monkeypatch.context() as patch:
        interrupted_after(5, patch)
        with pytest.raises(LorakitError, match="stopped after step 5 of 8"):
            run_recipe(path, tmp_path / "run")
    run, outcome = run_recipe(path, tmp_path / "run", resume=True)
    assert outcome.steps == 8
    assert losses(run)[-1] < losses(run)[0]
    assert {tensor.dtype == torch.uint8 for tensor in moments(run)} == {optimizer.endswith("8bit")}


@pytest.mark.parametrize("probed", [True, False], ids=["the probe", "a step"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_on_a_gpu_that_is_too_small_fewer_rows_are_taken_to_the_same_result(
    recipe_file, tmp_path, monkeypatch, wide_base, quantization, probed
):
    """torch's own allocator is given less than the micro-batch takes; with dropout, whose generator goes back too."""
    path = recipe_file(
        model={"base": str(wide_base), "quantization": quantization},
        adapter={"rank": 16, "alpha": 16, "dropout": 0.2},
        data={"eval": None, "packing": "off"},
        train={**TRAIN, "steps": 3, "batch_size": 256, "micro_batch": 256, "gradient_checkpointing": False},
    )
    write_rows(tmp_path / "train.jsonl", rows_of(256))
    whole = probe_run(prepare_run(load(path).recipe, Silent()), Silent())
    assert whole.halved == () and whole.micro_batch == 256
    assert whole.reserved >= whole.peak > whole.before + (64 << 20), "of a size that blocks of 20 MiB do not hide"
    if not probed:
        monkeypatch.setattr("lorakit.train.run.probe_longest", lambda *_: whole)
    free_memory()
    limit = whole.before + 0.7 * (whole.peak - whole.before)
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        run, outcome = run_recipe(path, tmp_path / "run")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert outcome.micro_batch < 256
    assert events(run)[0]["step"] == 1
    planned, _ = run_recipe(path, tmp_path / "planned", f"train.micro_batch={outcome.micro_batch}")
    assert events(planned) == []
    assert losses(run) == pytest.approx(losses(planned), rel=2e-3)


def test_the_probe_leaves_a_gpus_generators_where_they_were(recipe_file, wide_base):
    path = recipe_file(model={"base": str(wide_base)}, adapter={"rank": 16, "dropout": 0.2}, train=TRAIN)
    run = prepare_run(load(path).recipe, Silent())
    begun = set_up_training(run, None, Silent())
    before = torch.cuda.get_rng_state(), torch.get_rng_state()
    runner = MicroBatchRunner(begun, run, Silent())
    with compute_optimizations(begun.model, run.recipe.model.dtype):
        assert probe_longest(runner).tokens == probe_longest(runner).tokens
    assert torch.equal(torch.cuda.get_rng_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


needs_liger = pytest.mark.skipif(
    not (find_spec("liger_kernel") and find_spec("triton")), reason="liger-kernel is not installed"
)


@needs_liger
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", COVERED)
def test_ligers_kernels_compute_what_each_family_does(family, dtype):
    """Forward and backward through a whole tiny model."""
    model = adapted(made(CONFIGS[family], dtype)).to("cuda")
    ids = IDS.to("cuda")

    def passed():
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.item(), torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])

    (own_loss, own), exact = passed(), dtype == torch.float32
    with use_kernels(model, liger_kernels()) as replaced:
        loss, gradients = passed()
    assert replaced["rms_norm"] > 0
    assert loss == pytest.approx(own_loss, rel=1e-4 if exact else 2e-2)
    assert (gradients - own).norm() <= (1e-3 if exact else 0.1) * own.norm()


@needs_liger
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_run_takes_ligers_kernels_and_keeps_less(recipe_file, tmp_path, wide_base, quantization):
    model = {"base": str(wide_base), "quantization": quantization}
    path = recipe_file(model=model, adapter={"rank": 16, "alpha": 16}, train=TRAIN)
    own, _ = run_recipe(path, tmp_path / "own", "train.kernels=off", "train.compile=off")
    liger, _ = run_recipe(path, tmp_path / "liger")
    assert [run.read_manifest()["block_code"] for run in (own, liger)] == ["plain", "liger"]
    assert losses(liger) == pytest.approx(losses(own), rel=5e-2)
    peaks = [
        probe_run(prepare_run(load(path, [f"train.kernels={word}"]).recipe, Silent()), Silent())
        for word in ("off", "auto")
    ]
    assert peaks[1].peak - peaks[1].before <= peaks[0].peak - peaks[0].before


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "all kept"])
def test_a_run_with_compiled_blocks_is_the_run_without(recipe_file, tmp_path, wide_base, quantization, checkpointing):
    model = {"base": str(wide_base), "quantization": quantization}
    train = TRAIN | {"gradient_checkpointing": checkpointing, "kernels": "off"}
    path = recipe_file(model=model, adapter={"rank": 16, "alpha": 16}, train=train)
    own, _ = run_recipe(path, tmp_path / "own", "train.compile=off")
    compiled, _ = run_recipe(path, tmp_path / "compiled", "train.compile=on")
    assert compiled.read_manifest()["block_code"] == "compiled"
    assert losses(compiled) == pytest.approx(losses(own), rel=5e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize(("sharding", "quantization"), [("none", "none"), ("none", "nf4"), ("fsdp", "none")])
def test_two_gpus_train_what_one_does(recipe_file, tmp_path, wide_base, sharding, quantization):
    """Through NCCL. 4 bits under fsdp are in no list of what a GPU has shown: they wait for one that runs them."""
    model = {"base": str(wide_base), "dtype": "float32", "quantization": quantization}
    path = recipe_file(model=model, adapter={"rank": 16, "alpha": 16}, train=TRAIN | {"sharding": sharding})
    for count in (1, 2):
        folder = tmp_path / f"on-{count}"
        command = [sys.executable, "-m", "lorakit", "train", str(path), "--devices", str(count), "-o", str(folder)]
        subprocess.run(command, check=True, timeout=300)
    one, two = (Run(tmp_path / f"on-{count}") for count in (1, 2))
    assert losses(two) == pytest.approx(losses(one), abs=1e-3)
    assert two.read_manifest()["machine"]["devices"] == 2


@pytest.fixture
def stepping(recipe_file, wide_base):
    """A runner on a GPU and the rows of a step, the longest first."""

    def make(*overrides, **adapter):
        path = recipe_file(model={"base": str(wide_base)}, adapter={"rank": 16, "alpha": 16, **adapter}, train=TRAIN)
        prepared = prepare_run(load(path, overrides).recipe, Silent())
        runner = MicroBatchRunner(set_up_training(prepared, None, Silent()), prepared, Silent())
        return runner, longest_first(prepared.train.rows[at] for at in range(8))

    return make


@pytest.mark.parametrize("overrides", [(), ("train.gradient_checkpointing=true",), ("model.quantization=nf4",)])
def test_the_passes_of_a_step_do_not_wait_for_the_gpu(stepping, overrides):
    """torch refuses whatever would wait, once a first step has warmed up."""
    runner, rows = stepping("train.batch_size=8", "train.micro_batch=2", *overrides)
    tokens = count_trained_tokens(rows)
    with compute_optimizations(runner.model, runner.recipe.model.dtype):
        runner.read_loss(runner.run_step(rows, tokens, 1))
        runner.drop_gradients()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss = runner.run_step(rows, tokens, 2)
            norm = torch.nn.utils.clip_grad_norm_(runner.model.parameters(), 1.0)
            runner.prepare_ahead(rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        number, length = runner.read_loss(loss, norm)
    assert math.isfinite(number) and length > 0
    assert runner.ahead.batches[0].tensors["input_ids"].is_cuda


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_in_main_memory_give_the_same_gradients_and_leave_the_card(stepping, checkpointing):
    words = ("train.batch_size=8", "train.micro_batch=8", f"train.gradient_checkpointing={str(checkpointing).lower()}")
    found = []
    for on in (False, True):
        runner, rows = stepping(*words, f"train.offload_activations={str(on).lower()}")
        rows = [row | {name: row[name] * 40 for name in ("input_ids", "labels")} for row in rows]
        offloading = offload_activations(runner.model, on)
        with compute_optimizations(runner.model, runner.recipe.model.dtype), offloading:
            for _ in range(2):
                runner.drop_gradients()
                with measure_peak(runner.device) as memory:
                    loss, _ = runner.read_loss(runner.run_step(rows, count_trained_tokens(rows), 1))
        gradients = [weight.grad for weight in runner.model.parameters() if weight.grad is not None]
        found.append((loss, gradients, memory.peak - memory.before))
    (loss, gradients, peak), (same_loss, same_gradients, smaller) = found
    assert loss == pytest.approx(same_loss, rel=1e-3)
    for one, other in zip(gradients, same_gradients, strict=True):
        assert (one - other).norm() <= 1e-2 * one.norm() + 1e-6
    assert smaller < peak


def test_the_optimizer_is_fused_and_segments_expand(recipe_file, tmp_path, wide_base):
    path = recipe_file(model={"base": str(wide_base)}, adapter={"rank": 16, "alpha": 16}, train=TRAIN)
    run, _ = run_recipe(path, tmp_path / "run", "train.lora_plus=4")
    assert "expandable_segments:True" in run.read_manifest()["machine"]["allocator"]
    state = torch.load(run.complete_checkpoints()[-1] / "optimizer.pt", weights_only=True)
    assert all(group["fused"] for group in state["param_groups"]) and len(state["param_groups"]) == 2


SHAPES = {
    "as many keys as queries": (4, 4, 64, 64, None),
    "keys that heads share": (8, 2, 64, 64, None),
    "a window": (4, 2, 128, 128, 16),
    "heads of no multiple of 8": (4, 2, 20, 20, None),
    "narrower values": (4, 4, 48, 32, None),
    "wide heads": (2, 1, 256, 256, None),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_variable_length_attention_equals_each_row_alone(shape, dtype):
    heads, shared, width, values, window = SHAPES[shape]
    torch.manual_seed(0)
    lengths = [200, 33, 1, 90]
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    sizes = ((heads, width), (shared, width), (shared, values))
    parts = [torch.randn(1, number, sum(lengths), size, device="cuda") for number, size in sizes]
    seed = torch.randn(1, sum(lengths), heads, values, device="cuda")

    def output_and_gradients(precision, attend):
        inputs = [part.to(precision).requires_grad_() for part in parts]
        output = attend(*inputs, None, window, starts, max(lengths))
        output.backward(seed.to(precision))
        return [output.detach().float(), *(one.grad.float() for one in inputs)]

    exact = output_and_gradients(torch.float32, _row_by_row)
    for found, alone, expected in zip(
        output_and_gradients(dtype, _of_gpu), output_and_gradients(dtype, _row_by_row), exact, strict=True
    ):
        rounding = (alone - expected).abs().max()
        assert (found - expected).abs().max() <= 3 * rounding + 1e-2 * expected.abs().max()


def test_a_run_packs_by_variable_length_attention_of_itself_and_learns_the_same(recipe_file, tmp_path, wide_base):
    path = recipe_file(model={"base": str(wide_base)}, train=TRAIN)
    found = {}
    for words in ((), ("model.attention=varlen", "data.packing=off"), ("model.attention=sdpa", "data.packing=off")):
        run, _ = run_recipe(path, tmp_path / str(len(found)), *words)
        found[words] = losses(run)
    settled = {choice["path"]: choice["value"] for choice in Run(tmp_path / "0").read_manifest()["auto"]}
    assert (settled["data.packing"], ATTENTIONS[settled["model.attention"]].flat) == ("on", True)
    packed, alone, plain = found.values()
    assert packed == pytest.approx(plain, rel=3e-2) and alone == pytest.approx(plain, rel=3e-2)


def test_packs_in_variable_length_attention_wait_for_the_gpu_in_no_layer(wide_base):
    model = on_gpu(wide_base, attention="varlen")
    use_varlen(model)
    some = [{"input_ids": list(range(5, 5 + n)), "labels": list(range(5, 5 + n))} for n in (30, 12)]
    pack = collate_packed([some], 0, flat=True)
    pack = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in pack.items()}
    body = body_of(model)
    given = {name: value for name, value in pack.items() if name != "labels"}
    body(use_cache=False, **given)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        body(use_cache=False, **given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
