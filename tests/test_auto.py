"""Every `auto` is settled for the machine and the model, with its reason."""

import json
from dataclasses import replace

import pytest

from lorakit.errors import UserError
from lorakit.hardware.machine import Machine, processor
from lorakit.model.config_values import Positions
from lorakit.plan.activations import TrainingStep
from lorakit.plan.auto import resolve_auto
from lorakit.plan.memory import peak_memory
from lorakit.plan.model_info import (
    ModelInfo,
    find_model_info,
    known_config,
    known_models,
    parse_model_info,
    read_model_info,
    refuse_by_config,
)
from lorakit.plan.trainable_params import count_trainable
from lorakit.recipe.schema import Adapter, Data, Model, Recipe, Spectrum, Train

GIB = 1 << 30
CPU = Machine("cpu", "a processor", 16 * GIB, bfloat16=False)
AMX = Machine("cpu", "a processor with AMX", 16 * GIB, bfloat16=True)
GPU = Machine("cuda", "a GPU", 24 * GIB, bfloat16=True)
OLD_GPU = Machine("cuda", "an old GPU", 16 * GIB, bfloat16=False)
LLAMA_8B = parse_model_info(known_config("meta-llama/Llama-3.1-8B"))
SMOL = parse_model_info(known_config("HuggingFaceTB/SmolLM2-135M-Instruct"))


def recipe(train: Train | None = None, adapter: Adapter | None = None, model: Model | None = None) -> Recipe:
    return Recipe(
        model=model or Model(base="a/b"),
        data=Data(train="a/b", max_length=1024),
        train=train or Train(),
        adapter=adapter or Adapter(),
    )


def chosen(machine: Machine, facts: ModelInfo | None, **sections) -> dict:
    _, choices = resolve_auto(recipe(**sections), machine, facts)
    assert all(choice.reason for choice in choices)
    return {choice.path: choice.value for choice in choices}


@pytest.mark.parametrize(
    ("machine", "dtype"), [(CPU, "float32"), (AMX, "bfloat16"), (GPU, "bfloat16"), (OLD_GPU, "float16")]
)
def test_dtype_follows_the_machine(machine, dtype):
    assert chosen(machine, SMOL)["model.dtype"] == dtype


def taken(facts: ModelInfo, rows: int, checkpointing: bool, quantization: str = "none") -> int:
    """Bytes of a micro-batch of 1,024 tokens a row, as the memory model has it."""
    how = {"checkpointing": checkpointing, "quantization": quantization, "masked": False}
    training = TrainingStep(rows, 1024, rows * 1024, card=GPU.memory, **how)
    return peak_memory(facts.spec, count_trainable(facts.spec, Adapter()), training).total


@pytest.mark.parametrize(
    ("flags", "limit", "tiles"),
    [
        ("avx512f amx_bf16 amx_tile", None, True),
        ("avx512f amx_bf16 amx_tile", "avx512_core_amx", True),
        ("avx512f amx_bf16 amx_tile", "AVX512_CORE_FP16", False),
        ("avx512f avx512_bf16", None, False),
    ],
)
def test_tiles_that_the_environment_forbids_to_torch_do_not_count(monkeypatch, flags, limit, tiles):
    monkeypatch.setattr("lorakit.hardware.machine.proc_value", lambda file, key: flags if key == "flags" else "")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if limit:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert processor().bfloat16 is tiles


def test_a_small_model_takes_as_many_rows_as_fit_and_no_checkpointing():
    found = chosen(GPU, SMOL, train=Train(batch_size=64))
    most = max(rows for rows in range(1, 65) if taken(SMOL, rows, False) <= 0.92 * 24 * GIB)
    assert 4 < most < 64
    assert found["train.gradient_checkpointing"] is False
    # As even as the steps' pieces can be: no piece is larger than what fits, and none is nearly empty.
    assert found["train.micro_batch"] == -(-64 // -(-64 // most))


def test_the_whole_batch_goes_at_once_where_it_fits():
    assert chosen(GPU, SMOL, train=Train(batch_size=4))["train.micro_batch"] == 4


def test_a_processor_takes_no_more_tokens_at_once_than_it_gains_from():
    _, found = resolve_auto(recipe(train=Train(batch_size=16)), replace(CPU, memory=64 * GIB), SMOL, 1000)
    choice = next(choice for choice in found if choice.path == "train.micro_batch")
    assert choice.value == 4 and "no speed from more than 4,096 tokens" in choice.reason
    assert chosen(replace(CPU, memory=64 * GIB), SMOL, train=Train(batch_size=3))["train.micro_batch"] == 3


def test_what_does_not_fit_at_all_is_said():
    _, found = resolve_auto(recipe(), Machine("cuda", "a small GPU", 4 * GIB, bfloat16=True), LLAMA_8B)
    choices = {choice.path: choice for choice in found}
    assert choices["train.micro_batch"].value == 1 and choices["train.gradient_checkpointing"].value is True
    assert "lorakit plan says what would fit" in choices["train.micro_batch"].reason


def test_weights_in_four_bits_leave_room_for_rows():
    train = Train(batch_size=64, gradient_checkpointing=True)
    small = chosen(GPU, LLAMA_8B, train=train)["train.micro_batch"]
    model = Model(base="a/b", quantization="nf4")
    assert chosen(GPU, LLAMA_8B, train=train, model=model)["train.micro_batch"] > small


def test_rows_are_packed_on_a_gpu_by_the_best_attention_that_is_there(monkeypatch):
    usual, flash = ("eager", "sdpa"), ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "varlen")
    hopper, amd = replace(GPU, name="NVIDIA H100 80GB HBM3"), replace(GPU, name="AMD Instinct MI300X")

    def choices(machine, attentions, **sections):
        settled, _ = resolve_auto(recipe(**sections), machine, SMOL, None, attentions)
        return settled.model.attention, settled.data.packing

    monkeypatch.setattr("lorakit.plan.attention.is_installed", lambda word: True)
    assert choices(GPU, flash) == ("flash_attention_2", "on")
    assert choices(hopper, flash) == ("flash_attention_3", "on")
    assert choices(GPU, usual) == ("sdpa", "off")
    assert choices(OLD_GPU, flash) == ("sdpa", "off")
    assert choices(CPU, flash) == ("sdpa", "off")
    assert choices(GPU, flash, model=Model(base="a/b", dtype="float32")) == ("sdpa", "off")
    assert choices(replace(GPU, here=False), flash) == ("varlen", "on")
    packed = Recipe(model=Model(base="a/b"), data=Data(train="a/b", packing="off"))
    assert resolve_auto(packed, GPU, SMOL, None, flash)[0].model.attention == "sdpa"
    monkeypatch.setattr("lorakit.plan.attention.is_installed", lambda word: word == "varlen")
    assert choices(hopper, flash) == choices(GPU, flash) == ("varlen", "on")
    assert choices(amd, flash) == ("sdpa", "off")
    monkeypatch.setattr("lorakit.plan.attention.is_installed", lambda word: False)
    assert choices(GPU, flash) == ("sdpa", "off")


def test_an_attention_that_the_machine_or_the_family_lacks_is_refused():
    def refused(attention, machine=GPU, attentions=("eager", "sdpa"), **model):
        settings = Model(base="a/b", attention=attention, **model)
        with pytest.raises(UserError) as error:
            resolve_auto(recipe(model=settings), machine, SMOL, None, attentions)
        return str(error.value)

    varlen = ("eager", "sdpa", "varlen")
    assert "which this family has not. Write sdpa" in refused("varlen")
    assert "half precision on a GPU" in refused("varlen", attentions=varlen, dtype="float32")
    assert "needs a GPU with bfloat16" in refused("varlen", OLD_GPU, varlen)
    assert "needs a GPU with bfloat16" in refused("flash_attention_3", CPU)
    assert "needs the package flash-attn-3" in refused("flash_attention_3")
    settings = recipe(model=Model(base="a/b", attention="varlen"))
    assert resolve_auto(settings, CPU, SMOL, None, varlen)[0].data.packing == "on"


def test_the_attentions_of_a_family_are_known_from_its_config():
    from model_families import FAMILIES
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from lorakit.model.attention import takes_varlen

    known = {one["config"]["model_type"]: one["config"] for one in known_models()}
    configs = {family.config.model_type: family.config.to_dict() for family in FAMILIES.values()} | known
    assert {"gemma2", "gpt_oss"} <= configs.keys()
    for model_type, config in configs.items():
        kind = AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[model_type]]
        facts = parse_model_info(config)
        if facts is not None:
            assert ("sdpa" in facts.attentions) == kind._supports_sdpa, model_type
            assert kind._supports_flash_attn or "flash_attention_2" not in facts.attentions, model_type
            made = CONFIG_MAPPING[model_type].from_dict(config)
            assert takes_varlen(kind, made) or "varlen" not in facts.attentions, model_type


def test_eager_attention_is_planned_where_a_family_has_no_other():
    gemma = parse_model_info(known_config("google/gemma-2-2b"))
    assert chosen(GPU, gemma)["model.attention"] == "eager"
    with pytest.raises(UserError, match="no sdpa for this family"):
        resolve_auto(recipe(model=Model(base="a/b", attention="sdpa")), GPU, gemma)


def test_targets_that_the_model_lacks_are_refused_before_it_is_loaded():
    with pytest.raises(UserError, match="'query_key_value' matches no linear layer"):
        resolve_auto(recipe(adapter=Adapter(targets=["query_key_value"])), CPU, SMOL)


def test_a_model_that_hardly_fits_is_checkpointed():
    found = chosen(Machine("cuda", "a GPU", 20 * GIB, bfloat16=True), LLAMA_8B)
    assert found["train.gradient_checkpointing"] is True
    assert 1 <= found["train.micro_batch"] <= 16


def test_what_is_written_is_never_changed():
    train = Train(micro_batch=3, learning_rate=1e-5, gradient_checkpointing=False, optimizer="adamw", sharding="none")
    train = train.model_copy(update={"kernels": "off", "compile": "off"})
    settled, choices = resolve_auto(recipe(train=train), GPU, LLAMA_8B)
    assert settled.train == train
    assert {choice.path for choice in choices} == {"model.dtype", "model.attention", "data.packing"}


def test_learning_rate_is_the_published_formula():
    assert chosen(CPU, SMOL)["train.learning_rate"] == pytest.approx(5e-4 * (2000 / 576) ** 0.781, rel=0.02)
    qwen = ModelInfo("qwen2", 2048)
    assert chosen(CPU, qwen)["train.learning_rate"] == pytest.approx(5e-4 * (2000 / 2048) ** 0.0775, rel=0.02)
    assert chosen(CPU, ModelInfo("mamba", 768))["train.learning_rate"] == 2e-4
    assert chosen(CPU, ModelInfo("falcon", 8192))["train.learning_rate"] == 1e-4


def test_rslora_gets_a_rate_that_makes_up_for_its_scale():
    plain = chosen(CPU, SMOL)["train.learning_rate"]
    stabilized = chosen(CPU, SMOL, adapter=Adapter(kind="rslora", rank=16))["train.learning_rate"]
    assert stabilized == pytest.approx(plain / 4, rel=0.02)


@pytest.mark.parametrize(
    ("kind", "share"), [("dora", 1), ("pissa", 1 / 10), ("olora", 1 / 18), ("none", 1 / 10), ("adalora", 10)]
)
def test_every_kind_gets_a_rate_of_its_own(kind, share):
    plain = chosen(CPU, SMOL)["train.learning_rate"]
    assert chosen(CPU, SMOL, adapter=Adapter(kind=kind))["train.learning_rate"] == pytest.approx(
        share * plain, rel=0.03
    )


def test_lora_plus_halves_the_rate_of_a():
    plain = chosen(CPU, SMOL)["train.learning_rate"]
    assert chosen(CPU, SMOL, train=Train(lora_plus=16))["train.learning_rate"] == pytest.approx(plain / 2, rel=0.02)


def test_a_model_that_is_not_here_leaves_the_rate_open_and_says_so():
    assert chosen(CPU, None)["train.learning_rate"] == "auto"


@pytest.mark.parametrize("layers", ["0-30", [0, 30], ["28-30"]])
def test_layers_that_the_config_does_not_have_are_refused_before_loading(layers):
    with pytest.raises(UserError, match="30 is not a layer of the model: this model has layers 0 to 29"):
        resolve_auto(recipe(adapter=Adapter(layers=layers)), CPU, SMOL)
    resolve_auto(recipe(adapter=Adapter(layers=["0-29"])), CPU, SMOL)
    uncounted = replace(SMOL, spec=None)
    with pytest.raises(UserError, match="30 is not a layer of the model: this model has layers 0 to 29"):
        refuse_by_config(recipe(adapter=Adapter(layers=layers)), uncounted)
    for good in ("all", [0, "28-29"], Spectrum(spectrum=0.5)):
        refuse_by_config(recipe(adapter=Adapter(layers=good)), uncounted)


def test_settings_that_cannot_work_here_are_refused():
    with pytest.raises(UserError, match="float16 needs a GPU"):
        resolve_auto(recipe(model=Model(base="a/b", dtype="float16")), CPU, None)
    with pytest.raises(UserError, match="needs the package flash-attn"):
        resolve_auto(recipe(model=Model(base="a/b", attention="flash_attention_2")), GPU, None)


def test_a_gpu_that_torch_cannot_use_is_said_and_not_used(monkeypatch):
    from lorakit.hardware import machine
    from lorakit.progress import Silent

    heard = []
    listener = Silent()
    listener.warn = heard.append  # type: ignore[method-assign]
    monkeypatch.setattr(machine, "this_machine", lambda: GPU)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert machine.usable_machine(listener).device == "cpu"
    assert "cannot use it" in heard[0]


def test_facts_are_read_from_configs_of_several_shapes(tmp_path):
    def facts(**config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return read_model_info(tmp_path)

    assert facts(model_type="gpt2", n_embd=64, n_layer=3, n_head=4, n_positions=99) == ModelInfo(
        *("gpt2", 64, 3, 1024.0), positions=Positions(99, True, "n_positions in its config.json"), plain_attention=True
    )
    nested = {"model_type": "gemma3_text", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    assert facts(model_type="gemma3", text_config=nested).model_type == "gemma3_text"
    assert facts(model_type="odd") is None
    (tmp_path / "config.json").write_text("{")
    assert read_model_info(tmp_path) is None


def test_facts_of_a_hub_id_come_from_the_hubs_cache_or_the_table(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2}')
    (tmp_path / "models--someone--tiny" / "refs").mkdir()
    (tmp_path / "models--someone--tiny" / "refs" / "main").write_text("abc")
    assert find_model_info("someone/tiny", "main").hidden_size == 8
    assert find_model_info("HuggingFaceTB/SmolLM2-135M-Instruct", "main").hidden_size == 576
    assert find_model_info("nobody/nothing", "main") is None


def test_checking_a_carried_model_reads_no_weights(monkeypatch):
    from lorakit.plan import model_info

    monkeypatch.setattr(model_info, "converted_folder", lambda path: pytest.fail("its file was hashed"))
    assert find_model_info("HuggingFaceTB/SmolLM2-135M-Instruct", "main").hidden_size == 576


def test_a_batch_in_tokens_is_as_many_rows_as_hold_them_on_average():
    wanted = recipe(train=Train(batch_tokens=8192))
    settled, choices = resolve_auto(wanted, GPU, SMOL, longest=1024, mean=500.0)
    assert (settled.train.batch_size, settled.train.batch_tokens) == (16, None)
    assert "train.batch_size: 16: they have 8,192 tokens (batch_tokens) at 500 a row" in "\n".join(map(str, choices))
    open_, choices = resolve_auto(wanted, GPU, SMOL)
    assert open_.train.batch_tokens == 8192 and "train.batch_size" not in [one.path for one in choices]
    one = resolve_auto(recipe(train=Train(batch_tokens=8192, micro_batch=4)), GPU, SMOL, longest=1024, mean=1e9)[0]
    assert (one.train.batch_size, one.train.micro_batch) == (1, 1)
