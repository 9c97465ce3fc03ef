"""A model with quantized weights: what is held in which form, what that saves, and the way back to plain weights."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from lorakit.amounts import percent
from lorakit.errors import LorakitError
from lorakit.model.quantization_config import CheckpointQuantization, describe_savings


@dataclass(frozen=True)
class QuantizationSummary:
    """How the weights of a quantized model are held in memory."""

    quantization: str
    parameters: int
    """All of the model's, tied ones once."""
    quantized: int
    """Those that are in quantized weights."""
    experts: int
    """Those in fused weights of experts, which bitsandbytes leaves as they are."""
    bytes: int
    unquantized_bytes: int
    """What all weights would take if the quantized ones were in the type that the model computes in."""

    @property
    def share(self) -> float:
        """The quantized parameters over all."""
        return self.quantized / self.parameters

    @property
    def words(self) -> str:
        """One clause with share and sizes, for a log."""
        left = f"; {percent(self.experts / self.parameters)} are fused experts, which stay as they are"
        saved = describe_savings(self.quantization, self.share, self.unquantized_bytes, self.bytes)
        return saved + (left if self.experts else "")


def summarize_quantization(model: Any) -> QuantizationSummary | None:
    """What of a model (not yet wrapped by PEFT) is quantized, and what that saves; None where nothing is."""
    layers = {name: module for name, module in model.named_modules() if _word(module, model.config)}
    if not layers:
        return None
    quantized = sum(layer.in_features * layer.out_features for layer in layers.values())
    plain = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0] not in layers or name.endswith(".bias")
    }
    rest = sum(parameter.numel() for parameter in plain.values())
    rest_bytes = sum(parameter.nbytes for parameter in plain.values())
    return QuantizationSummary(
        quantization=str(_word(next(iter(layers.values())), model.config)),
        parameters=quantized + rest,
        quantized=quantized,
        experts=sum(weight.numel() for name, weight in plain.items() if weight.ndim == 3 and "experts" in name),
        bytes=_bytes(model),
        unquantized_bytes=quantized * model.dtype.itemsize + rest_bytes,
    )


def _word(module: Any, config: Any) -> str | None:
    """The quantization of one module, None for a plain one."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    if isinstance(module, Linear4bit):
        return {"nf4": "nf4", "fp4": "q4"}[module.weight.quant_type]
    if isinstance(module, Linear8bitLt):
        return "q8"
    if hasattr(module, "qweight"):  # the layers of GPTQ and AWQ
        return str(getattr(config.quantization_config.quant_method, "value", config.quantization_config.quant_method))
    return None


def _bytes(model: Any) -> int:
    """The size of all weights with their quantization constants; tensors that are shared count once."""
    tensors = {
        tensor.data_ptr(): tensor.nbytes
        for name, tensor in model.state_dict().items()
        # Tables that all layers share, and what is written for files only.
        if not name.endswith(("quant_map", ".weight_format")) and ".quant_state." not in name
    }
    return sum(tensors.values())


def quantization_facts(
    held: QuantizationSummary | None, asked: str, stored: CheckpointQuantization | None
) -> dict[str, Any]:
    """What a run's manifest says of quantization: asked for, in effect, brought along by the checkpoint."""
    return {
        "requested": asked,
        "effective": held.quantization if held else "none",
        "checkpoint": stored.quantization if stored else "none",
        "held": asdict(held) | {"share": held.share} if held else None,
    }


def describe_quantization(
    held: QuantizationSummary | None, asked: str, stored: CheckpointQuantization | None, dtype: str
) -> str | None:
    """What a log says of quantization when training begins; None when there is none anywhere.

    Args:
        asked: the recipe's word; another one in effect comes from the checkpoint or from the adapter kind.
        dtype: the type that the model computes in.
    """
    if held is None:
        if stored is None:
            return None
        return (
            f"the checkpoint is {stored.quantization}, dequantized while it was loaded: {dtype} weights are trained on"
        )
    if held.quantization == asked:
        return held.words
    reason = "the checkpoint is quantized already" if stored else "the kind of adapter quantizes"
    return f"model.quantization: {asked} was asked for, {held.quantization} is used: {reason}. {held.words}"


def unify_layer_modes(model: Any, dtype: torch.dtype) -> None:
    """Make bitsandbytes' layers compute with the same weights in training, in evaluation and for a merge."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On processors with AVX512-BF16, bitsandbytes would repack 4-bit weights at the first evaluation, with
            # scales rounded to bfloat16: the adapter would see one base before it and another after it.
            module.support_avx512bf16_for_cpu = False
            # A checkpoint brings the types of whoever quantized it; they would round inputs and dequantized weights.
            module.compute_dtype = dtype
            module.weight.quant_state.dtype = dtype
        elif isinstance(module, Linear8bitLt):
            _keep_scales(module)
            if module.weight.device.type != "cpu":
                continue
            # On a CPU, bitsandbytes multiplies with dequantized weights in training mode, and rounds the inputs to 8
            # bits too in evaluation mode: the layer is kept in the mode that the adapter is trained in. On a GPU
            # both modes round the inputs.
            module.train(True)
            _stay(module)


def cast_unquantized(model: Any, dtype: torch.dtype) -> None:
    """Bring the weights that are not quantized into `dtype`: transformers leaves a checkpoint's as they lie there."""
    for parameter in model.parameters():
        if type(parameter) is torch.nn.Parameter:
            parameter.data = parameter.data.to(dtype)


def _keep_scales(module: Any) -> None:
    """PEFT dequantizes for DoRA and puts a weight without its scales in place: the layer would then lose its own."""
    take_up = module.init_8bit_state

    def guarded() -> None:
        module.weight.SCB = module.state.SCB if module.weight.SCB is None else module.weight.SCB
        take_up()

    module.init_8bit_state = guarded


def _stay(module: Any) -> None:
    module.train = lambda mode=True: module


def dequantize(model: Any) -> Any:
    """The model with plain weights in place of bitsandbytes' ones, exactly those that it computes with on a CPU.

    Raises:
        LorakitError: transformers cannot dequantize it.
    """
    turned = [name for name, module in model.named_modules() if getattr(module, "source_cls", None) is Conv1D]
    try:
        plain = model.dequantize(model.dtype)
    except (ValueError, RuntimeError, AttributeError, NotImplementedError, UnboundLocalError) as error:
        raise LorakitError(f"model.quantization: transformers cannot dequantize this model: {error}") from error
    forget_conversions(plain)
    for name in turned:
        plain.set_submodule(name, _conv1d(plain.get_submodule(name)))
    return plain.requires_grad_(False)


def forget_conversions(model: Any) -> None:
    """Let a dequantized model be saved as what it is.

    transformers reverses on saving what it did to the tensors on loading: it would quantize them again, or refuse
    (transformers/core_model_loading.py, revert_weight_conversion).
    """
    del model._weight_conversions


def _conv1d(linear: torch.nn.Linear) -> Conv1D:
    """The layer that GPT-2 is made of, its weight (in, out): bitsandbytes' layers come back as Linear."""
    layer = Conv1D(linear.out_features, linear.in_features)
    layer.weight = torch.nn.Parameter(linear.weight.data.T.contiguous())
    layer.bias = linear.bias
    return layer
