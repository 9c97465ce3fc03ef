"""What the tests of rendering and encoding share: chat templates in the manner of the published families, and small
real tokenizers of every kind.

Each family says by itself what a trained turn must be: `turn(message)` is the text that the labels decode to.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import data_family_templates as plain
import data_family_templates_with_tools as tooled
import data_family_turns as turns
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lorakit.data.rows import Message

TEXT = [
    "You are a helpful assistant. user system model assistant final [INST] [/INST] <<SYS>> <</SYS>>\n\n",
    "What is the capital of France? The capital of France is Paris.\nHello there, how are you today?\n\n",
    "Un été à la mer, naïve façade. Привет мир. 你好 世界 😀 שלום עולם\n  - a list\n  - of things\n",
    '{"name": "lorakit", "version": "1.0"} def main(): return 0 <think>\n\n</think>\n\n think about it',
]

# Like most tokenizers after it, and unlike GPT-2's, Llama 3's takes line breaks together.
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@lru_cache
def _trained(kind: str) -> str:
    """The JSON of a tokenizer without special tokens."""
    if kind.startswith("bytes"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "bytes with a leading space")
        if kind == "bytes":
            words = pre_tokenizers.Split(Regex(LLAMA_3_WORDS), "isolated")
            whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, whole])
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(TEXT * 3, trainer)
        return tokenizer.to_str()
    scheme = kind.removeprefix("pieces, space ")
    tokenizer = Tokenizer(models.BPE())
    # As SentencePiece learns: no piece goes beyond a space, and line breaks are left to the bytes.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    lines = [line for text in TEXT for line in text.splitlines()]
    tokenizer.train_from_iterator(lines * 3, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    model = json.loads(tokenizer.to_str())["model"]
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    vocab |= {piece: len(vocab) + at for at, piece in enumerate(model["vocab"])}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer.model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer.to_str()


TOKENIZERS = (
    "bytes",
    "bytes, GPT-2 words",
    "bytes with a leading space",
    "pieces, space first",
    "pieces, space always",
)


@dataclass(frozen=True)
class Family:
    """A chat template with its special tokens, and what it makes of an answer."""

    template: str
    turn: Callable[[Message], str]
    eos: str
    bos: str | None = None
    special: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    strips: bool = False
    """The special tokens swallow the white space behind them."""
    tools: bool = False
    """It writes tools, calls and what they give."""
    thinking: bool = False
    """It writes the thinking of an answer."""
    json_text: bool = False
    """It wants the arguments of calls as JSON text."""
    system: bool = True
    """It takes a system prompt."""

    def tokenizer(self, kind: str = "bytes") -> PreTrainedTokenizerFast:
        inner = Tokenizer.from_str(_trained(kind))
        words = dict.fromkeys([word for word in (self.bos, self.eos, *self.special) if word])
        inner.add_special_tokens([AddedToken(word, rstrip=self.strips, normalized=False) for word in words])
        names = {"bos_token": self.bos, "eos_token": self.eos}
        if kind.startswith("pieces"):
            names["unk_token"] = "<unk>"
        return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=self.template, **names)


_IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_CHANNELS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|endoftext|>")
_COMMANDS = tuple(f"<|{name}_TOKEN|>" for name in ("START_OF_TURN", "END_OF_TURN", "SYSTEM", "USER", "CHATBOT"))
_HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>", "<|eom_id|>")
_TOOL_MARKS = [f"tool▁{what}▁{edge}" for what in ("calls", "call", "output") for edge in ("begin", "end")]
_DEEPSEEK = tuple(f"<｜{name}｜>" for name in ("User", "Assistant", "tool▁sep", *_TOOL_MARKS))
_ROLES = ("<|user|>", "<|assistant|>", "<|system|>")
_IM_END = turns.as_given("<|im_end|>")
_GEMMA = {
    "turn": turns.stripped("<end_of_turn>"),
    "eos": "<eos>",
    "bos": "<bos>",
    "special": ("<start_of_turn>", "<end_of_turn>"),
    "stops": ("<end_of_turn>",),
}
FAMILIES = {
    "chatml": Family(plain.chatml(), _IM_END, "<|im_end|>", None, _IM),
    "chatml, generation marks": Family(plain.GENERATION_MARKS, _IM_END, "<|im_end|>", None, _IM),
    "chatml, another eos": Family(plain.chatml(), _IM_END, "<|endoftext|>", None, _IM),
    "smollm 2": Family(plain.SMOLLM_2, _IM_END, "<|im_end|>", "<|im_start|>", _IM),
    "smollm 3": Family(
        plain.SMOLLM_3, lambda message: message["content"].lstrip("\n") + "<|im_end|>", "<|im_end|>", None, _IM
    ),
    "llama 2": Family(plain.LLAMA_2, lambda message: f" {message['content'].strip()} </s>", "</s>", "<s>"),
    "llama 3": Family(plain.LLAMA_3, turns.stripped("<|eot_id|>"), "<|eot_id|>", "<|begin_of_text|>", _HEADERS),
    "llama 3.1": Family(
        plain.LLAMA_3_1, turns.llama_3_1, "<|eot_id|>", "<|begin_of_text|>", _HEADERS, ("<|eom_id|>",), tools=True
    ),
    "mistral": Family(plain.MISTRAL, turns.as_given("</s>"), "</s>", "<s>", ("[INST]", "[/INST]")),
    "mistral, plain marks": Family(plain.MISTRAL, turns.as_given("</s>"), "</s>", "<s>"),
    "mistral 3": Family(
        plain.MISTRAL_3,
        turns.mistral_3,
        "</s>",
        "<s>",
        ("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]"),
        tools=True,
    ),
    "gemma 2": Family(plain.GEMMA_2, system=False, **_GEMMA),
    "gemma 3": Family(plain.GEMMA_3, **_GEMMA),
    "phi 3": Family(
        plain.PHI_3, turns.as_given("<|end|>"), "<|endoftext|>", "<s>", (*_ROLES, "<|end|>"), ("<|end|>",), strips=True
    ),
    "phi 4": Family(plain.PHI_4, _IM_END, "<|im_end|>", "<|endoftext|>", (*_IM, "<|im_sep|>")),
    "zephyr": Family(plain.ZEPHYR, turns.as_given("</s>"), "</s>", "<s>"),
    "qwen 2.5": Family(
        tooled.QWEN_2_5, lambda message: turns.hermes(message["content"], message), "<|im_end|>", None, _IM, tools=True
    ),
    "qwen 3": Family(tooled.QWEN_3, turns.qwen_3, "<|im_end|>", None, _IM, tools=True, thinking=True),
    "qwen 3.5": Family(
        tooled.QWEN_3_5,
        lambda message: turns.qwen_3(message).removeprefix("<think>\n"),
        "<|im_end|>",
        None,
        _IM,
        tools=True,
        thinking=True,
    ),
    "deepseek 3": Family(
        tooled.DEEPSEEK_3,
        turns.deepseek_3,
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>",
        _DEEPSEEK,
        tools=True,
        json_text=True,
    ),
    "deepseek r1": Family(
        tooled.DEEPSEEK_R1, turns.deepseek_3, "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", _DEEPSEEK
    ),
    "harmony": Family(
        tooled.HARMONY, turns.harmony, "<|return|>", None, _CHANNELS, ("<|call|>",), tools=True, thinking=True
    ),
    "glm 4": Family(
        tooled.GLM_4,
        turns.glm_4,
        "<|endoftext|>",
        None,
        ("[gMASK]", "<sop>", "<|observation|>", *_ROLES),
        ("<|user|>", "<|observation|>"),
        tools=True,
    ),
    "command r": Family(
        tooled.COMMAND_R, turns.command_r, "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", _COMMANDS, tools=True
    ),
}


def chat(*texts: str, system: str | None = None) -> list[Message]:
    """Questions and answers in turn."""
    messages = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def answer(content: str = "", **more: Any) -> Message:
    """An assistant's message."""
    return {"role": "assistant", "content": content, **more}


def call(name: str = "weather", **arguments: Any) -> dict[str, Any]:
    """A call of a tool, with an id as Mistral wants it."""
    return {"type": "function", "id": "abcdef123", "function": {"name": name, "arguments": arguments}}


def result(content: str) -> Message:
    """What a tool gives."""
    return {"role": "tool", "content": content, "name": "weather", "tool_call_id": "abcdef123"}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
