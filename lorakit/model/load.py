"""A base model from disk in the recipe's type and quantization: how much is quantized, how its layers compute, and the
way back to plain weights."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lorakit.amounts import percent
from lorakit.errors import BaseModelError, LorakitError, UserError
from lorakit.hardware.memory import is_out_of_memory
from lorakit.model.attention import VARLEN, takes_varlen
from lorakit.model.config_values import read_json
from lorakit.model.quantization_config import CheckpointQuantization, check_quantization, describe_savings
from lorakit.model.resolve import Base
from lorakit.model.spec_from_meta import meta_model
from lorakit.model.tokenizer import DAMAGED, describe_load_error
from lorakit.recipe.schema import Model
from lorakit.registry import QUANTIZERS

# Devices on which LLM.int8 trains on dequantized weights (bitsandbytes' autograd/_functions.py, `matmul`).
DEQUANTIZING_INT8 = ("cpu", "xpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(base: Base, settings: Model, device: str, trainable: bool = False) -> Any:
    """The causal language model on `device`, in evaluation mode: frozen, or `trainable`, then in float32. UserError
    where files are damaged or do not go with the settings. LorakitError where it does not fit into memory."""
    stored = check_quantization(base, settings, trainable)
    dtype = torch.float32 if trainable else DTYPES[settings.dtype]
    quantization = QUANTIZERS[settings.quantization].function(settings, dtype)
    attention = "sdpa" if settings.attention == VARLEN else settings.attention  # which a training puts in
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention, "use_safetensors": True}
    options |= {"quantization_config": quantization} if quantization is not None else {}
    options |= {"device_map": {"": device}} if quantization is not None or stored else {}
    dequantizes = stored is not None and stored.treatment == "dequantized"
    try:
        model = _read_model(base, options, dequantizes)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
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
    try:
        if dequantizes:
            config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
            holder = config if getattr(config, "quantization_config", None) else config.get_text_config()
            holder.quantization_config["dequantize"] = True
            options |= {"config": config}
        model, info = AutoModelForCausalLM.from_pretrained(
            base.folder, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False, **options
        )
    except SafetensorError as error:
        raise BaseModelError(f"{base.name}: a weights file is damaged ({error}). Fetch it again.") from error
    except (*DAMAGED, ImportError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        remedy = " Write model.attention: eager." if "attention" in str(error).lower() else ""
        raise BaseModelError(f"{base.name} cannot be loaded: {describe_load_error(error)}.{remedy}") from error
    if missing := sorted(info["missing_keys"]):
        lacks = f"the weights files lack {len(missing)} tensors that the model needs, the first is {missing[0]}"
        raise BaseModelError(f"{base.name}: {lacks}; they would start out random.")
    # Weights of other shapes than the config describes. A quantized layer takes whatever the file has.
    pairs = [(name, tuple(actual), tuple(expected)) for name, actual, expected in info["mismatched_keys"]]
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit | Linear8bitLt):
            weight = module.weight.quant_state if isinstance(module, Linear4bit) else module.weight
            pairs.append((f"{name}.weight", tuple(weight.shape), (module.out_features, module.in_features)))
    if wrong := [pair for pair in pairs if pair[1] != pair[2]]:
        name, actual, expected = min(wrong)
        shapes = f"{name} is of shape {actual} in the files, and {expected} by the config ({len(wrong)} such in all)"
        reason = f"config.json and the weights do not fit each other: {shapes}"
        raise BaseModelError(f"{base.name}: {reason}. Fetch the model again.")
    return model


def original_weights(base: Base, modules: list[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The unquantized weights (out, in) of linear layers on disk, by path, in `dtype` on the CPU."""
    plain = Model(base=base.name, attention="eager").model_copy(update={"dtype": stored_dtype(base)})
    model = load_model(base, plain, "cpu")
    layers = {name: model.get_submodule(name) for name in modules}
    weights = {name: part.weight.T if isinstance(part, Conv1D) else part.weight for name, part in layers.items()}
    return {name: weight.detach().to(dtype, copy=True) for name, weight in weights.items()}


def check_embeddings(model: Any, base: Base, largest_token: int) -> None:
    """Refuse rows with tokens that the model has no embedding for, and embeddings tied by the config that differ in the
    files: transformers leaves them apart, other programs do not, and no merged model would be what was trained."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    known = inputs.weight.shape[0]
    if largest_token >= known:
        reason = f"token id {largest_token} is out of range (vocabulary size {known:,})"
        raise BaseModelError(f"{base.name}: {reason}. Its tokenizer and its weights do not belong together.")
    if outputs is None or outputs.weight is inputs.weight:
        return
    empty = meta_model(base.folder)
    if empty.get_output_embeddings().weight is empty.get_input_embeddings().weight:
        reason = "input and output embeddings are one weight by its config.json, and two in its files"
        raise BaseModelError(f"{base.name}: {reason}. Write tie_word_embeddings: false into the config.json.")


def attentions_of(base: Base) -> tuple[str, ...]:
    """The attention implementations that the model's family has, of those that a recipe names."""
    try:
        config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
        kind = AutoModelForCausalLM._model_mapping[type(config)]
    except (*DAMAGED, ImportError):
        return ("eager", "sdpa")  # loading says what is wrong
    flash = dict.fromkeys(("flash_attention_2", "flash_attention_3"), "flash_attn")
    flags = {"sdpa": "sdpa", **flash, "flex_attention": "flex_attn"}
    words = ["eager", *(word for word, flag in flags.items() if getattr(kind, f"_supports_{flag}", False))]
    return (*words, VARLEN) if takes_varlen(kind, config) else tuple(words)


def stored_dtype(base: Base) -> str:
    """The type of the base's weights on disk; float32 where its config does not say."""
    config = read_json(base.folder / "config.json")
    named = config.get("dtype") or config.get("torch_dtype") or config.get("text_config", {}).get("dtype")
    return str(named) if named in DTYPES else "float32"


@dataclass(frozen=True)
class QuantizationSummary:
    """How much of a model is quantized; counts of parameters and of bytes."""

    quantization: str
    parameters: int  # all of the model's, tied ones once
    quantized: int
    experts: int  # those in fused weights of experts, which bitsandbytes leaves as they are
    bytes: int
    unquantized_bytes: int  # of all weights if the quantized ones were in the type that the model computes in

    @property
    def share(self) -> float:
        """The quantized parameters over all."""
        return self.quantized / self.parameters


def summarize_quantization(model: Any) -> QuantizationSummary | None:
    """How much of a model (not yet wrapped by PEFT) is quantized; None where nothing is."""
    layers = {name: module for name, module in model.named_modules() if _method_of(module, model.config)}
    if not layers:
        return None
    first = next(iter(layers.values()))
    quantized = sum(layer.in_features * layer.out_features for layer in layers.values())
    own = {name for name, _ in model.named_parameters() if name.rpartition(".")[0] in layers}
    plain = {name: weight for name, weight in model.named_parameters() if name not in own or name.endswith(".bias")}
    # Without tables that all layers share, and what is written for files only; shared tensors once.
    left_out = re.compile(r".*(quant_map|\.weight_format|\.quant_state\..*)")
    state = model.state_dict().items()
    sizes = {tensor.data_ptr(): tensor.nbytes for name, tensor in state if not left_out.fullmatch(name)}
    return QuantizationSummary(
        quantization=str(_method_of(first, model.config)),
        parameters=quantized + sum(parameter.numel() for parameter in plain.values()),
        quantized=quantized,
        experts=sum(weight.numel() for name, weight in plain.items() if weight.ndim == 3 and "experts" in name),
        bytes=sum(sizes.values()),
        unquantized_bytes=quantized * model.dtype.itemsize + sum(parameter.nbytes for parameter in plain.values()),
    )


def _method_of(module: Any, config: Any) -> str | None:
    if isinstance(module, Linear4bit):
        return {"nf4": "nf4", "fp4": "q4"}[module.weight.quant_type]
    if isinstance(module, Linear8bitLt):
        return "q8"
    if hasattr(module, "qweight"):  # the layers of GPTQ and AWQ
        method = config.quantization_config.quant_method
        return str(getattr(method, "value", method))
    return None


def quantization_facts(
    summary: QuantizationSummary | None, requested: str, stored: CheckpointQuantization | None
) -> dict[str, Any]:
    """The part of a run's manifest on quantization: requested, in effect, and the checkpoint's own."""
    words = {"requested": requested, "effective": summary.quantization if summary else "none"}
    words["checkpoint"] = stored.quantization if stored else "none"
    return words | {"held": asdict(summary) | {"share": summary.share} if summary else None}


def describe_quantization(
    summary: QuantizationSummary | None, requested: str, stored: CheckpointQuantization | None, dtype: str
) -> str | None:
    """The line of the log on quantization when training begins; None where nothing is quantized. `requested` is the
    recipe's word, `dtype` the type that the model computes in."""
    if summary is None:
        dequantized = f"dequantized while it was loaded: {dtype} weights are trained on"
        return f"the checkpoint is {stored.quantization}, {dequantized}" if stored else None
    text = describe_savings(summary.quantization, summary.share, summary.unquantized_bytes, summary.bytes)
    if summary.experts:
        text += f"; {percent(summary.experts / summary.parameters)} are fused experts, which stay as they are"
    if summary.quantization == requested:
        return text
    reason = "the checkpoint is quantized already" if stored else "the kind of adapter quantizes"
    return f"model.quantization: {requested} was asked for, {summary.quantization} is used: {reason}. {text}"


def unify_layer_modes(model: Any, dtype: torch.dtype) -> None:
    """Make bitsandbytes' layers compute with the same weights in training, in evaluation and for a merge."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On processors with AVX512-BF16, bitsandbytes would repack 4-bit weights at the first evaluation, with
            # scales rounded to bfloat16: the adapter would see one base before it and another after it.
            module.support_avx512bf16_for_cpu = False
            # A checkpoint brings the types of whoever quantized it; they would round inputs and dequantized weights.
            module.compute_dtype = dtype
            module.weight.quant_state.dtype = dtype
        elif isinstance(module, Linear8bitLt):
            module.init_8bit_state = partial(_init_8bit_state, module, module.init_8bit_state)
            if module.weight.device.type in DEQUANTIZING_INT8:
                # There bitsandbytes multiplies with dequantized weights in training mode, and rounds the inputs to 8
                # bits too in evaluation mode: the layer stays in the mode that the adapter is trained in. On the other
                # devices both modes round the inputs.
                module.train(True)
                module.train = lambda mode=True, module=module: module


def _init_8bit_state(module: Any, init: Callable[[], None]) -> None:
    """PEFT dequantizes for DoRA and puts a weight without its scales in place: the layer would then lose its own."""
    module.weight.SCB = module.state.SCB if module.weight.SCB is None else module.weight.SCB
    init()


def dequantize(model: Any) -> Any:
    """The model with plain weights in place of bitsandbytes' ones, exactly those that it computes with on a CPU;
    LorakitError where transformers cannot dequantize it."""
    conv1d = [name for name, module in model.named_modules() if getattr(module, "source_cls", None) is Conv1D]
    try:
        plain = model.dequantize(model.dtype)
    except (ValueError, RuntimeError, AttributeError, NotImplementedError, UnboundLocalError) as error:
        raise LorakitError(f"model.quantization: transformers cannot dequantize this model: {error}") from error
    del plain._weight_conversions  # by which transformers would quantize it again on saving, or refuse
    for name in conv1d:  # GPT-2's layers, with weights (in, out), which come back as Linear
        linear = plain.get_submodule(name)
        layer = Conv1D(linear.out_features, linear.in_features)
        layer.weight = torch.nn.Parameter(linear.weight.data.T.contiguous())
        layer.bias = linear.bias
        plain.set_submodule(name, layer)
    return plain.requires_grad_(False)
