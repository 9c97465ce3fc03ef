"""Special tokens that a config gives the tokenizer: those of the base itself, and those that change nothing."""

import re

from lorakit.recipe.chat_templates import template_file
from lorakit.share.importing.conversion import Conversion

_END_OF_TEXT = "<|endoftext|>"
_ALL_ONE = {"bos_token": _END_OF_TEXT, "eos_token": _END_OF_TEXT, "unk_token": _END_OF_TEXT}
_SENTENCEPIECE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_SPECIAL_TOKENS = (
    (r"deepseek-(?:r1|v[23])", {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}),
    (r"openhermes-2\.5|hermes-2-pro-mistral", {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}),
    (r"llama-?2|codellama|tinyllama|(?<!c)mistral|mixtral|vicuna|zephyr|solar|open_llama", _SENTENCEPIECE),
    (r"llama-3(?:\.\d)?-[\w.]*b-instruct", {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    (r"llama-3(?:\.\d)?-[\d.]+b$", {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}),
    (r"llama-4-[\w-]*instruct", {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot|>"}),
    (r"qwen(?:2|2\.5|3)?-[\w.-]*(?:instruct|chat)|qwen3-[\d.]+b$|qwq", {"eos_token": "<|im_end|>"}),
    (r"qwen(?:2|2\.5|3)-[\d.]+b(?:-base)?$", {"eos_token": _END_OF_TEXT}),
    (r"gemma-", {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}),
    (r"phi-3", {"bos_token": "<s>", "eos_token": _END_OF_TEXT, "unk_token": "<unk>"}),
    (r"phi-?[12]\b|phi-1_5|pythia|gpt-neox|gpt2|gpt-j|mpt-|olmo-1b|olmo-7b", _ALL_ONE),
    (
        r"smollm2?-[\w.]*m?b?-instruct",
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": _END_OF_TEXT},
    ),
    (r"smollm2?-[\d.]+[mb]$", _ALL_ONE),
    (
        r"\byi-(?:1\.5-)?\d+b(?:-200k)?$",
        {"bos_token": "<|startoftext|>", "eos_token": _END_OF_TEXT, "unk_token": "<unk>"},
    ),
    (r"falcon-\d+b", {"eos_token": _END_OF_TEXT}),
)
"""A part of a base's name -> the special tokens of its tokenizer_config.json."""


_WITHOUT_CHATML = r"^(?:meta-)?llama-?[23]|^mi[sx]tral-(?:\d|nemo)|^tinyllama|^gemma-|^pythia|^falcon-\d|^phi-[123]"
"""Names of bases whose vocabulary has no <|im_end|>."""
_ENDS_OF_TURNS = (
    (r"qwen-?(?:2|3)|qwq|smollm[23]?-[\w.]*instruct|smollm3", "<|im_end|>"),
    (r"llama-3[\w.-]*instruct", "<|eot_id|>"),
    (r"gemma-[\w.-]*it\b", "<end_of_turn>"),
    (r"phi-3|phi-3\.5", "<|end|>"),
)
"""A part of a base's name -> the token that ends a turn in its own chat template."""


def own_special_tokens(c: Conversion) -> dict[str, str]:
    """The special tokens that the base has by itself, where its name tells them."""
    name = _base_name(c)
    return next((tokens for pattern, tokens in _SPECIAL_TOKENS if re.search(pattern, name)), {})


def special_tokens(c: Conversion, section: str) -> None:
    """Account for the tokens of a mapping that change nothing; the others stay refused by the tool's table."""
    tokens = c.value(section)
    for name, token in tokens.items() if isinstance(tokens, dict) else ():
        if token is not None:
            special_token(c, f"{section}.{name}", name, str(token))


def special_token(c: Conversion, key: str, name: str, token: str) -> None:
    """Account for one token, where the run with it is that without it."""
    if name == "pad_token":
        c.ignore(key, "padding is never trained on nor seen")
    elif own_special_tokens(c).get(name) == token:
        c.account(key, "same", reason="it is the base's own")
    elif name == "eos_token" and token == (c.end_of_turn or _own_end_of_turn(c)) and not _has_texts(c):
        reason = "it ends a turn of the chat template, and lorakit trains it and stops at it"
        c.account(key, "same", to="model.chat_template", reason=reason)
        if token == "<|im_end|>" and re.search(_WITHOUT_CHATML, _base_name(c)):
            _add_token(c, token, key)
    elif name == "bos_token" and (text := _template_text(c)) and "bos_token" not in text:
        c.ignore(key, "the chat template writes no beginning of a sequence")


def _base_name(c: Conversion) -> str:
    return str(c.recipe.get("model.base", "")).lower().rstrip("/").rpartition("/")[2]


def _add_token(c: Conversion, token: str, key: str) -> None:
    """Add a token that the base's vocabulary lacks to those that the config adds."""
    before, origins = c.recipe.get("model.add_tokens", []), c.origins.get("model.add_tokens", [])
    if token not in before:
        c.map("model.add_tokens", [*before, token], key)
        c.origins["model.add_tokens"] = [*origins, key]


def _own_end_of_turn(c: Conversion) -> str:
    """The token with which the base's own chat template ends a turn, where its name tells and the recipe keeps it."""
    name = _base_name(c)
    if c.recipe.get("model.chat_template"):
        return ""
    return next((token for pattern, token in _ENDS_OF_TURNS if re.search(pattern, name)), "")


def _has_texts(c: Conversion) -> bool:
    """Whether some rows are texts, which the tokenizer's own end token ends."""
    sources = c.recipe.get("data.train", [])
    sources = sources if isinstance(sources, list) else [sources]
    return any(isinstance(source, dict) and source.get("format") == "text" for source in sources)


def _template_text(c: Conversion) -> str:
    """The chat template that the recipe brings; empty where it is the base's own, or not here."""
    reference = c.recipe.get("model.chat_template")
    if not reference:
        return ""
    written = {str(file): text for file, text in c.files.items()}
    file = template_file(str(reference))
    return written.get(str(reference)) or (file.read_text(encoding="utf-8") if file.is_file() else "")
