"""What an adapter saw of a frozen weight while it trained: rounded to the type of the training, and quantized."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from lorakit.model.load import DTYPES
from lorakit.model.safetensors_reader import TYPES
from lorakit.model.spec_from_meta import meta_model
from lorakit.model.state_dict import Weights
from lorakit.recipe.schema import Model
from lorakit.registry import QUANTIZERS


@dataclass(frozen=True)
class WeightPrecision:
    """How the frozen weights of a model are held while an adapter trains on them."""

    settings: Model
    turned: dict[str, bool]
    """The paths of the quantized weights, and whether they are turned before (Conv1D)."""
    wide: tuple[str, ...] = ()
    """Parts of paths that transformers keeps in float32, whatever type it is asked for."""

    def __call__(self, path: str, weight: torch.Tensor) -> torch.Tensor:
        """The float32 weight that the model computes with, of the one in the files; the same one if nothing rounds it.

        The quantizer's own code rounds it, on the CPU.
        """
        if not weight.is_floating_point():
            return weight
        dtype, rounding = self._dtype(path), _ROUNDING[self.settings.quantization]
        if path not in self.turned:
            return weight.to(dtype).float()
        if self.turned[path]:
            return rounding(weight.T.to(dtype), self.settings).float().T.contiguous()
        return rounding(weight.to(dtype), self.settings).float()

    def rounds(self, path: str, stored: torch.dtype) -> bool:
        """Whether the training saw other numbers at a path than a file holds in the type `stored`."""
        dtype = self._dtype(path)
        return path in self.turned or (stored.is_floating_point and torch.promote_types(stored, dtype) != dtype)

    def differs(self, weights: Weights) -> bool:
        """Whether the training saw other numbers than the files hold, anywhere."""
        return any(
            self.rounds(path, TYPES.get(weights.tensors[name].dtype, torch.uint8))
            for group in weights.groups
            for path in group.paths
            for name in group.names
        )

    def _dtype(self, path: str) -> torch.dtype:
        return torch.float32 if set(path.split(".")) & set(self.wide) else DTYPES[self.settings.dtype]


@dataclass(frozen=True)
class RoundedWeights:
    """The weights of a model folder as they are held, by path; nothing is kept in memory."""

    weights: Weights
    held: WeightPrecision

    def read(self, path: str) -> torch.Tensor:
        """One weight in float32."""
        return self.held(path, self.weights.read(path))

    def pieces(self, path: str) -> Iterator[tuple[int, torch.Tensor]]:
        """The same some rows at a time, if it is not quantized as a whole; a piece is good until the next one."""
        if path in self.held.turned:
            yield 0, self.read(path)
            return
        for row, piece in self.weights.pieces(path):
            yield row, self.held(path, piece)


def training_precision(weights: Weights, settings: Model) -> WeightPrecision:
    """How a model loaded with `settings` holds its weights; `settings.dtype` is the type of the training."""
    model = weights.model
    wide = list(model._keep_in_fp32_modules_strict or ())
    if settings.dtype == "float16":
        wide += list(model._keep_in_fp32_modules or ())
    return WeightPrecision(settings, _quantized_paths(weights, settings), tuple(wide))


def stored_precision(settings: Model) -> WeightPrecision:
    """Every weight as it lies in the files."""
    return WeightPrecision(settings.model_copy(update={"dtype": "float32", "quantization": "none"}), {})


def _quantized_paths(weights: Weights, settings: Model) -> dict[str, bool]:
    """The paths of the weights that transformers would quantize, and whether it turns them first (Conv1D)."""
    if settings.quantization == "none":
        return {}
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    config = QUANTIZERS[settings.quantization].function(settings, DTYPES[settings.dtype])
    model = meta_model(weights.folder)
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    return {
        f"{name}.weight": issubclass(module.source_cls, Conv1D)
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit | Linear8bitLt)
    }


def _four_bits(weight: torch.Tensor, settings: Model) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    kind = {"nf4": "nf4", "q4": "fp4"}[settings.quantization]
    held: Any = Params4bit(
        weight.contiguous(), requires_grad=False, quant_type=kind, compress_statistics=settings.double_quant
    ).to("cpu")
    return dequantize_4bit(held.data, held.quant_state).to(weight.dtype)


def _eight_bits(weight: torch.Tensor, settings: Model) -> torch.Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant
    from bitsandbytes.nn import Int8Params

    held: Any = Int8Params(weight.contiguous(), requires_grad=False, has_fp16_weights=False).to("cpu")
    return int8_vectorwise_dequant(held.CB, held.SCB)


_ROUNDING = {"none": lambda weight, settings: weight, "q4": _four_bits, "nf4": _four_bits, "q8": _eight_bits}
