"""What an adapter saw of a frozen weight while it trained: rounded to the type of the training, and quantized."""

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from lorakit.model.load import DTYPES
from lorakit.model.safetensors_io import TYPES
from lorakit.model.spec_from_meta import meta_model
from lorakit.model.state_dict import Group, Weights
from lorakit.recipe.schema import Model
from lorakit.registry import QUANTIZERS


@dataclass(frozen=True)
class WeightPrecision:
    """How precise the frozen weights of a model are while an adapter trains on them."""

    settings: Model
    transposed: dict[str, bool]  # the paths of the quantized weights, and whether they are transposed before (Conv1D)
    float32_parts: Set[str] = frozenset()  # parts of paths that transformers keeps in float32 whatever it is asked for

    def __call__(self, path: str, weight: torch.Tensor) -> torch.Tensor:
        """The float32 weight that the model computes with, from the one in the files; the same if nothing rounds it.

        The quantizer's own code rounds it, on the CPU.
        """
        if not weight.is_floating_point():
            return weight
        rounded = weight.to(self._dtype(path))
        if path not in self.transposed:
            return rounded.float()
        if self.transposed[path]:
            return _quantize_and_back(rounded.T, self.settings).float().T.contiguous()
        return _quantize_and_back(rounded, self.settings).float()

    def read(self, weights: Weights, path: str) -> torch.Tensor:
        """One weight of a model folder in this precision, in float32."""
        return self(path, weights.read(path))

    def pieces(self, weights: Weights, path: str) -> Iterator[tuple[int, torch.Tensor]]:
        """The same some rows at a time, unless it is quantized as a whole; a piece is valid until the next one."""
        if path in self.transposed:
            yield 0, self.read(weights, path)
            return
        for row, piece in weights.pieces(path):
            yield row, self(path, piece)

    def rounds(self, weights: Weights, group: Group) -> bool:
        """Whether the training saw other numbers than the files hold, for any weight of a group."""
        stored = [TYPES.get(weights.tensors[name].dtype, torch.uint8) for name in group.names]
        pairs = [(dtype, self._dtype(path)) for dtype in stored if dtype.is_floating_point for path in group.paths]
        is_rounded = any(torch.promote_types(dtype, narrow) != narrow for dtype, narrow in pairs)
        return is_rounded or any(path in self.transposed for path in group.paths)

    def differs(self, weights: Weights) -> bool:
        """Whether the training saw other numbers than the files hold, anywhere."""
        return any(self.rounds(weights, group) for group in weights.groups)

    def _dtype(self, path: str) -> torch.dtype:
        return torch.float32 if self.float32_parts & set(path.split(".")) else DTYPES[self.settings.dtype]


def training_precision(weights: Weights, settings: Model) -> WeightPrecision:
    """The precision of a model loaded with `settings`; `settings.dtype` is the type of the training."""
    parts = {*(weights.model._keep_in_fp32_modules_strict or ())}
    if settings.dtype == "float16":
        parts |= {*(weights.model._keep_in_fp32_modules or ())}
    if settings.quantization == "none":
        return WeightPrecision(settings, {}, parts)
    model = meta_model(weights.folder)
    config = QUANTIZERS[settings.quantization].function(settings, DTYPES[settings.dtype])
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    transposed = {
        f"{name}.weight": issubclass(module.source_cls, Conv1D)
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit | Linear8bitLt)
    }
    return WeightPrecision(settings, transposed, parts)


def stored_precision(settings: Model) -> WeightPrecision:
    """Every weight as it is in the files."""
    return WeightPrecision(settings.model_copy(update={"dtype": "float32", "quantization": "none"}), {})


def _quantize_and_back(weight: torch.Tensor, settings: Model) -> torch.Tensor:
    quantized: Any
    if settings.quantization == "q8":
        quantized = Int8Params(weight.contiguous(), requires_grad=False, has_fp16_weights=False).to("cpu")
        return int8_vectorwise_dequant(quantized.CB, quantized.SCB)
    options = {"quant_type": {"nf4": "nf4", "q4": "fp4"}[settings.quantization], "requires_grad": False}
    quantized = Params4bit(weight.contiguous(), compress_statistics=settings.double_quant, **options).to("cpu")
    return dequantize_4bit(quantized.data, quantized.quant_state).to(weight.dtype)
