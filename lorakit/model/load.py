"""Loading: a base on disk -> its tokenizer and its model in memory, in the asked number format and quantization."""

import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from lorakit.errors import LorakitError, UserError
from lorakit.model.base import Base
from lorakit.recipe.schema import Model
from lorakit.tables import QUANTIZERS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def quiet_libraries() -> None:
    """Keep the libraries' progress bars and advice off the terminal; errors still raise."""
    import datasets
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl|accelerate)\.")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("bitsandbytes", "bitsandbytes.autograd._functions", "trl", "peft", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


def load_tokenizer(base: Base, chat_template: str | None) -> Any:
    """The base's tokenizer with the recipe's chat template, or its own.

    Raises:
        UserError: there is no tokenizer, or no chat template to render conversations with.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.folder)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UserError(f"model.base: {base.name}: the tokenizer cannot be loaded: {_first_line(error)}") from error
    except Exception as error:  # the Rust tokenizers raise bare Exceptions on a damaged tokenizer.json
        raise UserError(f"model.base: {base.name}: tokenizer.json is damaged: {_first_line(error)}") from error
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"model.chat_template: {chat_template} cannot be read: {error}. Save it as UTF-8."
            ) from error
    if not tokenizer.chat_template:
        raise UserError(
            f"model.base: {base.name} has no chat template. Give one with model.chat_template, a .jinja file such as "
            "{% for m in messages %}{{ m['content'] + ('\\n' if m['role'] != 'assistant' else eos_token) }}{% endfor %}"
        )
    return tokenizer


def load_model(base: Base, settings: Model, device: str) -> Any:
    """The causal language model, frozen, in evaluation mode, on `device`.

    Raises:
        UserError: the files are damaged, not a causal language model, or the attention is not to be had.
        LorakitError: it does not fit into memory.
    """
    dtype = DTYPES[settings.dtype]
    quantization = QUANTIZERS[settings.quantization].function(settings, dtype)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": settings.attention, "use_safetensors": True}
    if quantization is not None:
        options |= {"quantization_config": quantization, "device_map": {"": device}}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(base.folder, output_loading_info=True, **options)
    except torch.OutOfMemoryError as error:
        raise LorakitError(
            f"{base.name} does not fit into the memory of {device}. Try model.quantization: nf4."
        ) from error
    except SafetensorError as error:
        raise UserError(
            f"model.base: {base.name}: a weights file is damaged ({error}). Fetch the model again."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        remedy = " Write model.attention: eager." if "attention" in str(error).lower() else ""
        raise UserError(f"model.base: {base.name} cannot be loaded: {_first_line(error)}{remedy}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"model.base: {base.name}: the weights files lack {len(missing)} tensors that the model needs, the first "
            f"is {missing[0]}; they would start out random."
        )
    if quantization is None:
        model = model.to(device)
    for module in model.modules():
        # On processors with AVX512-BF16, bitsandbytes would repack 4-bit weights at the first evaluation, with
        # scales rounded to bfloat16: the adapter would see one base before it and another after it.
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
    return model.requires_grad_(False).eval()


def quantized_share(model: Any) -> float:
    """The share of a quantized model's parameters that are in quantized layers.

    Raises:
        UserError: there are none, or layers of a kind that would not come out of it as they went in.
    """
    from bitsandbytes.nn import Linear4bit

    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    if any(getattr(layer, "source_cls", None) is Conv1D for layer in layers):
        raise UserError(
            "model.quantization: this model's layers are Conv1D, which cannot be merged from 4 bits. Write none."
        )
    if not layers:
        raise UserError("model.quantization: no layer of this model is one that bitsandbytes quantizes. Write none.")
    quantized = sum(layer.in_features * layer.out_features for layer in layers)
    others = sum(parameter.numel() for parameter in model.parameters()) - sum(layer.weight.numel() for layer in layers)
    return quantized / (quantized + others)


def check_vocabulary(model: Any, largest_token: int, name: str) -> None:
    """Refuse rows with tokens for which the model has no embedding."""
    known = model.get_input_embeddings().weight.shape[0]
    if largest_token >= known:
        raise UserError(
            f"model.base: {name}: its tokenizer writes the token {largest_token}, its weights know {known:,} tokens. "
            "Tokenizer and weights do not belong together."
        )


def supports_sdpa(base: Base) -> bool:
    """Whether the model's family has torch's fused attention."""
    try:
        kind = AutoModelForCausalLM._model_mapping[type(AutoConfig.from_pretrained(base.folder))]
    except (OSError, ValueError, KeyError):
        return True  # loading says what is wrong
    return bool(getattr(kind, "_supports_sdpa", False))


def stop_token_ids(base: Base, tokenizer: Any) -> list[int]:
    """Every token at which the base model's own configuration ends an answer.

    Raises:
        UserError: a configuration file is damaged.
    """
    ids: list[Any] = [tokenizer.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        path = base.folder / name
        try:
            configured = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        except (ValueError, AttributeError) as error:
            raise UserError(f"model.base: {path} is damaged: {error}. Fetch the model again.") from error
        ids += configured if isinstance(configured, list) else [configured]
    return sorted({token for token in ids if isinstance(token, int)})


def stop_words(base: Base, tokenizer: Any) -> tuple[str, ...]:
    """The texts of `stop_token_ids`."""
    return tuple(word for word in tokenizer.convert_ids_to_tokens(stop_token_ids(base, tokenizer)) if word)


def stored_dtype(base: Base) -> str:
    """The number format in which the base's weights lie on disk; float32 where its config does not say."""
    config = json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
    named = config.get("dtype") or config.get("torch_dtype") or config.get("text_config", {}).get("dtype")
    return str(named) if named in DTYPES else "float32"


def pad_token_id(tokenizer: Any) -> int:
    """The token that fills short rows up. It is masked everywhere, so any token does where none is set."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
