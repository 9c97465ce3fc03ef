"""Loading: a base on disk -> its tokenizer and its model in memory, in the asked number format and quantization."""

import json
import logging
import math
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from lorakit.errors import LorakitError, UserError
from lorakit.model.config_values import is_size
from lorakit.model.positions import learned_positions
from lorakit.model.quantization_config import check_quantization
from lorakit.model.quantized_model import (
    cast_unquantized,
    forget_conversions,
    summarize_quantization,
    unify_layer_modes,
)
from lorakit.model.resolve import Base
from lorakit.model.spec_from_meta import meta_model
from lorakit.recipe.schema import Model
from lorakit.registry import QUANTIZERS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What transformers raises on files that are damaged, or hold values that it cannot compute with.
_DAMAGED = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError),
    StrictDataclassError,
)


def quiet_libraries() -> None:
    """Keep the libraries' progress bars and advice off the terminal; errors still raise."""
    import datasets
    import huggingface_hub
    import transformers
    from transformers import dynamic_module_utils

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # the variable of this name is read too early
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl|accelerate)\.")
    # PEFT sets right by itself what it warns of: the same adapter fits Conv1D and the quantized layer made from it.
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", module=r"peft\.")
    warnings.filterwarnings("ignore", module=r"peft\.")  # lorakit looks for itself at what they warn of
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # no question at the terminal whether to run code
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("bitsandbytes", "bitsandbytes.autograd._functions", "trl", "peft", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


def load_tokenizer(base: Base, chat_template: str | None) -> Any:
    """The base's tokenizer with the recipe's chat template, or its own where it has one: texts need none.

    Raises:
        UserError: there is no tokenizer, or the recipe's chat template cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.folder, trust_remote_code=False)
        tokenizer("a")  # some values of its configuration, such as model_max_length, are only looked at here
    except (OSError, ValueError, KeyError, TypeError, ImportError, ArithmeticError, StrictDataclassError) as error:
        _refuse_config(base)
        raise UserError(f"model.base: {base.name}: the tokenizer cannot be loaded: {_first_line(error)}") from error
    except Exception as error:  # the Rust tokenizers raise bare Exceptions on a damaged tokenizer.json
        _refuse_config(base)
        raise UserError(f"model.base: {base.name}: tokenizer.json is damaged: {_first_line(error)}") from error
    if (tokenizer.pad_token_id or 0) >= _vocabulary(base):
        tokenizer.pad_token = None  # the model has no embedding for it; `pad_token_id` takes another
    named = tokenizer.chat_template
    if isinstance(named, dict) and "default" not in named:  # transformers takes none of them unasked
        tokenizer.chat_template, tokenizer.named_templates = None, sorted(named)
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"model.chat_template: {chat_template} cannot be read: {error}. Save it as UTF-8."
            ) from error
    return tokenizer


def _vocabulary(base: Base) -> float:
    """The tokens that the base's config counts; infinite where it does not say."""
    file = base.folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    size: Any = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return int(size) if is_size(size) else math.inf


def _refuse_config(base: Base) -> None:
    """Refuse a config.json that transformers cannot read, which it reads for a tokenizer as well."""
    if (base.folder / "config.json").is_file():
        try:
            AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
        except (*_DAMAGED, ImportError, RecursionError) as error:
            raise UserError(
                f"model.base: {base.name}: its config.json cannot be read: {_first_line(error).rstrip('.')}. Fetch the "
                "model again, or update transformers."
            ) from error


def load_model(base: Base, settings: Model, device: str, trainable: bool = False) -> Any:
    """The causal language model on `device`, in evaluation mode: frozen, or `trainable`.

    A trainable model is unquantized and in float32, whatever type it computes in; what of it is trained is left to
    the caller.

    Raises:
        UserError: the files are damaged, not a causal language model, quantized in a way that does not go with the
            settings, or the attention is not to be had.
        LorakitError: it does not fit into memory.
    """
    stored = check_quantization(base, settings, trainable)
    dtype = torch.float32 if trainable else DTYPES[settings.dtype]
    quantization = QUANTIZERS[settings.quantization].function(settings, dtype)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": settings.attention, "use_safetensors": True}
    if quantization is not None:
        options |= {"quantization_config": quantization}
    if quantization is not None or stored:
        options |= {"device_map": {"": device}}
    try:
        if stored and stored.treatment == "dequantized":
            options |= {"config": _dequantizing(base)}
        model, info = AutoModelForCausalLM.from_pretrained(
            base.folder, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False, **options
        )
    except torch.OutOfMemoryError as error:
        remedy = (
            "Train an adapter instead, such as adapter.kind: lora." if trainable else "Try model.quantization: nf4."
        )
        raise LorakitError(f"{base.name} does not fit into the memory of {device}. {remedy}") from error
    except SafetensorError as error:
        raise UserError(
            f"model.base: {base.name}: a weights file is damaged ({error}). Fetch the model again."
        ) from error
    except (*_DAMAGED, ImportError, RuntimeError) as error:
        remedy = " Write model.attention: eager." if "attention" in str(error).lower() else ""
        raise UserError(f"model.base: {base.name} cannot be loaded: {_first_line(error)}{remedy}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"model.base: {base.name}: the weights files lack {len(missing)} tensors that the model needs, the first "
            f"is {missing[0]}; they would start out random."
        )
    _check_shapes(model, info["mismatched_keys"], base)
    if quantization is not None and summarize_quantization(model) is None:
        raise UserError("model.quantization: no layer of this model is one that bitsandbytes quantizes. Write none.")
    if stored and stored.reversible:  # the layers of the others ask for a type of their own
        cast_unquantized(model, dtype)
    if model.dtype != dtype:
        given = str(model.dtype).removeprefix("torch.")
        raise UserError(
            f"model.dtype: {base.name} can only be loaded in {given} here, not in {settings.dtype}. Write {given}."
        )
    if quantization is None and not stored:
        model = model.to(device)
    if stored and stored.treatment == "dequantized":
        forget_conversions(model)
    unify_layer_modes(model, dtype)
    return model.eval() if trainable else model.requires_grad_(False).eval()


def _check_shapes(model: Any, mismatched: Any, base: Base) -> None:
    """Refuse weights of other shapes than the config asks for.

    transformers compares those of plain layers; a quantized layer takes whatever the file holds.
    """
    odd = [(name, tuple(given), tuple(asked)) for name, given, asked in mismatched]
    for name, module in model.named_modules():
        if isinstance(module, (Linear4bit, Linear8bitLt)):
            weight, asked = module.weight, (module.out_features, module.in_features)
            given = tuple(weight.quant_state.shape if isinstance(module, Linear4bit) else weight.shape)
            if given != asked:
                odd.append((f"{name}.weight", given, asked))
    if odd:
        name, given, asked = min(odd)
        raise UserError(
            f"model.base: {base.name}: config.json and the weights do not fit each other: {name} is of shape {given} "
            f"in the files, and {asked} by the config ({len(odd)} such in all). Fetch the model again."
        )


def original_weights(base: Base, modules: list[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The unquantized weights (out, in) of linear layers as they lie on disk, by path, in `dtype` on the CPU."""
    plain = Model(base=base.name, attention="eager").model_copy(update={"dtype": stored_dtype(base)})
    model = load_model(base, plain, "cpu")
    layers = {name: model.get_submodule(name) for name in modules}
    turned = {name: layer.weight.T if isinstance(layer, Conv1D) else layer.weight for name, layer in layers.items()}
    return {name: weight.detach().to(dtype, copy=True) for name, weight in turned.items()}


def _dequantizing(base: Base) -> Any:
    """The checkpoint's configuration, told to turn its weights into plain ones while they are loaded."""
    config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
    holder = config if getattr(config, "quantization_config", None) else config.get_text_config()
    holder.quantization_config["dequantize"] = True
    return config


def check_vocabulary(model: Any, largest_token: int, name: str) -> None:
    """Refuse rows with tokens for which the model has no embedding."""
    known = model.get_input_embeddings().weight.shape[0]
    if largest_token >= known:
        raise UserError(
            f"model.base: {name}: token id {largest_token} is out of range (vocabulary size {known:,}). Its tokenizer "
            "and its weights do not belong together."
        )


def check_tied(model: Any, base: Base) -> None:
    """Refuse a base that ties its embeddings by its config, and whose files hold two that differ: transformers leaves
    them apart, other programs do not, and no merged model would be what was trained."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if outputs is None or outputs.weight is inputs.weight:
        return
    empty = meta_model(base.folder)
    if empty.get_output_embeddings().weight is not empty.get_input_embeddings().weight:
        return
    raise UserError(
        f"model.base: {base.name}: input and output embeddings are one weight by its config.json, and two in its "
        "files. Write tie_word_embeddings: false into the config.json."
    )


def check_positions(model: Any, longest: int, name: str) -> None:
    """Refuse rows that are longer than the model has position embeddings for.

    What the config says of its positions was compared before (lorakit.plan.row_limits); this asks the model itself.
    """
    limit = learned_positions(model)
    if limit is not None and longest > limit:
        raise UserError(
            f"{name}: the longest row has {longest:,} tokens, and the model has {limit:,} positions, each with an "
            f"embedding of its own, and none for more. Leave longer rows out: data.max_length: {limit}."
        )


def attentions_of(base: Base) -> tuple[str, ...]:
    """The attention implementations that the model's family has, of those that a recipe names."""
    try:
        config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
        kind = AutoModelForCausalLM._model_mapping[type(config)]
    except (*_DAMAGED, ImportError):
        return ("eager", "sdpa")  # loading says what is wrong
    flags = {"sdpa": "sdpa", "flash_attention_2": "flash_attn", "flex_attention": "flex_attn"}
    return ("eager", *(word for word, flag in flags.items() if getattr(kind, f"_supports_{flag}", False)))


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
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, KeyError):
        return f"{first} is missing, or not known to transformers"
    return f"{first} {others[0].strip()}" if first.endswith(":") and others else first
