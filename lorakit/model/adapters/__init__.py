"""Adapter kinds: a recipe's adapter section -> PEFT's configuration, and what the training loop must do besides.

One plain function a kind; `AdapterSpec` in lorakit/registry.py has what else a kind may say of itself.
The functions import torch and PEFT when they are called: the recipe reads this table too.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from lorakit.model.adapters.settings import AdaLora, Eva, FlexLora, Pissa
from lorakit.progress import Progress
from lorakit.registry import ADAPTERS

_OVERRIDES = ("adapter.rank_overrides", "adapter.alpha_overrides")

Mistakes = Iterator[tuple[tuple[str | int, ...], str, str]]


@dataclass(frozen=True)
class InitContext:
    """What the initialization of an adapter may ask for."""

    batches: Callable[[], Iterator[dict[str, Any]]]
    """The batches of the first epoch, in training order: input_ids, attention_mask and labels, each (rows, tokens)."""
    originals: Callable[[list[str]], dict[str, Any]]
    """Module paths -> the weights (out, in) that lie on disk for them, before any quantization."""
    progress: Progress


class RankScheduler(Protocol):
    """What moves the ranks of some kinds while they train. Steps count from 1."""

    settled_at: int
    """The step from which the adapter has the shape that was asked for: earlier ones are no result."""

    def penalty(self) -> Any:
        """A scalar that is added to the loss of every step, with its gradient."""

    def after_step(self, step: int, optimizer: Any) -> None:
        """Called when the optimizer has made `step`, while the gradients are still there."""

    def state(self) -> dict[str, Any]:
        """Tensors by name that the next steps depend on, besides the trained weights."""

    def restore(self, state: dict[str, Any], weights: dict[str, Any]) -> None:
        """Go on from a `state`, and give trained parameters the shapes that they have in `weights`."""


def _imported(module: str, name: str) -> Callable[..., Any]:
    """A function of a module of this package, which is imported (and torch with it) when the function is called."""

    def call(*arguments: Any) -> Any:
        return getattr(import_module(f"{__name__}.{module}"), name)(*arguments)

    return call


def _rate(share: float, source: str) -> Callable[[Any], tuple[float, str]]:
    return lambda settings: (share, source)


def _lora(settings: Any, targets: Any, **special: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets.modules,
        target_parameters=targets.experts or None,
        rank_pattern=targets.ranks,
        alpha_pattern=targets.alphas,
        modules_to_save=targets.whole or None,
        ensure_weight_tying=targets.tied,
        bias="none",
        task_type="CAUSAL_LM",
        **special,
    )


@ADAPTERS.register("lora", experts=True)
def lora(settings: Any, targets: Any) -> Any:
    """LoRA (Hu et al., arXiv 2106.09685): W + alpha/rank * B A."""
    return _lora(settings, targets)


def _rslora_rate(settings: Any) -> tuple[float, str]:
    return settings.rank**-0.5, f"over sqrt({settings.rank}): rslora scales the adapter up by that much"


@ADAPTERS.register("rslora", experts=True, rate=_rslora_rate)
def rslora(settings: Any, targets: Any) -> Any:
    """Rank-stabilized LoRA (Kalajdzievski, arXiv 2312.03732): W + alpha/sqrt(rank) * B A."""
    return _lora(settings, targets, use_rslora=True)


def _dora_numbers(settings: Any, rank: int, weight: Any) -> int:
    return int(rank * (weight.inner + weight.outer) + weight.outer)


@ADAPTERS.register("dora", numbers=_dora_numbers)
def dora(settings: Any, targets: Any) -> Any:
    """DoRA (Liu et al., arXiv 2402.09353): length and direction of each row of W + alpha/rank * B A apart."""
    return _lora(settings, targets, use_dora=True)


@ADAPTERS.register(
    "pissa",
    settings=Pissa,
    rate=_rate(0.1, "over 10: PiSSA's best rate against LoRA's (arXiv 2602.04998)"),
    initialize=_imported("weight_init", "init_pissa"),
    keeps_initial=True,
)
def pissa(settings: Any, targets: Any) -> Any:
    """PiSSA (Meng et al., arXiv 2404.02948): LoRA that starts from each weight's largest singular directions."""
    return _lora(settings, targets)


@ADAPTERS.register(
    "olora",
    rate=_rate(1 / 18, "over 18: OLoRA's best rate against LoRA's (arXiv 2602.04998)"),
    initialize=_imported("weight_init", "init_olora"),
    keeps_initial=True,
)
def olora(settings: Any, targets: Any) -> Any:
    """OLoRA (Büyükakyüz, arXiv 2406.01775): LoRA that starts from an orthonormal basis of each weight."""
    return _lora(settings, targets)


@ADAPTERS.register("eva", settings=Eva, initialize=_imported("eva", "init_eva"), refuses=_OVERRIDES)
def eva(settings: Any, targets: Any) -> Any:
    """EVA (Paischer et al., arXiv 2410.07170): LoRA that starts from the directions of its inputs on the rows."""
    return _lora(settings, targets)


@ADAPTERS.register("loftq", quantizations=("none",), quantizes="nf4", initialize=_imported("weight_init", "init_loftq"))
def loftq(settings: Any, targets: Any) -> Any:
    """LoftQ (Li et al., arXiv 2310.08659): puts the base into NF4, and starts from what that loses."""
    return _lora(settings, targets)


_svd_rate = _rate(
    10.0, "times 10: A and B begin small and E at zero (measured on SmolLM2, held-out loss after 20 and 50 steps)"
)


def _svd(settings: Any, targets: Any, initial_rank: int) -> Any:
    """The configuration of PEFT's layers that hold an adapter as B diag(E) A."""
    from peft import AdaLoraConfig

    return AdaLoraConfig(
        init_r=initial_rank,
        target_r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets.modules,
        modules_to_save=targets.whole or None,
        ensure_weight_tying=targets.tied,
        task_type="CAUSAL_LM",
        total_step=1,  # our own schedulers count the steps
    )


def _order_mistakes(settings: Any, first: str, last: str) -> Mistakes:
    begin, end = getattr(settings, first), getattr(settings, last)
    if begin >= end:
        yield (last,), f"{end:g} is not after {first}, {begin:g}", f"Write a larger share, or a smaller {first}."


def _adalora_mistakes(settings: AdaLora, adapter: Any) -> Mistakes:
    if settings.initial_rank is not None and settings.initial_rank <= adapter.rank:
        reason = f"{settings.initial_rank} is not above adapter.rank, {adapter.rank}: nothing could shrink to it"
        yield ("initial_rank",), reason, f"Write {adapter.rank + 1} or more."
    yield from _order_mistakes(settings, "shrink_from", "shrink_to")


def _initial_rank(settings: Any) -> int:
    from lorakit.recipe.fields import entry_settings

    own = entry_settings(ADAPTERS, settings.kind)
    return int(own.initial_rank or max(settings.rank + 1, round(1.5 * settings.rank)))


def _adalora_numbers(settings: Any, rank: int, weight: Any) -> int:
    return _flexlora_numbers(settings, _initial_rank(settings), weight)


@ADAPTERS.register(
    "adalora",
    numbers=_adalora_numbers,
    settings=AdaLora,
    mistakes=_adalora_mistakes,
    callback=_imported("adalora", "AdaLoraScheduler"),
    refuses=(*_OVERRIDES, "train.lora_plus"),
    rate=_svd_rate,
)
def adalora(settings: Any, targets: Any) -> Any:
    """AdaLoRA (Zhang et al., arXiv 2303.10512): ranks shrink where directions matter least, while it trains."""
    return _svd(settings, targets, _initial_rank(settings))


def _flexlora_mistakes(settings: FlexLora, adapter: Any) -> Mistakes:
    return _order_mistakes(settings, "move_from", "move_to")


def _flexlora_numbers(settings: Any, rank: int, weight: Any) -> int:
    return int(rank * (weight.inner + weight.outer + 1))


@ADAPTERS.register(
    "flexlora",
    numbers=_flexlora_numbers,
    settings=FlexLora,
    mistakes=_flexlora_mistakes,
    callback=_imported("flexlora", "FlexLoraScheduler"),
    refuses=(*_OVERRIDES, "train.lora_plus"),
    rate=_svd_rate,
    optimizers=("auto", "adamw"),
)
def flexlora(settings: Any, targets: Any) -> Any:
    """FlexLoRA (arXiv 2601.22905), experimental: ranks move from modules of low entropy to those of high."""
    return _svd(settings, targets, settings.rank)


@ADAPTERS.register(
    "none",
    quantizations=("none",),
    refuses=(
        *("adapter.rank", "adapter.alpha", "adapter.dropout", *_OVERRIDES),
        *("adapter.train_modules", "train.lora_plus"),
    ),
    experts=True,
    rate=_rate(0.1, "over 10: all weights want a tenth of LoRA's rate (LoRA Without Regret)"),
)
def none(settings: Any, targets: Any) -> Any:
    """Full fine-tuning: the weights themselves are trained, all of them, or those of the chosen modules."""
    return None
