"""Kernels and compiled blocks in a run: tried before it, given up with a reason, and to the result of plain code."""

import sys
from dataclasses import replace

import pytest
import torch
from kernel_doubles import DOUBLES
from model_families import FAMILIES
from runs_of_tests import losses, run_recipe
from test_kernels import CONFIGS, adapted, assert_same, loss_and_gradients, made
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lorakit.errors import UserError
from lorakit.hardware.machine import Machine
from lorakit.model import cpu_kernels
from lorakit.model.block_code import PLAIN, use_inference_code
from lorakit.model.compiled_blocks import blocks_of, compile_blocks
from lorakit.model.kernels import liger_kernels
from lorakit.plan import block_code
from lorakit.plan.auto import resolve_auto, with_values
from lorakit.plan.memory import size_run
from lorakit.plan.model_info import known_config, parse_model_info
from lorakit.prepare import prepare_run
from lorakit.progress import Silent
from lorakit.recipe.load import load
from lorakit.recipe.schema import Adapter, Data, Model, Recipe, Train
from lorakit.train.batch_layout import count_trained_tokens
from lorakit.train.block_check import choose_block_code
from lorakit.train.micro_batching import MicroBatchRunner, compute_optimizations
from lorakit.train.setup import set_up_training

GIB = 1 << 30
CPU = Machine("cpu", "a processor", 16 * GIB, bfloat16=False)
GPU = Machine("cuda", "a GPU", 80 * GIB, bfloat16=True)
OLD_GPU = Machine("cuda", "an old GPU", 80 * GIB, bfloat16=False)
APPLE = Machine("mps", "a Mac", 16 * GIB, bfloat16=True)
LLAMA_8B = parse_model_info(known_config("meta-llama/Llama-3.1-8B"))
OTHER = replace(LLAMA_8B, model_type="stablelm")


class Heard(Silent):
    """What a run says."""

    def __init__(self):
        self.lines, self.warnings = [], []

    def say(self, line):
        self.lines.append(line)

    def warn(self, warning):
        self.warnings.append(warning)


def runner_of(path, *overrides, **values):
    """A run that is ready for its first step, with values that this machine would not choose."""
    prepared = prepare_run(load(path, overrides).recipe, Silent())
    recipe = with_values(prepared.recipe, {f"train.{name}": value for name, value in values.items()})
    prepared = replace(prepared, recipe=recipe)
    return MicroBatchRunner(set_up_training(prepared, None, Silent()), prepared, Heard())


def step(runner, code):
    rows = [runner.prepared.train.rows[index] for index in range(4)]
    with compute_optimizations(runner.model, runner.recipe.model.dtype, code):
        loss, _ = runner.read_loss(runner.run_step(rows, count_trained_tokens(rows), 1))
    gradients = {name: p.grad.clone() for name, p in runner.model.named_parameters() if p.grad is not None}
    runner.model.zero_grad(set_to_none=True)
    return torch.tensor(loss), gradients


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["data.packing=on"],
        ["model.quantization=nf4", "train.gradient_checkpointing=true"],
        ["adapter.kind=dora", "train.gradient_checkpointing=true"],
    ],
)
def test_kernels_that_agree_are_taken_and_train_the_same(recipe_file, overrides):
    runner = runner_of(recipe_file(), *overrides, kernels="on")
    code = choose_block_code(runner, lambda: DOUBLES)
    assert code.kernels is DOUBLES and code.words == "processor"
    assert runner.progress.warnings == []
    assert runner.progress.lines == ["kernels: 5 x RMSNorm, 2 x rotation, 2 x SwiGLU, after a trial on two rows"]
    assert_same(step(runner, code), step(runner, PLAIN), 1e-5)


@pytest.mark.parametrize(
    ("overrides", "words"), [(["model.dtype=bfloat16"], "compute in float32"), ([], "none for the family")]
)
def test_kernels_that_a_run_cannot_have_are_said_to_be_left_out(recipe_file, overrides, words):
    runner = runner_of(recipe_file(), *overrides, kernels="on")
    runner.model.config.model_type = "llama" if overrides else "stablelm"
    assert choose_block_code(runner) == PLAIN
    assert words in runner.progress.warnings[0]


class OnlyForward(torch.autograd.Function):
    """SwiGLU, whose backward pass forgets the gate."""

    @staticmethod
    def forward(ctx, gate, up):
        return DOUBLES.swiglu(gate, up)

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros_like(gradient), gradient


def broken(*_):
    raise RuntimeError("\n\nPTX was compiled for another card\nat line 3\nof a long text")


FAULTS = {
    "another loss": (
        replace(DOUBLES, rms_norm=lambda x, *rest: 1.01 * DOUBLES.rms_norm(x, *rest)),
        "gave another loss",
    ),
    "other gradients": (replace(DOUBLES, swiglu=OnlyForward.apply), "gave other gradients"),
    "no number": (replace(DOUBLES, swiglu=lambda gate, up: gate * float("nan")), "gave another loss"),
    "a failure": (replace(DOUBLES, rotary=broken), "(RuntimeError: PTX was compiled for another card)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_kernels_that_fail_or_compute_something_else_are_given_up_with_the_reason(recipe_file, fault):
    kernels, words = FAULTS[fault]
    runner = runner_of(recipe_file(adapter={"dropout": 0.1}), kernels="on")
    state = torch.get_rng_state()
    before = {name: dict(vars(module)) for name, module in runner.model.named_modules()}
    assert choose_block_code(runner, lambda: kernels) == PLAIN
    (warning,) = runner.progress.warnings
    assert warning.startswith("train.kernels: ") and words in warning and "\n" not in warning
    assert warning.endswith("The run goes on with the model's own code, to the same result.")
    assert {name: dict(vars(module)) for name, module in runner.model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in runner.model.parameters())


def test_kernels_that_are_not_installed_are_said_to_be_missing(recipe_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    runner = runner_of(recipe_file(), kernels="on")
    assert choose_block_code(runner, liger_kernels) == PLAIN
    assert "ModuleNotFoundError" in runner.progress.warnings[0]


def test_the_manifest_says_whose_code_ran(recipe_file, tmp_path):
    train = {"epochs": None, "steps": 2}
    kernels, _ = run_recipe(recipe_file(train=train), tmp_path / "kernels")
    plain, _ = run_recipe(recipe_file(train=train | {"kernels": "off"}), tmp_path / "plain")
    assert [run.read_manifest()["block_code"] for run in (kernels, plain)] == ["processor", "plain"]
    assert losses(kernels) == pytest.approx(losses(plain), rel=1e-5)


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_one_compilation_serves_all_blocks_and_all_lengths():
    """With torch's own backend, which runs the graphs as they are: what is compiled is one matter, by what another."""
    model = adapted(made(CONFIGS["llama"])).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    own = loss_and_gradients(model)
    before, stops = graphs(), []
    with compile_blocks(model, stops.append, backend="eager") as blocks:
        assert len(blocks_of(model)) == 2
        assert_same(loss_and_gradients(model), own, 1e-5)
        assert graphs() == before + 1
        model(input_ids=torch.arange(3, 24).reshape(3, 7), use_cache=False).logits.sum().backward()
        assert graphs() == before + 1, "other rows, another length"
        with torch.no_grad():
            model(input_ids=torch.arange(3, 10)[None], use_cache=False)
        assert graphs() == before + 1, "held-out rows run as they are"
        with torch._dynamo.config.patch(recompile_limit=1):
            assert_same(loss_and_gradients(model.eval()), own, 1e-5)
    assert stops == [blocks.stopped] and "shapes change too often" in blocks.stopped
    assert all("forward" not in vars(block) for block in blocks_of(model))


def test_what_cannot_be_compiled_whole_is_not_compiled_at_all():
    model = adapted(made(CONFIGS["llama"]), use_dora=True).train()
    with pytest.raises(torch._dynamo.exc.Unsupported), compile_blocks(model, print, backend="eager"):
        loss_and_gradients(model)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_run_with_compiled_blocks_is_the_run_without(recipe_file, tmp_path, quantization):
    train = {"epochs": None, "steps": 3, "batch_size": 4, "learning_rate": 0.01}
    path = recipe_file(model={"quantization": quantization}, train=train)
    plain, _ = run_recipe(path, tmp_path / "plain")
    compiled, _ = run_recipe(path, tmp_path / "compiled", "train.compile=on")
    assert compiled.read_manifest()["block_code"] == "compiled"
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)


def settled(machine, info, rows=None, compile="auto", model=None, adapter=None, **train):
    recipe = Recipe(
        model=model or Model(base="a/b"),
        data=Data(train="a/b", max_length=512),
        adapter=adapter or Adapter(),
        train=Train(compile=compile, **train),
    )
    recipe, choices = resolve_auto(recipe, machine, info, rows=rows)
    return recipe, {choice.path.removeprefix("train."): choice for choice in choices}


@pytest.mark.parametrize(
    ("machine", "info", "installed", "value", "words"),
    [
        (CPU, LLAMA_8B, True, "on", "for a processor"),
        (replace(CPU, bfloat16=True), LLAMA_8B, True, "off", "float32"),
        (APPLE, LLAMA_8B, True, "off", "NVIDIA's and AMD's"),
        (OLD_GPU, LLAMA_8B, True, "off", "compute capability < 8.0"),
        (GPU, OTHER, True, "off", "none for stablelm"),
        (GPU, LLAMA_8B, False, "off", "pip install 'lorakit[gpu]'"),
        (
            replace(GPU, here=False),
            LLAMA_8B,
            False,
            "on",
            "Liger-Kernel's for llama, where lorakit[gpu] is installed; tried",
        ),
        (GPU, LLAMA_8B, True, "on", "Liger-Kernel's for llama; tried"),
        (GPU, None, True, "auto", "the model is not here yet"),
    ],
)
def test_auto_takes_kernels_where_they_run(monkeypatch, machine, info, installed, value, words):
    monkeypatch.setattr(block_code.importlib.util, "find_spec", lambda name: installed or None)
    recipe, choices = settled(machine, info)
    assert choices["kernels"].value == recipe.train.kernels == value
    assert words in choices["kernels"].reason
    if info:
        assert bool(size_run(recipe, info, info.spec, machine.is_gpu).kernels) is (value != "off")


def test_kernels_that_are_off_stay_off_and_compiled_blocks_have_none():
    assert "kernels" not in settled(GPU, LLAMA_8B, kernels="off")[1]
    assert settled(replace(GPU, here=False), LLAMA_8B, compile="on")[0].train.kernels == "off"


@pytest.mark.parametrize(
    ("machine", "info", "rows", "more", "value", "words"),
    [
        (CPU, OTHER, 10**6, {}, "off", "on a processor"),
        (APPLE, OTHER, 10**6, {}, "off", "NVIDIA's and AMD's"),
        (replace(GPU, here=False), LLAMA_8B, 10**6, {}, "off", "by hand"),
        (GPU, OTHER, 10**6, {"model": Model(base="a/b", quantization="nf4")}, "off", "quantized"),
        (GPU, OTHER, 100, {}, "off", "repaid after half an hour"),
        (GPU, OTHER, None, {}, "off", "not known"),
        (GPU, OTHER, 10**6, {}, "on", "tried against plain code"),
    ],
)
def test_auto_compiles_a_long_run_that_has_no_kernels(machine, info, rows, more, value, words):
    recipe, choices = settled(machine, info, rows, **more)
    assert recipe.train.compile == choices["compile"].value == value
    assert words in choices["compile"].reason


@pytest.mark.parametrize(
    ("machine", "more", "words"),
    [
        (OLD_GPU, {}, "compute capability"),
        (APPLE, {}, "experiment"),
        (GPU, {"adapter": Adapter(kind="dora")}, "DoRA"),
        (CPU, {}, "needs a C\\+\\+ compiler"),
    ],
)
def test_compiling_where_it_cannot_work_is_refused(monkeypatch, machine, more, words):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=f"train.compile: .*{words}.* Write auto or off"):
        settled(machine, LLAMA_8B, compile="on", **more)


@pytest.mark.parametrize("vendor", ["GenuineIntel", "AuthenticAMD"])
@pytest.mark.parametrize(("dtype", "taken", "tolerance"), [(torch.float32, True, 1e-5), (torch.bfloat16, False, 0.02)])
def test_a_model_that_answers_computes_what_its_own_code_does(dtype, taken, tolerance, vendor, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "proc_value", lambda file, key: vendor)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    model = adapted(made(CONFIGS["llama"])).to(dtype).eval()
    ids = torch.arange(2, 14).view(2, 6)
    with torch.inference_mode():
        own = model(ids).logits
        with use_inference_code(model):
            norms = [module for module in model.modules() if type(module).__name__ == "LlamaRMSNorm"]
            assert all(("forward" in vars(norm)) == taken for norm in norms)
            assert ("forward" in vars(model.get_output_embeddings())) == (taken and vendor == "AuthenticAMD")
            torch.testing.assert_close(model(ids).logits, own, rtol=tolerance, atol=tolerance)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("family", "goes_on"),
    [*((name, False) for name in sorted(FAMILIES)), *((name, True) for name in ("llama", "mistral", "gemma3", "phi"))],
)
def test_long_masked_rows_are_computed_in_blocks_of_queries_to_the_same(family, goes_on, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "_QUERIES", 4)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family].config).eval()
    ids, mask = torch.arange(2, 32).view(2, 15), torch.ones(2, 15, dtype=torch.long)
    mask[1, :5] = 0
    sizes, attend = [], cpu_kernels.scaled_dot_product_attention

    def counted(query, *others, **named):
        sizes.append(query.shape[2])
        return attend(query, *others, **named)

    def logits():
        start = model(ids[:, :6], attention_mask=mask[:, :6]).past_key_values if goes_on else None
        output = model(ids[:, 6:] if goes_on else ids, attention_mask=mask, past_key_values=start)
        return output.logits[mask[:, -output.logits.shape[1] :].bool()]

    monkeypatch.setattr(cpu_kernels, "scaled_dot_product_attention", counted)
    with torch.inference_mode():
        own = logits()
        assert not sizes
        with use_inference_code(model):
            torch.testing.assert_close(logits(), own, rtol=1e-4, atol=1e-4)
    assert set(sizes) <= {1, 2, 3, 4} and (sizes or family != "llama")


def test_what_attends_to_keys_after_a_block_is_not_cut_off(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "_QUERIES", 4)
    query, key, value = torch.randn(3, 1, 2, 8, 16)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    mask[..., 1, 4] = True
    with cpu_kernels.blocks_of_queries():
        output, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](torch.nn.Module(), query, key, value, mask)
    torch.testing.assert_close(output.transpose(1, 2), scaled_dot_product_attention(query, key, value, mask))
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


@pytest.mark.parametrize(
    "shape", [(576,), (1, 576), (3, 576), (2, 5, 576), (33, 1, 576), (64, 576), (65, 576), (0, 576)], ids=str
)
@pytest.mark.parametrize("bias", [False, True])
def test_few_rows_are_multiplied_to_what_many_are(shape, bias):
    layer = torch.nn.Linear(576, 96, bias=bias)
    x = torch.randn(*shape, 2).select(-1, 0)  # not contiguous
    torch.testing.assert_close(cpu_kernels.few_rows_linear(layer, x), layer(x))
    assert cpu_kernels.few_rows_linear(layer, x).is_contiguous()
