"""Chat templates by name, for base models without a chat format: the files of this folder, and what each needs."""

import re
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"[\w-]+")


@dataclass(frozen=True)
class NamedTemplate:
    """A chat template that comes with lorakit. `suits`: the bases that it is meant for. `tokens`: what it writes that
    must be one token of the vocabulary each. `end_of_turn`: the one after an answer; None is the tokenizer's end
    token."""

    suits: str
    tokens: tuple[str, ...]
    end_of_turn: str | None = None


CHAT_TEMPLATES = {
    "chatml": NamedTemplate(
        "Qwen and whatever has ChatML's tokens", ("<|im_start|>", "<|im_end|>"), end_of_turn="<|im_end|>"
    ),
    "chatml-tools": NamedTemplate(
        "the same, with tools as Hermes and Qwen 2.5 have them",
        ("<|im_start|>", "<|im_end|>"),
        end_of_turn="<|im_end|>",
    ),
    "llama-3": NamedTemplate(
        "Llama 3 to 3.3",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        end_of_turn="<|eot_id|>",
    ),
    "llama-3-tools": NamedTemplate(
        "Llama 3.1 to 3.3, with tools as they have them",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        end_of_turn="<|eot_id|>",
    ),
    "gemma": NamedTemplate("Gemma 1 to 3", ("<start_of_turn>", "<end_of_turn>"), end_of_turn="<end_of_turn>"),
    "mistral": NamedTemplate("Mistral from its tokenizer v3 on", ("[INST]", "[/INST]")),
    "mistral-tools": NamedTemplate(
        "the same, with tools",
        (
            *("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
            *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ),
    ),
    "phi-3": NamedTemplate(
        "Phi 3 and 3.5",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        end_of_turn="<|end|>",
    ),
    "phi-4": NamedTemplate("Phi 4", ("<|im_start|>", "<|im_sep|>", "<|im_end|>"), end_of_turn="<|im_end|>"),
    "zephyr": NamedTemplate("any base whose tokenizer has an end token: its marks are plain text", ()),
}
"""By name. The texts are those of the families' own templates for conversations; the files are lorakit's own."""


def is_template_name(text: str) -> bool:
    """Whether `model.chat_template` names a template (a word without a dot or a slash) or a file."""
    return _NAME.fullmatch(text) is not None


def is_named(reference: str | None) -> bool:
    """Whether `model.chat_template` is a template of this lorakit's."""
    return reference in CHAT_TEMPLATES


def template_file(reference: str) -> Path:
    """The file of `model.chat_template`: of a template's name, or of an absolute path."""
    return Path(__file__).with_name(f"{reference}.jinja") if is_template_name(reference) else Path(reference)
