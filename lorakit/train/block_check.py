"""Kernels and compiled blocks, tried on two rows before the first step: loss and gradients are those of plain code, or
the run goes on with that and says why. Its result is not at risk either way.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lorakit.distributed.processes import gather
from lorakit.errors import LorakitError
from lorakit.model.block_code import PLAIN, BlockCode
from lorakit.model.compiled_blocks import blocks_of
from lorakit.model.cpu_kernels import cpu_kernels
from lorakit.model.kernels import Kernels, liger_kernels, use_kernels
from lorakit.model.loss import EXACT, HALF, losses_agree, supervised_loss
from lorakit.train.micro_batching import MicroBatchRunner, autocast, compute_optimizations
from lorakit.train.trial import restoring_modes, two_rows

# How far the gradients of two ways may lie apart, as a share of their length: float32, or half precision, whose
# rounding alone moves them by a few percent.
_EXACT_GRADIENTS, _HALF_GRADIENTS = 1e-3, 0.1
# Numbers of each gradient that are compared: of a matrix that is trained whole not all.
_COMPARED = 1 << 16

_KERNEL_NAMES = {"rms_norm": "RMSNorm", "rotary": "rotation", "swiglu": "SwiGLU", "geglu": "GeGLU"}


@dataclass(frozen=True)
class _Trial:
    """Loss and gradients of two rows, the latter as one vector."""

    loss: torch.Tensor
    gradients: torch.Tensor
    tokens: int


def choose_block_code(runner: MicroBatchRunner, make_kernels: Callable[[], Kernels] | None = None) -> BlockCode:
    """The code that computes the blocks of a run: what its recipe asks for, where that gives what plain code does.
    `make_kernels` takes the place of those of the run's device."""
    train, progress = runner.recipe.train, runner.progress
    if train.compile == "on":
        warn = partial(_warn, progress, "train.compile")
        if code := _agreeing(runner, lambda: _compiled(runner, warn), warn):
            progress.say(f"compiled: {len(blocks_of(runner.model))} blocks, after a trial on two rows")
            return code
    elif train.kernels != "off":
        warn = partial(_warn, progress, "train.kernels")
        if code := _agreeing(runner, lambda: _with_kernels(runner, make_kernels), warn):
            progress.say(f"kernels: {_counts(runner.model, code.kernels)}, after a trial on two rows")
            return code
    return PLAIN


def _warn(progress: Any, key: str, reason: str) -> None:
    progress.warn(f"{key}: {reason}. The run goes on with the model's own code, to the same result.")


def _compiled(runner: MicroBatchRunner, on_stop: Callable[[str], None]) -> BlockCode:
    if not blocks_of(runner.model):
        raise LorakitError("transformers names no blocks of this model that could be compiled one by one")
    return BlockCode(compiled=True, words="compiled", on_stop=on_stop)


def _with_kernels(runner: MicroBatchRunner, make: Callable[[], Kernels] | None) -> BlockCode:
    on_cpu = runner.device.type == "cpu"
    if on_cpu and runner.recipe.model.dtype != "float32":
        raise LorakitError("lorakit's own for a processor compute in float32")
    kernels = (make or (cpu_kernels if on_cpu else liger_kernels))()
    if not _counts(runner.model, kernels):
        raise LorakitError("there are none for the family of this model")
    return BlockCode(kernels, words="processor" if on_cpu else "liger")


def _counts(model: Any, kernels: Kernels) -> str:
    with use_kernels(model, kernels) as counts:
        pass
    return ", ".join(f"{count} x {_KERNEL_NAMES[name]}" for name, count in sorted(counts.items()))


def _agreeing(runner: MicroBatchRunner, make: Callable[[], BlockCode], warn: Callable[[str], None]) -> BlockCode | None:
    """A code, if it gives the loss and the gradients that plain code does, on all processes; `warn` is told why not."""
    code, reason = PLAIN, ""
    try:
        code = make()
        reason = _difference(_trial(runner, code), _trial(runner, PLAIN), runner.recipe.model.dtype)
    except LorakitError as error:
        reason = str(error)
    except Exception as error:  # whatever a compiler or a driver raises: it is reported, and plain code runs
        reason = f"failed on two rows ({_first_line(error)})"
    reasons = [reason for reason in gather(reason) if reason]
    if reasons:
        warn(reasons[0])
    return None if reasons else code


def _first_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _trial(runner: MicroBatchRunner, code: BlockCode) -> _Trial:
    """Two rows forward and backward, as the run computes them, but for dropout. Of the model nothing is changed."""
    model = runner.model
    batch = runner.layout.collate(runner.layout.pack(two_rows(runner.prepared.train.rows))).to(runner.device)
    with restoring_modes(runner):
        if _drops(model):
            model.eval()
        with compute_optimizations(model, runner.recipe.model.dtype, code):
            given = {"attention_mask": None, **batch.tensors, "trained": batch.trained}
            with autocast(runner.device, runner.recipe.model.dtype):
                loss, count = runner.run(supervised_loss, model, **given)
            (loss / max(count, 1)).backward()  # within: checkpointed blocks compute again what they computed
        parts = [_sample(p.grad) for p in model.parameters() if p.grad is not None]
        return _Trial(loss.detach(), torch.cat(parts), count)


def _drops(model: Any) -> bool:
    config = model.config.get_text_config()
    dropouts = (module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))
    return any(dropouts) or bool(getattr(config, "attention_dropout", 0))


def _sample(gradient: torch.Tensor) -> torch.Tensor:
    numbers = gradient.detach().flatten()
    return numbers[:: max(1, len(numbers) // _COMPARED)].float().clone()


def _difference(trial: _Trial, expected: _Trial, dtype: str) -> str:
    """How a trial differs from another beyond the rounding of the arithmetic; "" where it does not."""
    exact = dtype == "float32"
    if not losses_agree(trial.loss, expected.loss, expected.tokens, EXACT if exact else HALF):
        loss, own = (one.loss.item() / max(expected.tokens, 1) for one in (trial, expected))
        return f"gave another loss on two rows than the model's own code, {loss:.5g} instead of {own:.5g}"
    if trial.gradients.shape != expected.gradients.shape:
        return "gave gradients to other weights than the model's own code"
    length = float(expected.gradients.norm())
    apart = float((trial.gradients - expected.gradients).norm()) / length if length else 0.0
    if apart > (_EXACT_GRADIENTS if exact else _HALF_GRADIENTS) or apart != apart:
        return f"gave other gradients on two rows than the model's own code: {apart:.2g} of their length apart"
    return ""
