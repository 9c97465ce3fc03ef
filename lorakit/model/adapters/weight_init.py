"""What is made of decompositions: adapters that start from the base's weights (PiSSA, OLoRA and LoftQ) or from the rows
(EVA), and the weights that `layers: {spectrum: ...}` chooses.

For PiSSA and OLoRA, PEFT takes the first product B0 A0 out of the base's weights, which rounds them and cannot be done
to quantized ones. Here a second, frozen adapter holds A0 and -B0: the model computes W x + s (B A - B0 A0) x, to the
same gradients. Saved, the two become one plain LoRA of twice the rank, on the base as it is.

LoftQ starts at (nearly) the closest matrix of its rank to W - Q, Q being the weights as bitsandbytes puts them into NF4
(arXiv 2310.08659, one iteration). Anyone who loads the base in NF4 gets this Q: the saved adapter needs no other base.

EVA's A starts as the main directions of what reaches each module on the rows, its B at zero.

Spectrum (Hartford et al., arXiv 2406.06623), made to choose layers for full fine-tuning, tells how much of each weight
is signal.
"""

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from peft import EvaConfig, initialize_lora_eva_weights
from peft.tuners.lora.layer import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.pytorch_utils import Conv1D

from lorakit.atomic_io import cache_folder, write_atomic
from lorakit.checksums import decode_line, encode_line
from lorakit.errors import LorakitError, UserError
from lorakit.model.adapters import Eva, InitContext, Pissa
from lorakit.model.loss import body_of
from lorakit.model.resolve import Base
from lorakit.model.trained_tokens import IGNORED
from lorakit.progress import Bar, Progress

INITIAL = "initial"  # the name of the frozen adapter that holds what the trained one began with
PREFIX = "base_model.model."  # what a PEFT model puts before the names of the base's own modules

Factors = Callable[[Tensor, int, float], tuple[Tensor, Tensor]]
"""A weight (out, in), a rank and the adapter's scale -> B (out, rank) and A (rank, in) to begin with."""


def init_pissa(model: Any, settings: Pissa, context: InitContext) -> None:
    """Begin with each weight's largest singular directions."""
    _init_from_factors(model, partial(truncated_svd, iterations=settings.iterations), context.progress)


def init_olora(model: Any, settings: None, context: InitContext) -> None:
    """Begin with the first columns of Q and rows of R of each weight."""

    def first_of_qr(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
        q, r = torch.linalg.qr(weight)
        return q[:, :rank], r[:rank]

    _init_from_factors(model, first_of_qr, context.progress)


def _init_from_factors(model: Any, factors: Factors, progress: Progress) -> None:
    """Put the factors of each weight into the trained adapter, and their negative into a frozen one."""
    add_initial(model)
    layers = list(lora_layers(model))
    sides = [(min(layer.in_features, layer.out_features), name, layer.r["default"]) for name, layer in layers]
    if tight := [(side, name) for side, name, rank in sides if rank > side]:
        reason = f"{len(tight)} modules have fewer directions than their rank, {min(tight)[1]} only {min(tight)[0]}"
        remedy = "Write a smaller one, or one for these modules in adapter.rank_overrides."
        raise UserError(f"adapter.rank: {reason}. {remedy}")
    with torch.no_grad(), progress.bar("main directions of the weights", total=len(layers)) as bar:
        for _, layer in layers:
            b, a = factors(weight_of(layer.get_base_layer()), layer.r["default"], layer.scaling["default"])
            for adapter, sign in (("default", 1), (INITIAL, -1)):
                layer.lora_A[adapter].weight.copy_(a)
                layer.lora_B[adapter].weight.copy_(sign * b)
            bar.advance(1)


def init_loftq(model: Any, settings: None, context: InitContext) -> None:
    """Begin with each module's quantization error; modules that are not quantized keep zero."""
    layers = {name: part for name, part in lora_layers(model) if not part.base_layer.weight.is_floating_point()}
    context.progress.say("loftq: reading the full-precision weights")
    originals = context.originals(list(layers))
    with torch.no_grad(), context.progress.bar("loftq: quantization errors", total=len(layers)) as bar:
        for name, layer in layers.items():
            quantized = weight_of(layer.get_base_layer())
            error = originals.pop(name).to(quantized) - quantized
            b, a = truncated_svd(error, min(layer.r["default"], *error.shape), layer.scaling["default"])
            for weight, part in ((layer.lora_B["default"].weight, b), (layer.lora_A["default"].weight.t(), a.t())):
                weight.zero_()
                weight[:, : part.shape[1]].copy_(part)
            bar.advance(1)


def truncated_svd(weight: Tensor, rank: int, scale: float, iterations: int | None = 16) -> tuple[Tensor, Tensor]:
    """PiSSA's factors: the largest singular directions, half of each value in B and half in A. `iterations`: rounds of
    the randomized decomposition (Halko et al., arXiv 0909.4061); None is the exact one."""
    if iterations is None:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        u, s, v = u[:, :rank], s[:rank], v[:rank]
    else:
        u, s, v = torch.svd_lowrank(weight, rank, niter=iterations)
        v = v.t()
    root = (s / scale).sqrt()
    return u * root, root[:, None] * v


def add_initial(model: Any) -> None:
    """Give a PEFT model a second adapter of the same shape, active and frozen."""
    config = copy.deepcopy(model.peft_config["default"])
    config.init_lora_weights, config.modules_to_save, config.modules_to_tie = False, None, None
    config.trainable_token_indices = None
    config.lora_dropout = 0.0  # what is taken out of the base is taken out whole
    model.add_adapter(INITIAL, config)
    model.base_model.set_adapter(["default", INITIAL])
    for name, parameter in model.named_parameters():
        if f".{INITIAL}." in name:
            parameter.requires_grad_(False)


def lora_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Every LoRA layer with its path in the base model."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name.removeprefix(PREFIX), module


def weight_of(layer: Any) -> Tensor:
    """A layer's weight in float32, dequantized, (out, in)."""
    weight = dequantize_module_weight(layer).detach().float()
    return weight.t() if isinstance(layer, Conv1D) else weight


_LONGEST_PASS = 500
_PADDING = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}


def init_eva(model: Any, settings: Eva, context: InitContext) -> None:
    """Find the directions on training batches until they no longer change (else LorakitError), and give each module its
    rank. UserError where the rows have fewer trained tokens than directions, or a module has fewer inputs."""
    config, rho = model.peft_config["default"], settings.rho
    most = round(config.r * rho)
    least, narrow = min((layer.in_features, name) for name, layer in lora_layers(model))
    if most > least:
        reason = f"{config.r} times rho {rho:g} is {most}, and {narrow} has {least} inputs"
        raise UserError(f"adapter.rank: {reason}. Write a smaller rank, or kind: {{eva: {{rho: 1}}}}.")
    config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=rho, tau=settings.converged)
    body, shape = body_of(model.get_base_model()), [0, 0]

    def forward(_: Any, inputs: dict[str, Any]) -> None:
        shape[:] = inputs["input_ids"].shape
        body(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)

    def reaching(inputs: Any, positions: torch.Tensor, name: str) -> torch.Tensor:
        """What reaches a module at the trained positions; some families hand over (rows * tokens, width)."""
        reached = inputs[0] if isinstance(inputs, tuple) else inputs
        seen, tokens = reached.shape[:-1].numel(), shape[0] * shape[1]
        if seen != tokens:
            reason = f"eva cannot tell which tokens reach {name}: it sees {seen} of {tokens}"
            raise UserError(f"adapter.kind: {reason}. Leave it out with adapter.exclude.")
        return reached.reshape(*shape, -1)[positions.T.unbind()]

    with context.progress.bar("eva: directions of the inputs", total=0) as bar:
        batches = _Batches(context, 2 * most, next(model.parameters()).device, bar)
        functions = {"forward_fn": forward, "prepare_layer_inputs_fn": reaching}
        # Of several processes each sees all the rows; PEFT would add up what they see.
        options = {"gather_distributed_inputs": False, "show_progress_bar": False}
        initialize_lora_eva_weights(model, batches, **options, **functions)
    config.init_lora_weights, config.eva_config = True, None
    ranks = [layer.r["default"] for _, layer in lora_layers(model)]
    spread = f"ranks from {min(ranks)} to {max(ranks)} in {len(ranks)} modules"
    context.progress.say(f"eva: directions found on {batches.used} batches; {spread}")


class _Batches:
    """Training batches joined until each has enough trained tokens. PEFT asks for the first one twice."""

    def __init__(self, context: InitContext, tokens: int, device: torch.device, bar: Bar) -> None:
        self.context, self.tokens, self.device, self.bar, self.used = context, tokens, device, bar, 0

    def __len__(self) -> int:
        return 1  # PEFT asks only whether there is one

    def __iter__(self) -> Iterator[dict[str, Any]]:
        waiting: list[dict[str, Any]] = []
        tokens = 0
        for batch in self.context.batches():
            waiting.append(batch)
            tokens += int((batch["labels"] != IGNORED).sum())
            if tokens >= self.tokens:
                self.used += 1
                self.bar.advance(1)
                if self.used > _LONGEST_PASS:
                    remedy = "Write a smaller rank, or a smaller `converged`."
                    raise LorakitError(f"eva: its directions have not settled after {_LONGEST_PASS} batches. {remedy}")
                rows = {key: [row for joined in waiting for row in joined[key]] for key in _PADDING}
                yield {key: pad_sequence(rows[key], True, _PADDING[key]).to(self.device) for key in _PADDING}
                waiting, tokens = [], 0
        if self.used == 0:
            reason = f"eva needs at least {self.tokens} trained tokens to find its directions, the rows have {tokens}"
            raise UserError(f"adapter.kind: {reason}. Write a smaller rank, or another kind.")


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
