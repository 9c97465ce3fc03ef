"""bitsandbytes, by real calls on the device of a run: layers forward and backward, and a step of an optimizer."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lorakit.doctor.finding import CheckResult, reason
from lorakit.doctor.packages import import_error

_WIDTH, _ROWS = 256, 32
_AGAIN = "pip install --force-reinstall bitsandbytes; python -m bitsandbytes says more"


@dataclass(frozen=True)
class _Quantization:
    """A quantization's word, and the largest relative error of a product that is not a fault.

    Gaussian weights lose 0.092 in NF4, 0.122 in FP4 and 0.008 in int8, to which CUDA adds as much for the inputs.
    """

    word: str
    error: float


_KNOWN = (_Quantization("nf4", 0.12), _Quantization("q4", 0.16), _Quantization("q8", 0.03))


def layers() -> Iterator[CheckResult]:
    """A quantized layer of each kind, forward and backward, against the product with the plain weight."""
    lacking = next((package for package in ("torch", "bitsandbytes") if import_error(package)), None)
    if lacking:
        yield CheckResult("bitsandbytes", "note", f"not tried, since {lacking} cannot be imported")
        return
    device = device_of_runs()
    for known in _KNOWN:
        try:
            forward, backward = errors_of(known.word, device)
        except Exception as error:  # a broken build raises whatever it meets: each kind is tried for itself
            yield CheckResult(
                known.word, "broken", f"a layer on {device} fails: {type(error).__name__}: {reason(error)}", _AGAIN
            )
            continue
        said = f"on {device} the relative error is {forward:.3f} forward, {backward:.3f} backward"
        figures = {"forward": forward, "backward": backward}
        if max(forward, backward) <= known.error:
            yield CheckResult(known.word, "ok", said, figures=figures)
        else:
            yield CheckResult(known.word, "broken", f"{said}: over {known.error}", _AGAIN, figures)


def optimizer() -> Iterator[CheckResult]:
    """A step of the 8-bit optimizer: the first one moves every number by the learning rate."""
    if import_error("torch") or import_error("bitsandbytes"):
        return
    import torch
    from bitsandbytes.optim import AdamW8bit

    device, rate = device_of_runs(), 0.01
    before = torch.randn(8192, generator=torch.Generator().manual_seed(0)).to(device)
    trained = torch.nn.Parameter(before.clone())
    stepper = AdamW8bit([trained], lr=rate, weight_decay=0.0)
    (trained**2).sum().backward()
    stepper.step()
    moved = float((trained.detach() - before).abs().mean())
    if abs(moved - rate) < 0.1 * rate:
        yield CheckResult("adamw-8bit", "ok", f"a step on {device} moves as it should")
    else:
        yield CheckResult("adamw-8bit", "broken", f"a step on {device} moves by {moved:.4g}, not by {rate}", _AGAIN)


def errors_of(word: str, device: str) -> tuple[float, float]:
    """The relative errors of a quantized layer's output and of the gradient of its input, on random weights."""
    import torch

    half = torch.float16 if device == "cuda" else torch.float32
    numbers = torch.Generator().manual_seed(0)
    weight = torch.randn(_WIDTH, _WIDTH, generator=numbers) / _WIDTH**0.5
    layer = _layer(word, weight, half).to(device)
    given = torch.randn(_ROWS, _WIDTH, generator=numbers).to(device, half).requires_grad_()
    back = torch.randn(_ROWS, _WIDTH, generator=numbers).to(device, half)
    answer = layer(given)
    answer.backward(back)
    plain = weight.to(device)
    return (
        _relative_error(answer.float(), given.detach().float() @ plain.T),
        _relative_error(given.grad.float(), back.float() @ plain),
    )


def _layer(word: str, weight: Any, dtype: Any) -> Any:
    """A layer that quantizes the weight when it is moved to its device, as a model's layers do."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    if word == "q8":
        layer = Linear8bitLt(_WIDTH, _WIDTH, bias=False, has_fp16_weights=False)
        layer.weight = Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
        return layer
    kind = "fp4" if word == "q4" else word
    layer = Linear4bit(_WIDTH, _WIDTH, bias=False, quant_type=kind, compute_dtype=dtype)
    layer.weight = Params4bit(weight.clone(), requires_grad=False, quant_type=kind)
    return layer


def _relative_error(found: Any, exact: Any) -> float:
    return float((found - exact).norm() / exact.norm())


def device_of_runs() -> str:
    """`cuda` where torch can use a GPU, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
