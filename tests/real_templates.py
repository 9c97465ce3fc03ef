"""The chat templates of published models, as the installed trl ships them (none is copied), each with a small real
tokenizer that has the special tokens that it writes."""

import importlib.util
import re
from functools import lru_cache
from pathlib import Path

from data_families import _trained
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

FOLDER = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training"))

_SPECIAL = re.compile(
    r"<\|\w+\|>|<\|[a-z_]+>|<[a-z_]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_\w+>|\[/?INST\]|\[gMASK\]|<sop>|<image>"
)
# By the beginning of a name: the end token and the beginning of sequence of the tokenizer, and what else ends an answer
# by the model's generation_config.json (read on the models' pages).
_ENDS = {
    "cohere": ("<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", ()),
    "deepseek": ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", ()),
    "diffusion_gemma": ("<eos>", "<bos>", ("<turn|>", "<|tool_response>")),
    "gemma4": ("<eos>", "<bos>", ("<turn|>", "<|tool_response>")),
    "gemma": ("<eos>", "<bos>", ("<end_of_turn>",)),
    "glm": ("<|endoftext|>", None, ("<|user|>", "<|observation|>")),
    "gptoss": ("<|return|>", "<|startoftext|>", ("<|call|>", "<|endoftext|>")),
    "idefics3": ("<end_of_utterance>", "<|begin_of_text|>", ()),
    "lfm2": ("<|im_end|>", "<|startoftext|>", ()),
    "llama3": ("<|eot_id|>", "<|begin_of_text|>", ("<|end_of_text|>", "<|eom_id|>")),
    "llava": ("</s>", "<s>", ()),
    "muse": ("<|eot|>", "<|begin_of_text|>", ()),
    "phi3": ("<|endoftext|>", "<s>", ("<|end|>",)),
    "smolvlm": ("<end_of_utterance>", "<|im_start|>", ()),
}


def _ends(name: str) -> tuple[str, str | None, tuple[str, ...]]:
    known = (ends for beginning, ends in _ENDS.items() if name.startswith(beginning))
    return next(known, ("<|im_end|>", None, ("<|endoftext|>",)))


def stop_words(name: str) -> tuple[str, ...]:
    """What ends an answer besides the end token."""
    return _ends(name)[2]


@lru_cache
def tokenizer_of(name: str, marked: bool = False) -> PreTrainedTokenizerFast | None:
    """A tokenizer with the template; `marked`: with trl's twin, which marks what is generated, None where there is
    none."""
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    eos, bos, stops = _ends(name)
    inner = Tokenizer.from_str(_trained("bytes"))
    words = dict.fromkeys(word for word in (bos, eos, *stops, *sorted(_SPECIAL.findall(source))) if word)
    inner.add_special_tokens([AddedToken(word, normalized=False) for word in words])
    if marked and "endgeneration" not in source:
        twin = FOLDER / f"{name}_training.jinja"
        if not twin.exists():
            return None
        source = twin.read_text(encoding="utf-8")
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=source, bos_token=bos, eos_token=eos)
