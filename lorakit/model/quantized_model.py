"""Models with quantized weights: how much is quantized, how the layers compute, and the way back to plain weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers.pytorch_utils import Conv1D

from lorakit.amounts import percent
from lorakit.errors import LorakitError
from lorakit.model.quantization_config import CheckpointQuantization, describe_savings

# What bitsandbytes' products (autograd/_functions.py) keep for the gradient of the weight, by the name of their node.
_INT8_INPUTS: dict[str, tuple[str, Any]] = {
    "MatMul8bitLtBackward": ("tensors", (None, None, None)),
    "MatMul8bitFpBackward": ("A", None),
}


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

    def describe(self) -> str:
        """One clause with share and sizes, for a log."""
        savings = describe_savings(self.quantization, self.share, self.unquantized_bytes, self.bytes)
        experts = f"; {percent(self.experts / self.parameters)} are fused experts, which stay as they are"
        return savings + experts if self.experts else savings


def summarize_quantization(model: Any) -> QuantizationSummary | None:
    """How much of a model (not yet wrapped by PEFT) is quantized; None where nothing is."""
    layers = {name: module for name, module in model.named_modules() if _method_of(module, model.config)}
    if not layers:
        return None
    first = next(iter(layers.values()))
    quantized = sum(layer.in_features * layer.out_features for layer in layers.values())
    own = {name for name, _ in model.named_parameters() if name.rpartition(".")[0] in layers}
    plain = {name: weight for name, weight in model.named_parameters() if name not in own or name.endswith(".bias")}
    sizes = {
        tensor.data_ptr(): tensor.nbytes  # shared tensors count once
        for name, tensor in model.state_dict().items()
        # Tables that all layers share, and what is written for files only.
        if not name.endswith(("quant_map", ".weight_format")) and ".quant_state." not in name
    }
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
    """The line of the log on quantization when training begins; None where nothing is quantized.

    `requested` is the recipe's word, `dtype` the type that the model computes in.
    """
    if summary is None:
        dequantized = f"dequantized while it was loaded: {dtype} weights are trained on"
        return f"the checkpoint is {stored.quantization}, {dequantized}" if stored else None
    if summary.quantization == requested:
        return summary.describe()
    reason = "the checkpoint is quantized already" if stored else "the kind of adapter quantizes"
    used = f"{requested} was asked for, {summary.quantization} is used: {reason}"
    return f"model.quantization: {used}. {summary.describe()}"


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
            if module.weight.device.type == "cpu":
                # On a CPU, bitsandbytes multiplies with dequantized weights in training mode, and rounds the inputs to
                # 8 bits too in evaluation mode: the layer stays in the mode that the adapter is trained in. On a GPU
                # both modes round the inputs.
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


@contextmanager
def release_int8_inputs(model: Any) -> Iterator[None]:
    """Within this, the int8 layers of `model` release their inputs, to the same gradients: bitsandbytes keeps them on
    the node itself, which gradient checkpointing does not reach. Only a gradient of the frozen weight would need them.
    """
    layers = [module for module in model.modules() if type(module) is Linear8bitLt]
    for layer in layers:
        layer.forward = partial(_forward_and_release, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward_and_release(forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    output = forward(x)
    inputs = _INT8_INPUTS.get(type(output.grad_fn).__name__)
    if inputs and not output.grad_fn.needs_input_grad[1]:
        setattr(output.grad_fn, *inputs)
    return output
