"""What the tests of rendering and encoding share: chat templates in the manner of the published families, and small
real tokenizers of every kind.

Each family says by itself what a trained turn must be: `turn(content, last)` is the text that the labels decode to.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

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
    turn: Callable[[str, bool], str]
    eos: str
    bos: str | None = None
    special: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    strips: bool = False
    """The special tokens swallow the white space behind them."""

    def tokenizer(self, kind: str = "bytes") -> PreTrainedTokenizerFast:
        inner = Tokenizer.from_str(_trained(kind))
        words = dict.fromkeys([word for word in (self.bos, self.eos, *self.special) if word])
        inner.add_special_tokens([AddedToken(word, rstrip=self.strips, normalized=False) for word in words])
        names = {"bos_token": self.bos, "eos_token": self.eos}
        if kind.startswith("pieces"):
            names["unk_token"] = "<unk>"
        return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=self.template, **names)


def _chatml(answer: str = "{{ m.content + '<|im_end|>' }}", before: str = "") -> str:
    return (
        before
        + "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        + "{% if m.role == 'assistant' %}"
        + answer
        + "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


_DEFAULT_SYSTEM = """\
{%- if messages[0].role != 'system' -%}
  {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}"""

_LLAMA_2 = """\
{%- if messages[0].role == 'system' -%}
  {%- set system, chat = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n', messages[1:] -%}
{%- else -%}
  {%- set system, chat = '', messages -%}
{%- endif -%}
{%- for m in chat -%}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('after the system prompt the roles must alternate user/assistant') -}}
  {%- endif -%}
  {%- if m.role == 'user' -%}
    {{- bos_token + '[INST] ' + ((system if loop.first else '') + m.content).strip() + ' [/INST]' -}}
  {%- else -%}
    {{- ' ' + m.content.strip() + ' ' + eos_token -}}
  {%- endif -%}
{%- endfor -%}"""

_LLAMA_3 = """\
{%- for m in messages -%}
  {{- (bos_token if loop.first else '') + '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' -}}
  {{- m.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"""

_MISTRAL = """\
{{- bos_token -}}
{%- set ns = namespace(system='') -%}
{%- for m in messages -%}
  {%- if m.role == 'system' -%}
    {%- set ns.system = m.content + '\\n\\n' -%}
  {%- elif m.role == 'user' -%}
    {{- '[INST] ' + ns.system + m.content + ' [/INST]' -}}{%- set ns.system = '' -%}
  {%- elif m.role == 'assistant' -%}
    {{- m.content + eos_token -}}
  {%- else -%}
    {{- raise_exception('only user, system and assistant are supported') -}}
  {%- endif -%}
{%- endfor -%}"""

_GEMMA = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}{{- raise_exception('System role not supported') -}}{%- endif -%}
{%- for m in messages -%}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{- raise_exception('roles must alternate') -}}{%- endif -%}
  {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim -}}
  {{- '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"""

_PHI_3 = """\
{%- for m in messages -%}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- else -%}{{- eos_token -}}{%- endif -%}"""

_ZEPHYR = """\
{%- for m in messages -%}
  {{- '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"""

_QWEN_3 = """\
{%- set ns = namespace(question=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.question = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    {%- set thought, said = '', m.content -%}
    {%- if '</think>' in said -%}
      {%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
      {%- set said = said.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if loop.index0 > ns.question and (loop.last or thought) -%}
      {{- '<think>\\n' + thought + '\\n</think>\\n\\n' + said.lstrip('\\n') -}}
    {%- else -%}
      {{- said -}}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
  {%- else -%}
    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


def _qwen_3_turn(content: str, last: bool) -> str:
    thought = ""
    if "</think>" in content:
        thought = content.split("</think>")[0].split("<think>")[-1].strip("\n")
        content = content.split("</think>")[-1].lstrip("\n")
    said = f"<think>\n{thought}\n</think>\n\n" + content.lstrip("\n") if last else content
    return said + "<|im_end|>"


_DEEPSEEK = """\
{{- bos_token -}}
{%- for m in messages -%}{%- if m.role == 'system' -%}{{- m.content -}}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}{{- '<｜User｜>' + m.content -}}{%- endif -%}
  {%- if m.role == 'assistant' -%}{{- '<｜Assistant｜>' + m.content + eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜>' -}}{%- endif -%}"""

_HARMONY = """\
{{- '<|start|>system<|message|>You are a helpful assistant.<|end|>' -}}
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    {{- '<|start|>assistant<|channel|>final<|message|>' + m.content -}}
    {{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' -}}
  {%- else -%}
    {{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}"""

_COMMAND_R = """\
{{- bos_token -}}
{%- set names = {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'} -%}
{%- for m in messages -%}
  {{- '<|START_OF_TURN_TOKEN|><|' + names[m.role] + '_TOKEN|>' + m.content.strip() + '<|END_OF_TURN_TOKEN|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' -}}{%- endif -%}"""

_IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_CHANNELS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|endoftext|>")
_COMMANDS = tuple(f"<|{name}_TOKEN|>" for name in ("START_OF_TURN", "END_OF_TURN", "SYSTEM", "USER", "CHATBOT"))


def _as_given(stop: str) -> Callable[[str, bool], str]:
    return lambda content, last: content + stop


def _stripped(stop: str) -> Callable[[str, bool], str]:
    return lambda content, last: content.strip() + stop


_IM_END = _as_given("<|im_end|>")
FAMILIES = {
    "chatml": Family(_chatml(), _IM_END, "<|im_end|>", None, _IM),
    "chatml, default system prompt": Family(
        _chatml(before=_DEFAULT_SYSTEM), _IM_END, "<|im_end|>", "<|im_start|>", _IM
    ),
    "chatml, generation marks": Family(
        _chatml("{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"), _IM_END, "<|im_end|>", None, _IM
    ),
    "chatml, another eos": Family(_chatml(), _IM_END, "<|endoftext|>", None, _IM),
    "llama 2": Family(_LLAMA_2, lambda content, last: f" {content.strip()} </s>", "</s>", "<s>"),
    "llama 3": Family(
        _LLAMA_3,
        _stripped("<|eot_id|>"),
        "<|eot_id|>",
        "<|begin_of_text|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
    ),
    "mistral": Family(_MISTRAL, _as_given("</s>"), "</s>", "<s>", ("[INST]", "[/INST]")),
    "mistral, plain marks": Family(_MISTRAL, _as_given("</s>"), "</s>", "<s>"),
    "gemma": Family(
        _GEMMA, _stripped("<end_of_turn>"), "<eos>", "<bos>", ("<start_of_turn>", "<end_of_turn>"), ("<end_of_turn>",)
    ),
    "phi 3": Family(
        _PHI_3,
        _as_given("<|end|>"),
        "<|endoftext|>",
        "<s>",
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        ("<|end|>",),
        strips=True,
    ),
    "zephyr": Family(_ZEPHYR, _as_given("</s>"), "</s>", "<s>"),
    "qwen 3": Family(_QWEN_3, _qwen_3_turn, "<|im_end|>", None, _IM),
    "deepseek": Family(
        _DEEPSEEK,
        _as_given("<｜end▁of▁sentence｜>"),
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>",
        ("<｜User｜>", "<｜Assistant｜>"),
    ),
    "harmony": Family(
        _HARMONY,
        lambda content, last: "<|channel|>final<|message|>" + content + ("<|return|>" if last else "<|end|>"),
        "<|return|>",
        None,
        _CHANNELS,
        ("<|end|>",),
    ),
    "command r": Family(
        _COMMAND_R, _stripped("<|END_OF_TURN_TOKEN|>"), "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", _COMMANDS
    ),
}


def chat(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """Questions and answers in turn."""
    messages = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]
