"""Configs of the tools that are for something else than supervised fine-tuning of text, and files of other programs."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lorakit.share.importing.conversion import Conversion

Purpose = tuple[str, str]
"""The key that tells what a config is for, and what that is."""

_SEES = re.compile(
    r"-vl\b|-vl-|vision|llava|internvl|minicpm-v|minicpm-o|pixtral|paligemma|idefics|smolvlm|moondream|qwen2-audio"
    r"|-omni\b|voxtral|whisper|florence|cogvlm|glm-4\.?\d?v|deepseek-ocr|paddleocr|got-ocr|stable-diffusion|flux\.1"
)
"""Names of bases that read images or sounds."""
_TASKS = {
    "pt": "pretraining",
    "rm": "training a reward model",
    "ppo": "reinforcement learning",
    "grpo": "reinforcement learning",
    "gdpo": "reinforcement learning",
    "ebft": "reinforcement learning",
    "rloo": "reinforcement learning",
}
_PREFERENCES = "preference optimization"


def other_purpose(c: Conversion) -> Purpose | None:
    """What the config is for, where it is not supervised fine-tuning of text."""
    return next(_PURPOSES[c.tool](c), None)


def _axolotl(c: Conversion) -> Iterator[Purpose]:
    if c.has("rl") and c.value("rl") is not False:
        yield "rl", _TASKS.get(str(c.value("rl")).lower(), _PREFERENCES)
    for key, purpose in (
        ("reward_model", "training a reward model"),
        ("process_reward_model", "training a reward model"),
        ("kd_trainer", "distillation from a teacher"),
    ):
        if c.flag(key):
            yield key, purpose
    for key, purpose in (
        ("pretraining_dataset", "pretraining from a stream of texts"),
        ("diffusion", "training a diffusion model"),
        ("ebft", "reinforcement learning"),
        ("num_labels", "training a classifier's head"),
        ("processor_type", "training on images or sounds"),
        ("nemo_gym_datasets", "reinforcement learning"),
    ):
        if c.value(key) not in (None, "", [], {}, False):
            yield key, purpose
    for at, entry in enumerate(c.value("datasets", []) if isinstance(c.value("datasets"), list) else []):
        if isinstance(entry, dict) and (
            entry.get("field_chosen") or str(entry.get("type")).startswith("bradley_terry")
        ):
            yield f"datasets[{at}].{'field_chosen' if entry.get('field_chosen') else 'type'}", _PREFERENCES
    yield from _by_base(c, "base_model")


def _llama_factory(c: Conversion) -> Iterator[Purpose]:
    stage = str(c.value("stage", "sft")).lower()
    if stage != "sft":
        yield "stage", _TASKS.get(stage, _PREFERENCES)
    if not c.has("dataset"):
        for key, purpose in (
            ("export_dir", "merging and exporting a model"),
            ("infer_backend", "answering questions"),
            ("eval_dataset", "evaluating a model"),
            ("task", "evaluating a model"),
        ):
            if c.has(key):
                yield key, purpose
    yield from _by_base(c, "model_name_or_path")


def _trl(c: Conversion) -> Iterator[Purpose]:
    for key, purpose in (
        ("reward_funcs", "reinforcement learning"),
        ("num_generations", "reinforcement learning"),
        ("max_completion_length", "reinforcement learning"),
        ("reward_model_path", "reinforcement learning"),
        ("sft_model_path", "reinforcement learning"),
        ("max_prompt_length", _PREFERENCES),
        ("beta", _PREFERENCES),
        ("desirable_weight", _PREFERENCES),
        ("center_rewards_coefficient", "training a reward model"),
        ("teacher_model_name_or_path", "distillation from a teacher"),
    ):
        if c.value(key) not in (None, "", [], {}):
            yield key, purpose
    yield from _by_base(c, "model_name_or_path")


def _unsloth(c: Conversion) -> Iterator[Purpose]:
    for key, purpose in (
        ("rl", "reinforcement learning"),
        ("audio_type", "training on sounds"),
        ("audio_input", "training on sounds"),
        ("is_embedding", "training a model of embeddings"),
    ):
        if c.value(key) not in (None, False, "", {}, []):
            yield key, purpose
    yield from _by_base(c, "model")


def _by_base(c: Conversion, key: str) -> Iterator[Purpose]:
    name = str(c.value(key, "")).lower().rstrip("/").rpartition("/")[2]
    if _SEES.search(name):
        yield key, "training a model that reads images or sounds"


_PURPOSES: dict[str, Callable[[Conversion], Iterator[Purpose]]] = {
    "Axolotl": _axolotl,
    "LLaMA-Factory": _llama_factory,
    "TRL": _trl,
    "Unsloth": _unsloth,
}


def explain(purpose: Purpose, value: Any) -> str:
    """One sentence: what the config is for, how that is known, and what lorakit does."""
    key, task = purpose
    tells = f"{key}: {value}" if isinstance(value, str) and not value.startswith(("{", "[")) else key
    return f"the config is for {task} ({tells}), and lorakit does supervised fine-tuning of text alone"


_OTHER_FILES = (
    (
        {"compute_environment", "distributed_type"},
        "a config of accelerate's launcher, which says on how many devices a training runs",
    ),
    ({"zero_optimization"}, "a config of DeepSpeed, which says how memory is shared out"),
    ({"peft_type"}, "the configuration of a trained adapter. `adapter.from` in a recipe goes on from its folder"),
    ({"architectures", "model_type"}, "the configuration of a model"),
    ({"train_dataset", "model"}, "a config of LLaMA-Factory's trainer v1, which is not read"),
    ({"merge_method"}, "a config of mergekit, which merges models"),
    ({"models", "merge_method"}, "a config of mergekit, which merges models"),
    ({"file_name"}, "one entry of LLaMA-Factory's dataset_info.json"),
)


def other_file(tree: Mapping[str, Any]) -> str:
    """What a file of another program is, where its keys tell; empty where they do not."""
    if any(isinstance(value, dict) and "_component_" in value for value in tree.values()):
        return "a config of torchtune"
    if tree and all(isinstance(one, dict) and ({"file_name", "hf_hub_url"} & one.keys()) for one in tree.values()):
        return "LLaMA-Factory's list of data sets. Give the config, and this file with --dataset-info"
    return next((what for keys, what in _OTHER_FILES if keys <= tree.keys()), "")
