"""Loading a base model from disk, in the type and quantization of the recipe."""

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lorakit.errors import LorakitError, UserError
from lorakit.model.config_values import read_json
from lorakit.model.quantization_config import check_quantization
from lorakit.model.quantized_model import summarize_quantization, unify_layer_modes
from lorakit.model.resolve import Base
from lorakit.model.spec_from_meta import meta_model
from lorakit.model.tokenizer import DAMAGED, describe_load_error
from lorakit.recipe.schema import Model
from lorakit.registry import QUANTIZERS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(base: Base, settings: Model, device: str, trainable: bool = False) -> Any:
    """The causal language model on `device`, in evaluation mode: frozen, or `trainable`, then in float32. UserError
    where the files are damaged, not a causal language model, or do not go with the settings. LorakitError where it does
    not fit into memory."""
    stored = check_quantization(base, settings, trainable)
    dtype = torch.float32 if trainable else DTYPES[settings.dtype]
    quantization = QUANTIZERS[settings.quantization].function(settings, dtype)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": settings.attention, "use_safetensors": True}
    options |= {"quantization_config": quantization} if quantization is not None else {}
    options |= {"device_map": {"": device}} if quantization is not None or stored else {}
    dequantizes = stored is not None and stored.treatment == "dequantized"
    try:
        model = _read_model(base, options, dequantizes)
    except torch.OutOfMemoryError as error:
        remedy = "Train an adapter, such as adapter.kind: lora." if trainable else "Try model.quantization: nf4."
        raise LorakitError(f"{base.name} does not fit into the memory of {device}. {remedy}") from error
    if quantization is not None and summarize_quantization(model) is None:
        raise UserError("model.quantization: no layer of this model is one that bitsandbytes quantizes. Write none.")
    if stored and stored.reversible:  # transformers leaves the rest as stored; other methods' layers need their type
        for parameter in model.parameters():
            if type(parameter) is torch.nn.Parameter:
                parameter.data = parameter.data.to(dtype)
    if model.dtype != dtype:
        reason = f"can only be loaded in {(actual := str(model.dtype).removeprefix('torch.'))} here"
        raise UserError(f"model.dtype: {base.name} {reason}, not in {settings.dtype}. Write {actual}.")
    if quantization is None and not stored:
        model = model.to(device)
    if dequantizes:
        del model._weight_conversions  # by which transformers would quantize it again on saving, or refuse
    unify_layer_modes(model, dtype)
    return model.eval() if trainable else model.requires_grad_(False).eval()


def _read_model(base: Base, options: dict[str, Any], dequantizes: bool) -> Any:
    """The model that transformers reads; UserError where files are damaged or do not fit each other."""
    try:
        if dequantizes:
            config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
            holder = config if getattr(config, "quantization_config", None) else config.get_text_config()
            holder.quantization_config["dequantize"] = True
            options |= {"config": config}
        model, info = AutoModelForCausalLM.from_pretrained(
            base.folder, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False, **options
        )
    except torch.OutOfMemoryError:
        raise
    except SafetensorError as error:
        raise UserError(f"model.base: {base.name}: a weights file is damaged ({error}). Fetch it again.") from error
    except (*DAMAGED, ImportError, RuntimeError) as error:
        remedy = " Write model.attention: eager." if "attention" in str(error).lower() else ""
        raise UserError(f"model.base: {base.name} cannot be loaded: {describe_load_error(error)}.{remedy}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        lacks = f"the weights files lack {len(missing)} tensors that the model needs, the first is {missing[0]}"
        raise UserError(f"model.base: {base.name}: {lacks}; they would start out random.")
    _check_shapes(model, info["mismatched_keys"], base)
    return model


def _check_shapes(model: Any, mismatched: Any, base: Base) -> None:
    """Refuse weights of other shapes than the config describes. A quantized layer takes whatever the file has."""
    pairs = [(name, tuple(actual), tuple(expected)) for name, actual, expected in mismatched]
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit | Linear8bitLt):
            weight = module.weight.quant_state if isinstance(module, Linear4bit) else module.weight
            pairs.append((f"{name}.weight", tuple(weight.shape), (module.out_features, module.in_features)))
    if wrong := [pair for pair in pairs if pair[1] != pair[2]]:
        name, actual, expected = min(wrong)
        shapes = f"{name} is of shape {actual} in the files, and {expected} by the config ({len(wrong)} such in all)"
        reason = f"config.json and the weights do not fit each other: {shapes}"
        raise UserError(f"model.base: {base.name}: {reason}. Fetch the model again.")


def original_weights(base: Base, modules: list[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The unquantized weights (out, in) of linear layers on disk, by path, in `dtype` on the CPU."""
    plain = Model(base=base.name, attention="eager").model_copy(update={"dtype": stored_dtype(base)})
    model = load_model(base, plain, "cpu")
    layers = {name: model.get_submodule(name) for name in modules}
    weights = {name: part.weight.T if isinstance(part, Conv1D) else part.weight for name, part in layers.items()}
    return {name: weight.detach().to(dtype, copy=True) for name, weight in weights.items()}


def check_embeddings(model: Any, base: Base, largest_token: int) -> None:
    """Refuse rows with tokens that the model has no embedding for, and a base that ties its embeddings by its config
    while its files have two that differ: transformers leaves them apart, other programs do not, and no merged model
    would be what was trained."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    known = inputs.weight.shape[0]
    if largest_token >= known:
        reason = f"token id {largest_token} is out of range (vocabulary size {known:,})"
        raise UserError(f"model.base: {base.name}: {reason}. Its tokenizer and its weights do not belong together.")
    if outputs is None or outputs.weight is inputs.weight:
        return
    empty = meta_model(base.folder)
    if empty.get_output_embeddings().weight is empty.get_input_embeddings().weight:
        reason = "input and output embeddings are one weight by its config.json, and two in its files"
        raise UserError(f"model.base: {base.name}: {reason}. Write tie_word_embeddings: false into the config.json.")


def attentions_of(base: Base) -> tuple[str, ...]:
    """The attention implementations that the model's family has, of those that a recipe names."""
    try:
        config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
        kind = AutoModelForCausalLM._model_mapping[type(config)]
    except (*DAMAGED, ImportError):
        return ("eager", "sdpa")  # loading says what is wrong
    flags = {"sdpa": "sdpa", "flash_attention_2": "flash_attn", "flex_attention": "flex_attn"}
    return ("eager", *(word for word, flag in flags.items() if getattr(kind, f"_supports_{flag}", False)))


def stored_dtype(base: Base) -> str:
    """The type of the base's weights on disk; float32 where its config does not say."""
    config = read_json(base.folder / "config.json")
    named = config.get("dtype") or config.get("torch_dtype") or config.get("text_config", {}).get("dtype")
    return str(named) if named in DTYPES else "float32"
