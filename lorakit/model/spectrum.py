"""Spectrum (Hartford et al., arXiv 2406.06623): how much of each weight is signal, by its singular values.

Made to choose layers for full fine-tuning; lorakit chooses by it the weights that get an adapter as well.
"""

import hashlib
import json
import math
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight

from lorakit.atomic_io import cache_folder, write_atomic
from lorakit.checksums import decode_line, encode_line
from lorakit.model.resolve import Base
from lorakit.progress import Progress

# The interquartile range of a normal distribution, in standard deviations.
_NORMAL_IQR = 1.349


def signal_to_noise(weight: torch.Tensor) -> float:
    """The singular values above the Marchenko-Pastur threshold, summed, over the sum of the others, over the largest;
    infinite where none is below, 0 for a matrix of zeros, the experts' mean of (experts, rows, columns).

    The threshold is sigma (1 + sqrt(beta)): sigma is the interquartile range of the singular values over 1.349, beta
    the ratio of the matrix's sides.
    """
    if weight.ndim == 3:
        return sum(signal_to_noise(matrix) for matrix in weight) / len(weight)
    values = torch.linalg.svdvals(weight.detach().float())
    largest = values.max()
    if not largest:
        return 0.0
    sigma = (values.quantile(0.75) - values.quantile(0.25)) / _NORMAL_IQR
    threshold = sigma * (1 + math.sqrt(min(weight.shape) / max(weight.shape)))
    loud = values > threshold
    below = values[~loud].sum()
    return float(values[loud].sum() / below / largest) if below else math.inf


def signal_to_noise_ratios(
    model: Any, paths: list[str], base: Base, quantization: str, progress: Progress
) -> dict[str, float]:
    """Paths of linear layers and fused parameters -> their signal-to-noise ratios, as the model holds their weights:
    computed once for a base and a quantization, and kept in the cache."""
    facts = json.dumps([base.sha256(".safetensors"), quantization], sort_keys=True)
    identity = hashlib.sha256(facts.encode()).hexdigest()
    file = cache_folder() / "spectrum" / f"{identity[:32]}.json"
    try:
        known = decode_line(file.read_bytes())
    except (FileNotFoundError, ValueError):
        known = {}
    missing = [path for path in paths if path not in known]
    if missing:
        with progress.bar("signal-to-noise ratios", total=len(missing)) as bar:
            for path in missing:
                known[path] = signal_to_noise(dequantized_weight(model, path))
                bar.advance()
        write_atomic(file, encode_line(known))
    return {path: known[path] for path in paths}


def dequantized_weight(model: Any, path: str) -> torch.Tensor:
    """The weight of a linear layer, dequantized, or a parameter."""
    container, _, name = path.rpartition(".")
    part = getattr(model.get_submodule(container), name)
    return part if isinstance(part, torch.nn.Parameter) else dequantize_module_weight(part)
