"""Whether transformers builds of a base the tokenizer that its tokenizer.json describes.

For many classes (Llama's, Gemma's, Qwen 2's, GPT-2's) transformers 5 takes vocabulary and merges from that file, and
normalizer and pre-tokenizer from the class (`convert_to_native_format` in its tokenization_utils_tokenizers.py). Other
programs take all of it from the file, transformers 4 among them.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers
from transformers import PreTrainedTokenizerFast

from lorakit.model.tokenizer_files import CONFIG, read_tokenizer, set_keys, tokenizer_files
from lorakit.recipe.problem import quote

_FILE_CLASS = "PreTrainedTokenizerFast"
_SHOWN = 8


def compare_with_file(base: Path, tokenizer: Any, texts: Sequence[str]) -> str | None:
    """In words, that a tokenizer gives other tokens of some texts than the base's tokenizer.json; None where it does
    not.

    Args:
        base: the folder that the tokenizer was loaded from.
        texts: of the rows that are trained on.
    """
    if type(tokenizer) is PreTrainedTokenizerFast or not (base / "tokenizer.json").is_file():
        return None
    by_file = PreTrainedTokenizerFast.from_pretrained(base, trust_remote_code=False)
    pairs = [tuple(one(text, add_special_tokens=False)["input_ids"] for one in (tokenizer, by_file)) for text in texts]
    differing = [at for at, (ours, its) in enumerate(pairs) if ours != its]
    if not differing:
        return None
    ours, its = pairs[differing[0]]
    first = next((at for at, (one, other) in enumerate(zip(ours, its, strict=False)) if one != other), len(its) - 1)
    begin = max(first - 1, 0)
    words, others = (
        " ".join(quote(str(word)) for word in one.convert_ids_to_tokens(ids[begin : begin + _SHOWN]))
        for one, ids in ((tokenizer, ours), (by_file, its))
    )
    return (
        f"transformers {transformers.__version__} builds another tokenizer ({type(tokenizer).__name__}) than "
        f"tokenizer.json describes. {len(differing)} of {len(texts)} rows that were compared get other tokens, the "
        f"first {words} where the file gives {others}. The run is trained on those of transformers; programs that go "
        f"by the file give the model others.{_remedy(base, tokenizer)}"
    )


def _remedy(base: Path, tokenizer: Any) -> str:
    """What makes transformers go by the file, where anything does: of some families it knows better, whatever a model
    says."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        for file in [*tokenizer_files(base, tokenizer), base / "config.json"]:
            if file.parent == base:
                shutil.copyfile(file, folder / file.name)
        set_keys(folder / CONFIG, tokenizer_class=_FILE_CLASS)
        if type(read_tokenizer(folder)) is not PreTrainedTokenizerFast:
            return ""
    return (
        f' To train on those of the file, give a copy of the base with "tokenizer_class": "{_FILE_CLASS}" in {CONFIG}.'
    )
