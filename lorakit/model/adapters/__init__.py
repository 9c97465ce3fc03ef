"""Adapter kinds: a recipe's adapter section -> PEFT's configuration, and what the training loop must do besides.

`AdapterSpec` in lorakit/registry.py has what a kind may say of itself. The recipe reads this table too: torch and PEFT
are imported by the functions, when they are called.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, Protocol

from pydantic import Field

from lorakit.progress import Progress
from lorakit.registry import ADAPTERS, Section

Mistakes = Iterator[tuple[tuple[str | int, ...], str, str]]

_OVERRIDES = ("adapter.rank_overrides", "adapter.alpha_overrides")
_Share = Annotated[float, Field(gt=0, lt=1)]
_ShareOrZero = Annotated[float, Field(ge=0, lt=1)]
_NotNegative = Annotated[float, Field(ge=0)]
_Count = Annotated[int, Field(gt=0)]


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


def _later(function: str) -> Callable[..., Any]:
    """A function of a module of this folder, such as `eva.init_eva`, imported when it is called: it needs torch."""
    module, _, name = function.partition(".")
    return lambda *given: getattr(import_module(f"{__name__}.{module}"), name)(*given)


def _config(kind: str, settings: Any, targets: Any, **special: Any) -> Any:
    import peft

    return getattr(peft, kind)(
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets.modules,
        modules_to_save=targets.whole or None,
        ensure_weight_tying=targets.tied,
        trainable_token_indices=targets.tokens or None,
        task_type="CAUSAL_LM",
        **special,
    )


def _lora(settings: Any, targets: Any, **special: Any) -> Any:
    patterns = {"rank_pattern": targets.ranks, "alpha_pattern": targets.alphas}
    special |= {"r": settings.rank, "target_parameters": targets.experts or None, "bias": "none", **patterns}
    return _config("LoraConfig", settings, targets, **special)


@ADAPTERS.register("lora", experts=True)
def lora(settings: Any, targets: Any) -> Any:
    """LoRA (Hu et al., arXiv 2106.09685): W + alpha/rank * B A."""
    return _lora(settings, targets)


def _rate(share: float, source: str) -> Callable[[Any], tuple[float, str]]:
    return lambda adapter: (share, source)


def _rslora_rate(adapter: Any) -> tuple[float, str]:
    return adapter.rank**-0.5, f"over sqrt({adapter.rank}): rslora scales the adapter up by that much"


@ADAPTERS.register("rslora", experts=True, rate=_rslora_rate)
def rslora(settings: Any, targets: Any) -> Any:
    """Rank-stabilized LoRA (Kalajdzievski, arXiv 2312.03732): W + alpha/sqrt(rank) * B A."""
    return _lora(settings, targets, use_rslora=True)


@ADAPTERS.register("dora", numbers=lambda adapter, rank, weight: rank * (weight.inner + weight.outer) + weight.outer)
def dora(settings: Any, targets: Any) -> Any:
    """DoRA (Liu et al., arXiv 2402.09353): length and direction of each row of W + alpha/rank * B A apart."""
    return _lora(settings, targets, use_dora=True)


class Pissa(Section):
    """Settings of pissa."""

    iterations: _Count | None = 16
    """Rounds of the randomized singular value decomposition; null makes an exact one, which takes far longer."""


@ADAPTERS.register(
    "pissa",
    settings=Pissa,
    rate=_rate(0.1, "over 10: PiSSA's best rate against LoRA's (arXiv 2602.04998)"),
    initialize=_later("weight_init.init_pissa"),
    keeps_initial=True,
)
def pissa(settings: Any, targets: Any) -> Any:
    """PiSSA (Meng et al., arXiv 2404.02948): LoRA that starts from each weight's largest singular directions."""
    return _lora(settings, targets)


@ADAPTERS.register(
    "olora",
    rate=_rate(1 / 18, "over 18: OLoRA's best rate against LoRA's (arXiv 2602.04998)"),
    initialize=_later("weight_init.init_olora"),
    keeps_initial=True,
)
def olora(settings: Any, targets: Any) -> Any:
    """OLoRA (Büyükakyüz, arXiv 2406.01775): LoRA that starts from an orthonormal basis of each weight."""
    return _lora(settings, targets)


class Eva(Section):
    """Settings of eva."""

    rho: Annotated[float, Field(ge=1)] = 2.0
    """How many times `rank` a module may get; 1 leaves every module its rank."""
    converged: _Share = 0.99
    """How alike the directions found after two batches must be for the pass over the rows to end."""


@ADAPTERS.register("eva", settings=Eva, initialize=_later("weight_init.init_eva"), refuses=_OVERRIDES)
def eva(settings: Any, targets: Any) -> Any:
    """EVA (Paischer et al., arXiv 2410.07170): LoRA that starts from the directions of its inputs on the rows."""
    return _lora(settings, targets)


@ADAPTERS.register("loftq", quantizations=("none",), quantizes="nf4", initialize=_later("weight_init.init_loftq"))
def loftq(settings: Any, targets: Any) -> Any:
    """LoftQ (Li et al., arXiv 2310.08659): puts the base into NF4, and starts from what that loses."""
    return _lora(settings, targets)


def _svd(settings: Any, targets: Any, initial_rank: int) -> Any:
    """The configuration of PEFT's layers that hold an adapter as B diag(E) A."""
    # Our own schedulers count the steps.
    return _config("AdaLoraConfig", settings, targets, init_r=initial_rank, target_r=settings.rank, total_step=1)


_SVD_RATE = _rate(
    10.0, "times 10: A and B begin small and E at zero (measured on SmolLM2, held-out loss after 20 and 50 steps)"
)


def _svd_numbers(adapter: Any, rank: int, weight: Any) -> int:
    return int(rank * (weight.inner + weight.outer + 1))


def _order_mistakes(settings: Any, first: str, last: str) -> Mistakes:
    begin, end = getattr(settings, first), getattr(settings, last)
    if begin >= end:
        yield (last,), f"{end:g} is not after {first}, {begin:g}", f"Write a larger share, or a smaller {first}."


class AdaLora(Section):
    """Settings of adalora. Its budget is `rank` for every module on average."""

    initial_rank: _Count | None = None
    """The rank that every module starts with; null is one and a half times `rank`."""
    shrink_from: _ShareOrZero = 0.1
    """The share of the steps after which directions begin to be removed."""
    shrink_to: _Share = 0.7
    """The share of the steps after which the ranks stay as they are."""
    every: _Count = 5
    """Steps from one choice of directions to the next."""
    smoothing: _Share = 0.85
    """The moving averages' share of the past: of a direction's importance, and of how sure that is."""
    orthogonality: _NotNegative = 0.5
    """The weight of the penalty that keeps directions apart."""


def _adalora_mistakes(settings: AdaLora, adapter: Any) -> Mistakes:
    if settings.initial_rank is not None and settings.initial_rank <= adapter.rank:
        reason = f"{settings.initial_rank} is not above adapter.rank, {adapter.rank}: nothing could shrink to it"
        yield ("initial_rank",), reason, f"Write {adapter.rank + 1} or more."
    yield from _order_mistakes(settings, "shrink_from", "shrink_to")


def _initial_rank(adapter: Any) -> int:
    from lorakit.recipe.fields import entry_settings

    own = entry_settings(ADAPTERS, adapter.kind)
    return int(own.initial_rank or max(adapter.rank + 1, round(1.5 * adapter.rank)))


@ADAPTERS.register(
    "adalora",
    numbers=lambda adapter, rank, weight: _svd_numbers(adapter, _initial_rank(adapter), weight),
    settings=AdaLora,
    mistakes=_adalora_mistakes,
    callback=_later("svd.AdaLoraScheduler"),
    refuses=(*_OVERRIDES, "train.lora_plus"),
    rate=_SVD_RATE,
)
def adalora(settings: Any, targets: Any) -> Any:
    """AdaLoRA (Zhang et al., arXiv 2303.10512): ranks shrink where directions matter least, while it trains."""
    return _svd(settings, targets, _initial_rank(settings))


class FlexLora(Section):
    """Settings of flexlora. The sum of all ranks stays what it is."""

    move_from: _ShareOrZero = 0.1
    """The share of the steps after which ranks begin to move."""
    move_to: _Share = 0.7
    """The share of the steps after which the ranks stay as they are."""
    every: _Count = 5
    """Steps from one move to the next."""
    moved: _Count = 4
    """How many modules give a direction away at each move, and how many get one."""
    orthogonality: _NotNegative = 0.1
    """The weight of the penalty that keeps directions apart."""


@ADAPTERS.register(
    "flexlora",
    numbers=_svd_numbers,
    settings=FlexLora,
    mistakes=lambda settings, adapter: _order_mistakes(settings, "move_from", "move_to"),
    callback=_later("svd.FlexLoraScheduler"),
    refuses=(*_OVERRIDES, "train.lora_plus"),
    rate=_SVD_RATE,
    optimizers=("auto", "adamw"),
)
def flexlora(settings: Any, targets: Any) -> Any:
    """FlexLoRA (arXiv 2601.22905), experimental: ranks move from modules of low entropy to those of high."""
    return _svd(settings, targets, settings.rank)


@ADAPTERS.register(
    "none",
    quantizations=("none",),
    refuses=(
        *(f"adapter.{key}" for key in ("rank", "alpha", "dropout", "train_modules")),
        "train.lora_plus",
        *_OVERRIDES,
    ),
    experts=True,
    rate=_rate(0.1, "over 10: all weights want a tenth of LoRA's rate (LoRA Without Regret)"),
)
def none(settings: Any, targets: Any) -> Any:
    """Full fine-tuning: the weights themselves are trained, all of them, or those of the chosen modules."""
    return None
