"""The bytes that autograd keeps, as the memory model derives them, against those that it really keeps."""

import contextlib

import numpy as np
import pytest
import torch
from kernel_doubles import DOUBLES
from model_families import FAMILIES
from peft.helpers import disable_input_dtype_casting
from transformers import AutoModelForCausalLM

from lorakit.data.batches import collate_packed
from lorakit.model.attention import use_varlen
from lorakit.model.fused_lora import fused_lora
from lorakit.model.kernel_families import kernel_family
from lorakit.model.kernels import NO_KERNELS, use_kernels
from lorakit.model.loss import body_of
from lorakit.model.peft_adapter import attach_adapter
from lorakit.model.spec_from_meta import spec_from_meta
from lorakit.model.targets import select_targets
from lorakit.plan.activations import TrainingStep, saved_activations
from lorakit.plan.trainable_params import count_trainable
from lorakit.recipe.schema import Adapter

_WIDER = 8
_WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim")


def wide(family: str):
    """The family's tiny config, wide enough that the small change of an operation does not count; four layers."""
    config = FAMILIES[family].config
    for name in _WIDTHS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, getattr(config, name) * _WIDER)
    config.num_hidden_layers = 4
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * 4
    config.max_position_embeddings = 256
    return config


def saved_bytes(model, tokens: int, padded: bool, computing, flat: bool = False) -> int:
    """What autograd keeps of a forward pass through the body of two rows, besides the model's own weights. `flat`: they
    lie end to end in one."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    held, sizes = [], {}

    def pack(tensor):
        held.append(tensor)  # so that no other tensor gets its place
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(3, 60, (2, tokens))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, -3:] = 0
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    given = {"input_ids": ids, "attention_mask": mask}
    if flat:
        rows = [{"input_ids": row, "labels": row} for row in ids.tolist()]
        given = {name: value for name, value in collate_packed([rows], 0, flat=True).items() if name != "labels"}
    with computing(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        body_of(causal)(use_cache=False, **given)
    return sum(sizes.values())


def measured(
    family: str,
    settings: Adapter,
    half: bool,
    attention: str,
    padded: bool,
    made_of=spec_from_meta,
    kernels=NO_KERNELS,
    layers=fused_lora,
):
    """Bytes a token and bytes a pair of tokens, fitted to three lengths; and what the memory model says of them.

    `made_of`: a config as a mapping -> the spec that the memory model is given. `layers`: within which it computes.
    """
    torch.manual_seed(0)
    config = wide(family)
    flat = attention == "varlen"
    base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa" if flat else attention)
    if half and settings.kind != "none":
        base = base.to(torch.bfloat16)
    base.requires_grad_(settings.kind == "none")
    spec = made_of(config.to_dict())
    model = attach_adapter(base, settings, 0, select_targets(base, settings)).train()
    if flat:
        use_varlen(base)

    @contextlib.contextmanager
    def computing():
        with contextlib.ExitStack() as stack:
            if hasattr(model, "peft_config"):
                stack.enter_context(disable_input_dtype_casting(model, active=half))
            stack.enter_context(layers(model))
            stack.enter_context(use_kernels(model, kernels))
            stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=half))
            yield

    lengths = (40, 80, 160)
    sizes = [saved_bytes(model, length, padded, computing, flat) for length in lengths]
    _, token, pair = np.linalg.solve([[1, 2 * n, 2 * n * n] for n in lengths], sizes)
    adapted = count_trainable(spec, settings)
    way = TrainingStep(
        rows=2,
        length=lengths[-1],
        trained=1,
        dtype="bfloat16" if half else "float32",
        attention=attention,
        masked=padded,
        dropout=settings.dropout,
        on_gpu=False,
        kernels=kernel_family(config.model_type).kernels(on_gpu=True) if kernels else (),
        written_out=layers is not fused_lora,
    )
    return token, pair, saved_activations(spec, adapted, way)[0]


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma3-text", "phi3", "phi"])
def test_every_linear_layer_adapted(family, half):
    token, pair, found = measured(family, Adapter(rank=4), half, "sdpa", padded=True)
    assert found.per_token == pytest.approx(token, rel=0.08)
    assert found.per_pair == pytest.approx(pair, rel=0.02)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_rows_end_to_end_keep_nothing_for_pairs(half):
    token, pair, found = measured("qwen3", Adapter(rank=4), half, "varlen", padded=False)
    assert found.per_token == pytest.approx(token, rel=0.03)
    assert found.per_pair == 0 and abs(pair) < 1e-9


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("gemma3-text", {}),
        ("phi3", {}),
        ("llama", {"targets": ["q_proj", "v_proj"]}),
        ("qwen2", {"kind": "none"}),
    ],
)
def test_kernels_keep_less(family, settings, half):
    """Those that keep what Liger's do; test_kernels.py holds the doubles against Liger's own."""
    adapter = Adapter(**{"rank": 4} | settings)
    token, _, found = measured(family, adapter, half, "sdpa", padded=True, kernels=DOUBLES)
    assert found.per_token == pytest.approx(token, rel=0.08)
    without, _, _ = measured(family, adapter, half, "sdpa", padded=True)
    assert token < 0.95 * without


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"targets": ["q_proj", "v_proj"]}),
        ("llama", {"targets": "mlp"}),
        ("qwen3", {"targets": "attention", "layers": [2, 3]}),
        ("llama", {"dropout": 0.1}),
        ("gemma3-text", {"kind": "dora"}),
        ("llama", {"kind": "none"}),
        ("qwen2", {"rank": 32}),
    ],
)
def test_other_choices(family, settings, half):
    token, _, found = measured(family, Adapter(**{"rank": 4} | settings), half, "sdpa", padded=True)
    assert found.per_token == pytest.approx(token, rel=0.12)


@pytest.mark.parametrize(
    ("settings", "half", "share"),
    [({}, True, 1), ({"dropout": 0.1}, True, 0.8), ({"kind": "dora"}, True, 0.8), ({"kind": "dora"}, False, 0.8)],
)
def test_adapted_layers_keep_less_than_peft_s(settings, half, share):
    adapter = Adapter(**{"rank": 32} | settings)
    theirs, _, said_of_theirs = measured("llama", adapter, half, "sdpa", False, layers=contextlib.nullcontext)
    mine, _, said_of_mine = measured("llama", adapter, half, "sdpa", False)
    assert mine < share * theirs
    assert said_of_theirs.per_token == pytest.approx(theirs, rel=0.03)
    assert said_of_mine.per_token == pytest.approx(mine, rel=0.02)


@pytest.mark.parametrize(("family", "half"), [("llama", False), ("llama", True), ("gemma2", True)])
def test_eager_attention_keeps_the_scores(family, half):
    token, pair, found = measured(family, Adapter(rank=4), half, "eager", padded=family == "llama")
    assert found.per_token == pytest.approx(token, rel=0.03)
    assert found.per_pair == pytest.approx(pair, rel=0.01)


def backward_peak(length: int, half: bool) -> int:
    """The most that torch's allocator held in the backward pass of eager attention beyond what it held before."""
    config = wide("llama")
    config._attn_implementation = "eager"
    config.num_hidden_layers = 1
    layer = AutoModelForCausalLM.from_config(config).model.layers[0].self_attn
    states = torch.randn(1, length, config.hidden_size, requires_grad=True)
    turning = (torch.ones(1, length, config.head_dim), torch.zeros(1, length, config.head_dim))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            output, _ = layer(states, turning, None)
        with torch.profiler.record_function("backward"):
            output.float().sum().backward()
    events = sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    begins = next(event.start_ns() for event in events if event.name() == "backward")
    held = before = most = 0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            before = held if event.start_ns() < begins else before
            most = max(most, held - before)
    return most


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_the_backward_of_eager_attention_takes_what_the_model_says(half):
    spec = spec_from_meta(wide("llama").to_dict())
    way = TrainingStep(1, 1, 1, "bfloat16" if half else "float32", attention="eager", on_gpu=False)
    _, block = saved_activations(spec, count_trainable(spec, Adapter()), way)
    one, two = (backward_peak(length, half) for length in (256, 512))
    assert block.scores == pytest.approx((two - 2 * one) / (2 * 256**2), rel=0.03)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_full_fine_tuning_keeps_the_input_of_every_norm(half):
    token, _, found = measured("llama", Adapter(kind="none"), half, "sdpa", padded=True)
    assert found.per_token == pytest.approx(token, rel=0.01)


def test_full_fine_tuning_of_the_last_layers_keeps_nothing_below_them():
    """Its norms stay frozen, which the model of memory does not see: it says up to a third more than there is."""
    token, _, found = measured("llama", Adapter(kind="none", layers=[3]), False, "sdpa", padded=True)
    _, _, whole = measured("llama", Adapter(kind="none"), False, "sdpa", padded=True)
    assert token <= found.per_token <= 4 / 3 * token and found.per_token < whole.per_token / 3


def test_rows_of_one_length_need_no_mask():
    token, pair, found = measured("llama", Adapter(rank=4), False, "sdpa", padded=False)
    assert found.per_token == pytest.approx(token, rel=0.08)
    assert found.per_pair == 0 and pair == pytest.approx(0, abs=0.01)
