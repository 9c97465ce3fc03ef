"""Every `auto` is settled for the machine and the model, with its reason."""

import json

import pytest

from lorakit.errors import UserError
from lorakit.plan.auto import settle
from lorakit.plan.facts import ModelFacts, facts_in, facts_of
from lorakit.plan.machine import Machine
from lorakit.recipe.schema import Adapter, Data, Model, Recipe, Train

GIB = 1 << 30
CPU = Machine("cpu", "a processor", 16 * GIB, bfloat16=False)
AMX = Machine("cpu", "a processor with AMX", 16 * GIB, bfloat16=True)
GPU = Machine("cuda", "a GPU", 24 * GIB, bfloat16=True)
OLD_GPU = Machine("cuda", "an old GPU", 16 * GIB, bfloat16=False)
LLAMA_8B = ModelFacts("llama", 4096, 32, 14336, 4096, 1024)
SMOL = ModelFacts("llama", 576, 30, 1536, 576, 192)


def recipe(train: Train | None = None, adapter: Adapter | None = None, model: Model | None = None) -> Recipe:
    return Recipe(
        model=model or Model(base="a/b"),
        data=Data(train="a/b", max_length=1024),
        train=train or Train(),
        adapter=adapter or Adapter(),
    )


def chosen(machine: Machine, facts: ModelFacts | None, **sections) -> dict:
    settled = settle(recipe(**sections), machine, facts)
    assert all(choice.reason for choice in settled.choices)
    return {choice.path: choice.value for choice in settled.choices}


@pytest.mark.parametrize(
    ("machine", "dtype"), [(CPU, "float32"), (AMX, "bfloat16"), (GPU, "bfloat16"), (OLD_GPU, "float16")]
)
def test_dtype_follows_the_machine(machine, dtype):
    assert chosen(machine, SMOL)["model.dtype"] == dtype


def test_a_small_model_takes_as_many_rows_as_fit_and_no_checkpointing():
    found = chosen(GPU, SMOL)
    token = (18 * 576 + 6 * 576 + 4 * 192 + 8 * 1536) * 30  # bytes of saved activations, as facts about Llama give
    assert found["train.micro_batch"] == int(0.4 * 24 * GIB // (1024 * token))
    assert found["train.gradient_checkpointing"] is False


def test_a_model_that_hardly_fits_is_checkpointed():
    found = chosen(GPU, LLAMA_8B)
    assert found["train.gradient_checkpointing"] is True
    assert 1 <= found["train.micro_batch"] <= 16


def test_what_is_written_is_never_changed():
    train = Train(micro_batch=3, learning_rate=1e-5, gradient_checkpointing=False, optimizer="adamw")
    settled = settle(recipe(train=train), GPU, LLAMA_8B)
    assert settled.recipe.train == train
    assert {choice.path for choice in settled.choices} == {"model.dtype", "model.attention", "data.packing"}


def test_learning_rate_is_the_published_formula():
    assert chosen(CPU, SMOL)["train.learning_rate"] == pytest.approx(5e-4 * (2000 / 576) ** 0.781, rel=0.02)
    qwen = ModelFacts("qwen2", 2048)
    assert chosen(CPU, qwen)["train.learning_rate"] == pytest.approx(5e-4 * (2000 / 2048) ** 0.0775, rel=0.02)
    assert chosen(CPU, ModelFacts("mamba", 768))["train.learning_rate"] == 2e-4
    assert chosen(CPU, ModelFacts("falcon", 8192))["train.learning_rate"] == 1e-4


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
    with pytest.raises(UserError, match="30 is no layer of the model: this model has layers 0 to 29"):
        settle(recipe(adapter=Adapter(layers=layers)), CPU, SMOL)
    settle(recipe(adapter=Adapter(layers=["0-29"])), CPU, SMOL)


def test_settings_that_cannot_work_here_are_refused(monkeypatch):
    with pytest.raises(UserError, match="float16 needs a GPU"):
        settle(recipe(model=Model(base="a/b", dtype="float16")), CPU, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package flash-attn"):
        settle(recipe(model=Model(base="a/b", attention="flash_attention_2")), GPU, None)


def test_a_gpu_that_torch_cannot_use_is_said_and_not_used(monkeypatch):
    from lorakit.plan import prepare
    from lorakit.progress import Silent

    heard = []
    listener = Silent()
    listener.warn = heard.append  # type: ignore[method-assign]
    monkeypatch.setattr(prepare, "this_machine", lambda: GPU)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert prepare.usable_machine(listener).device == "cpu"
    assert "cannot use it" in heard[0]


def test_facts_are_read_from_configs_of_several_shapes(tmp_path):
    def facts(**config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return facts_in(tmp_path)

    assert facts(model_type="gpt2", n_embd=64, n_layer=3, n_head=4) == ModelFacts("gpt2", 64, 3, 256, 64, 64, heads=4)
    nested = {"model_type": "gemma3_text", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    assert facts(model_type="gemma3", text_config=nested).model_type == "gemma3_text"
    assert facts(model_type="odd") is None
    (tmp_path / "config.json").write_text("{")
    assert facts_in(tmp_path) is None


def test_facts_of_a_hub_id_come_from_the_hubs_cache_or_the_table(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2}')
    (tmp_path / "models--someone--tiny" / "refs").mkdir()
    (tmp_path / "models--someone--tiny" / "refs" / "main").write_text("abc")
    assert facts_of("someone/tiny", "main").hidden_size == 8
    assert facts_of("HuggingFaceTB/SmolLM2-135M-Instruct", "main").hidden_size == 576
    assert facts_of("nobody/nothing", "main") is None
