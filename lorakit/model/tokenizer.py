"""A base model's tokenizer, and the tokens that it ends answers with; without what loading a model needs."""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from lorakit.errors import BaseModelError, UserError, first_line
from lorakit.model.config_values import is_size, read_json
from lorakit.model.resolve import Base
from lorakit.recipe.chat_templates import is_template_name, template_file

# What transformers raises on files that are damaged, or hold values that it cannot compute with.
DAMAGED = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError),
    StrictDataclassError,
)


def quiet_libraries() -> None:
    """Keep the libraries' progress bars and advice off the terminal; errors still raise."""
    import huggingface_hub
    import transformers
    from transformers import dynamic_module_utils

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # the variable of this name is read too early
    # `datasets` reads these when it is imported, which takes half a second and not every command does.
    os.environ |= {"HF_UPDATE_DOWNLOAD_COUNTS": "0", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl|accelerate)\.")
    # PEFT sets right by itself what it warns of: the same adapter fits Conv1D and the quantized layer made from it.
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", module=r"peft\.")
    warnings.filterwarnings("ignore", module=r"peft\.")  # lorakit looks for itself at what they warn of
    # train/setup.py says where the states are then.
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # no question at the terminal whether to run code
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("bitsandbytes", "bitsandbytes.autograd._functions", "trl", "peft", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


def load_tokenizer(base: Base, chat_template: str | None) -> Any:
    """The base's tokenizer, with the chat template that is given (a name of lorakit's, or a path) or its own if any;
    UserError where one cannot be read."""
    config = _brief_config(base.folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.folder, config=config, trust_remote_code=False)
        tokenizer("a")  # some values of its configuration, such as model_max_length, are only read here
    except Exception as error:  # the Rust tokenizers raise bare Exceptions on a damaged tokenizer.json
        if (base.folder / "config.json").is_file():  # which transformers reads for a tokenizer as well
            try:
                AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
            except (*DAMAGED, ImportError, RecursionError) as damage:
                reason = f"{base.name}: its config.json cannot be read: {describe_load_error(damage)}"
                raise BaseModelError(f"{reason}. Fetch the model again, or update transformers.") from damage
        raise BaseModelError(f"{base.name}: the tokenizer cannot be loaded: {describe_load_error(error)}.") from error
    sizes = read_json(base.folder / "config.json")
    vocabulary: Any = sizes.get("vocab_size") or (sizes.get("text_config") or {}).get("vocab_size")
    if is_size(vocabulary) and (tokenizer.pad_token_id or 0) >= vocabulary:
        tokenizer.pad_token = None  # the model has no embedding for it; `pad_token_id` takes another
    named = tokenizer.chat_template
    if isinstance(named, dict) and "default" not in named:  # transformers takes none of them unasked
        tokenizer.chat_template, tokenizer.named_templates = None, sorted(named)
    if chat_template is not None:
        try:
            tokenizer.chat_template = template_file(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            if is_template_name(chat_template):
                raise UserError(f"model.chat_template: this version of lorakit has no {chat_template}.") from error
            problem = f"{chat_template} cannot be read: {error}"
            raise UserError(f"model.chat_template: {problem}. Save it as UTF-8.") from error
    return tokenizer


def _brief_config(folder: Path) -> PreTrainedConfig | None:
    """What `AutoTokenizer` reads of a model's configuration where tokenizer_config.json names its class. None where it
    does not, and `AutoTokenizer` reads the whole: that imports the library's model code, for a second."""
    config, own = read_json(folder / "config.json"), read_json(folder / "tokenizer_config.json")
    if not isinstance(config.get("model_type"), str) or not own.get("tokenizer_class") or "auto_map" in config | own:
        return None
    brief = PreTrainedConfig(name_or_path=str(folder))
    brief.model_type = config["model_type"]
    return brief


def stop_token_ids(base: Base, tokenizer: Any) -> list[int]:
    """Every token at which the base model's own configuration ends an answer."""
    ids: list[Any] = [tokenizer.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        configured = read_json(base.folder / name).get("eos_token_id")
        ids += configured if isinstance(configured, list) else [configured]
    return sorted({token for token in ids if isinstance(token, int)})


def stop_words(base: Base, tokenizer: Any) -> tuple[str, ...]:
    """The texts of `stop_token_ids`."""
    return tuple(word for word in tokenizer.convert_ids_to_tokens(stop_token_ids(base, tokenizer)) if word)


def pad_token_id(tokenizer: Any) -> int:
    """The token that pads short rows. It is masked everywhere, so any token does where none is set."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)


def describe_load_error(error: Exception) -> str:
    """A library's error in a line."""
    if isinstance(error, KeyError):
        return f"{first_line(error)} is missing, or not known to transformers"
    return first_line(error)
