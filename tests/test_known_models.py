"""The bundled configs of well-known models make the models that their hub pages count."""

import re
import subprocess
import sys

import pytest

from lorakit.model.spec_from_meta import meta_model, spec_from_meta
from lorakit.plan.model_info import known_config, known_models
from lorakit.plan.trainable_params import count_parameters
from lorakit.recipe.schema import Adapter

# As the hub's pages count them.
PUBLISHED = {
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "google/gemma-2-2b": 2_614_341_888,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
}
ARCHITECTURES = {model["config"]["model_type"]: model for model in known_models()}


def counted(config: dict) -> int:
    return sum(parameter.numel() for parameter in meta_model(config).parameters())


def test_the_published_counts_are_in_the_table():
    of_id = {hub_id: model["parameters"] for model in known_models() for hub_id in model["ids"]}
    assert {hub_id: of_id[hub_id] for hub_id in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_of_each_architecture_has_the_published_number_of_parameters(architecture):
    model = min(
        (model for model in known_models() if model["config"]["model_type"] == architecture),
        key=lambda model: model["parameters"],
    )
    assert counted(model["config"]) == model["parameters"]


@pytest.mark.parametrize("hub_id", PUBLISHED)
def test_a_well_known_config_has_the_published_number_of_parameters(hub_id):
    assert counted(known_config(hub_id)) == PUBLISHED[hub_id]


def test_an_adapter_on_a_known_config_is_counted():
    config = known_config("mistralai/Mistral-7B-v0.1")
    trainable, total = count_parameters(spec_from_meta(config), Adapter(rank=16, targets="all-linear"))
    assert (trainable, total - trainable) == (41_943_040, 7_241_732_096)


@pytest.mark.slow
def test_every_known_config_has_the_published_number_of_parameters():
    assert [model["ids"][0] for model in known_models() if counted(model["config"]) != model["parameters"]] == []


def test_the_size_in_a_name_is_the_size_of_its_config():
    """Roughly: the names of Gemma and OLMo leave out the embeddings."""
    for model in known_models():
        for hub_id in model["ids"]:
            named = re.search(r"(?:^|[-_])(\d+(?:\.\d+)?)([bm])(?![a-z])", hub_id.split("/")[-1].lower())
            if named is None or "8x" in hub_id:
                continue
            size = float(named[1]) * (1e9 if named[2] == "b" else 1e6)
            assert 0.85 < model["parameters"] / size < 1.5, hub_id


def test_an_id_is_known_whatever_its_letters_and_only_once():
    assert known_config("META-LLAMA/llama-3.1-8b") == known_config("meta-llama/Llama-3.1-8B")
    ids = [hub_id.lower() for model in known_models() for hub_id in model["ids"]]
    assert len(ids) == len(set(ids)) and len(ids) >= 80


@pytest.mark.parametrize("hub_id", ["nobody/nothing", "unsloth/Llama-3.1-8B-bnb-4bit", "gpt2/gpt2", ""])
def test_other_ids_are_not_known(hub_id):
    assert known_config(hub_id) is None


def test_every_config_says_how_it_is_stored_and_how_far_it_reads():
    for model in known_models():
        text = model["config"].get("text_config") or model["config"]
        assert model["config"]["dtype"] in ("float32", "bfloat16", "float16"), model["ids"]
        assert text["max_position_embeddings"] >= 1024, model["ids"]
        assert model["source"]


def test_a_config_that_is_changed_changes_no_other():
    known_config("gpt2")["n_layer"] = 1
    assert known_config("gpt2")["n_layer"] == 12


def test_planning_modules_load_nothing_heavy():
    code = "import sys, lorakit.plan.model_info as k, lorakit.plan.runtime\n"
    code += "import lorakit.hardware.gpus, lorakit.hardware.machine\n"
    code += "k.known_config('gpt2'); print({'torch', 'transformers', 'numpy', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
