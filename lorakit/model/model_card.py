"""What model cards say alike: the name of a base on the hub, and how it was quantized, as code that loads it."""

import re
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from lorakit.recipe.schema import Model

REPOSITORY = "ORG/NAME"
"""What a card calls its repository until it is known: `lorakit push` writes the real one."""
_FOUR_BITS = 'load_in_4bit=True, bnb_4bit_quant_type="{kind}", bnb_4bit_use_double_quant={double}'
_LOADS = {"nf4": (_FOUR_BITS, "nf4"), "q4": (_FOUR_BITS, "fp4"), "q8": ("load_in_8bit=True", "")}
# As the hub's own cache names the folder of a model's commit.
_SNAPSHOT = re.compile(r"/models--(?P<owner>[^/]+)--(?P<name>[^/]+)/snapshots/[^/]+/?$")


def quantization_argument(model: Model) -> str:
    """The argument of `from_pretrained` by which a base is held as in training; empty where it is not quantized."""
    config, bits = _LOADS.get(model.quantization, ("", ""))
    config = config.format(kind=bits, double=model.double_quant)
    return f"quantization_config=BitsAndBytesConfig({config})" if config else ""


def hub_id(name: str) -> str | None:
    """The id on the hub of a base of this name; None for a folder or a file of this machine, which has none."""
    if in_cache := _SNAPSHOT.search(name):
        return f"{in_cache['owner']}/{in_cache['name']}"
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if Path(name).exists() or name.endswith(".gguf") else name
