"""The base model of a config: its reference, family and quantization, and whether a template by name is its own."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.data.template_tokens import tokens_in
from lorakit.model.config_values import read_json
from lorakit.plan.model_info import find_config, find_model_folder
from lorakit.share.importing.conversion import Conversion
from lorakit.share.importing.paths import local_path, remote_reason

# A part of a base's name -> its model_type in transformers, where the table of well-known models does not have it.
_FAMILIES = (
    (r"qwen-?2(\.5)?(?!.*vl)|qwq", "qwen2"),
    (r"qwen-?3(?!.*(vl|moe|-a\d+b))", "qwen3"),
    (r"llama-?4", "llama4"),
    (r"mixtral", "mixtral"),
    (r"mistral(?!.*small-3|.*3\.[12])|zephyr-7b|openhermes-2", "mistral"),
    (r"(code)?llama|smollm-|smollm2|vicuna|yi-\d|deepseek-llm|deepseek-coder-[16]|solar-10", "llama"),
    (r"gemma-?2\b", "gemma2"),
    (r"gemma-3-(1b|270m)", "gemma3_text"),
    (r"gemma-\d+b|codegemma", "gemma"),
    (r"phi-?[12]\b|phi-1_5", "phi"),
    (r"pythia|gpt-neox", "gpt_neox"),
    (r"\bopt-", "opt"),
    (r"gpt2", "gpt2"),
    (r"falcon-\d", "falcon"),
)
_PEFT_QV = ["q_proj", "v_proj"]
PEFT_TARGETS: dict[str, list[str]] = {
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "opt"), _PEFT_QV
    ),
    "phi": ["q_proj", "v_proj", "fc1", "fc2"],
    "gpt_neox": ["query_key_value"],
    "falcon": ["query_key_value"],
    "gpt2": ["c_attn"],
}
"""The modules that PEFT chooses for a model_type where a config names none (peft/utils/constants.py)."""


def added_tokens(c: Conversion, keys: Mapping[str, Sequence[str]]) -> None:
    """Texts that the tool adds to the vocabulary, by its keys. Those that the base has already are left out, as the
    tools do, where it is here."""
    folder = find_model_folder(str(c.recipe.get("model.base", "")), str(c.recipe.get("model.revision", "main")))
    has_token = (tokens_in(folder) if folder else None) or (lambda text: False)
    new = list(dict.fromkeys(text for texts in keys.values() for text in texts if text and not has_token(text)))
    for key, texts in keys.items():
        if known := [text for text in texts if has_token(text)]:
            c.account(key, "without effect", reason=f"the base's vocabulary has {', '.join(known)} already")
    if new:
        by_us = [key for key, texts in keys.items() if {*texts} & {*new}]
        whole = "adapter.train_modules" in c.recipe
        note = "" if whole else "of the embeddings the rows of new tokens alone are trained"
        c.map("model.add_tokens", new, by_us, note)


def base_model(c: Conversion, key: str, revision: str = "") -> None:
    """The base and its revision."""
    text = c.text(key)
    if not text:
        c.refuse(key, f"{c.tool} needs a base model" if not c.has(key) else "it is empty", "Write the base model.")
        return
    if reason := remote_reason(text):
        c.refuse(key, reason, "Write the hub id, or download it and write its folder.")
        return
    c.map("model.base", local_path(c, text), key)
    if revision and c.has(revision):
        c.map("model.revision", c.text(revision), revision)


_NO_CODE = re.compile(
    r"llama|vicuna|alpaca|mi[sx]tral|zephyr|openhermes|hermes-[234]|tulu|solar-10|openchat|starling|qwen-?(?:1\.5|[23])|qwq"
    r"|gemma|smollm|phi-?4\b|pythia|gpt-?neo|gpt2|gpt-j|gpt-oss|opt-\d|bloom|yi-1|stablelm-2|starcoder2|deepseek-(?:r1-"
    r"distill|llm|coder-[\d.]+b|math)|granite|olmo|command-r|aya-|lfm2|glm-4-[\w.]*0414|falcon3|falcon-h1"
)
"""Names of bases whose folders hold no code: transformers has the family itself, and config.json no auto_map."""


def remote_code(c: Conversion, key: str) -> None:
    """`trust_remote_code` does nothing for a base that brings no code; for any other it stays refused."""
    reference = str(c.recipe.get("model.base", ""))
    folder = find_model_folder(reference, "main")
    own = None if folder is None else "auto_map" in read_json(folder / "config.json")
    name = reference.lower().rpartition("/")[2]
    if own is False or (own is None and _NO_CODE.search(name)):
        c.ignore(key, "the base brings no code of its own: transformers knows its family")


def model_type(c: Conversion) -> str | None:
    """The base's model_type: by its config where that is here or well known, else by its name."""
    reference = str(c.recipe.get("model.base", ""))
    config = find_config(reference, "main")
    if config and isinstance(config.get("model_type"), str):
        return str(config["model_type"])
    name = reference.lower().rpartition("/")[2]
    return next((family for pattern, family in _FAMILIES if re.search(pattern, name)), None)


def quantization(
    c: Conversion, four: str, eight: str, kind: str = "nf4", double: tuple[bool, str] = (True, "")
) -> None:
    """4 or 8 bits of bitsandbytes; `kind` is nf4 or fp4, `double` whether constants are quantized too, and its key."""
    in_four, in_eight = c.flag(four), c.flag(eight) if eight else False
    if in_four and in_eight:
        c.refuse([four, eight], "both are on", "Keep one of them.")
    elif in_four:
        c.map("model.quantization", {"nf4": "nf4", "fp4": "q4"}.get(kind, "nf4"), four)
        c.map("model.double_quant", double[0], double[1])
    else:
        c.map("model.quantization", "q8" if in_eight else "none", [key for key in (four, eight) if key])
    if not in_four:
        c.ignore(double[1], "the base is not in 4 bits")


def default_targets(c: Conversion, key: str) -> list[str] | None:
    """The modules that PEFT chooses where none are written; refused where the base's family is not known."""
    targets = PEFT_TARGETS.get(model_type(c) or "")
    if targets is None:
        reason = "PEFT chooses the modules by the model's family, and the base's name does not tell it"
        c.refuse(key, reason, "Write the modules, or import with --partial for all-linear.")
    return targets


def lora_kind(c: Conversion, chosen: dict[str, tuple[Any, str]]) -> None:
    """`adapter.kind` from switches: our word or mapping -> (whether it is on, its key)."""
    on = [(kind, key) for kind, (is_on, key) in chosen.items() if is_on]
    keys = [key for _, key in chosen.values() if key]
    if len(on) > 1:
        names = " and ".join(kind for kind, _ in on)
        c.refuse([key for _, key in on], f"an adapter of lorakit is one of these, not {names}", "Keep one of them.")
    elif on:
        c.map("adapter.kind", on[0][0], on[0][1])
    c.ignore([key for key in keys if key not in {key for _, key in on}], "it is off")
