"""Adapter kinds: a recipe's adapter section -> PEFT's configuration, and what the training loop must do besides.

One plain function a kind; `AdapterSpec` in lorakit/registry.py has what else a kind may say of itself.
The functions import torch and PEFT when they are called: the recipe reads this table too.
"""

from collections.abc import Iterator
from typing import Any

from lorakit.model.adapters.rank_scheduler import InitContext, RankScheduler
from lorakit.model.adapters.settings import AdaLora, Eva, FlexLora, Pissa
from lorakit.registry import ADAPTERS

_OF_LORA = ("adapter.rank", "adapter.alpha", "adapter.dropout", "adapter.rank_overrides", "adapter.alpha_overrides")
_OVERRIDES = ("adapter.rank_overrides", "adapter.alpha_overrides")


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
        ensure_weight_tying=bool(targets.whole and targets.tied),
        bias="none",
        task_type="CAUSAL_LM",
        **special,
    )


def _svd_rate(settings: Any) -> tuple[float, str]:
    return (
        10.0,
        "times 10: A and B begin small and E at zero (measured on SmolLM2, held-out loss after 20 and 50 steps)",
    )


def _svd(settings: Any, targets: Any, rank: int) -> Any:
    """The configuration of PEFT's layers that hold an adapter as B diag(E) A."""
    from peft import AdaLoraConfig

    return AdaLoraConfig(
        init_r=rank,
        target_r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets.modules,
        modules_to_save=targets.whole or None,
        ensure_weight_tying=bool(targets.whole and targets.tied),
        task_type="CAUSAL_LM",
        total_step=1,  # our own drivers count the steps
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
    return rank * (weight.inner + weight.outer) + int(weight.outer)


@ADAPTERS.register("dora", numbers=_dora_numbers)
def dora(settings: Any, targets: Any) -> Any:
    """DoRA (Liu et al., arXiv 2402.09353): length and direction of each row of W + alpha/rank * B A apart."""
    return _lora(settings, targets, use_dora=True)


def _pissa_rate(settings: Any) -> tuple[float, str]:
    return 0.1, "over 10: PiSSA's best rate against LoRA's (arXiv 2602.04998)"


def _start_pissa(model: Any, settings: Any, context: InitContext) -> None:
    from lorakit.model.adapters.principal import start_principal, truncated_svd

    start_principal(model, truncated_svd(settings.iterations), context.progress)


@ADAPTERS.register("pissa", settings=Pissa, rate=_pissa_rate, initialize=_start_pissa, keeps_initial=True)
def pissa(settings: Any, targets: Any) -> Any:
    """PiSSA (Meng et al., arXiv 2404.02948): LoRA that starts from each weight's largest singular directions."""
    return _lora(settings, targets)


def _olora_rate(settings: Any) -> tuple[float, str]:
    return 1 / 18, "over 18: OLoRA's best rate against LoRA's (arXiv 2602.04998)"


def _start_olora(model: Any, settings: Any, context: InitContext) -> None:
    from lorakit.model.adapters.principal import first_of_qr, start_principal

    start_principal(model, first_of_qr, context.progress)


@ADAPTERS.register("olora", rate=_olora_rate, initialize=_start_olora, keeps_initial=True)
def olora(settings: Any, targets: Any) -> Any:
    """OLoRA (Büyükakyüz, arXiv 2406.01775): LoRA that starts from an orthonormal basis of each weight."""
    return _lora(settings, targets)


def _start_eva(model: Any, settings: Eva, context: InitContext) -> None:
    from lorakit.model.adapters.eva import start_eva

    start_eva(model, settings.rho, settings.converged, context)


@ADAPTERS.register("eva", settings=Eva, initialize=_start_eva, refuses=_OVERRIDES)
def eva(settings: Any, targets: Any) -> Any:
    """EVA (Paischer et al., arXiv 2410.07170): LoRA that starts from the directions of its inputs on the rows."""
    return _lora(settings, targets)


def _start_loftq(model: Any, settings: Any, context: InitContext) -> None:
    from lorakit.model.adapters.loftq import start_loftq

    start_loftq(model, context)


@ADAPTERS.register("loftq", quantizations=("none",), quantizes="nf4", initialize=_start_loftq)
def loftq(settings: Any, targets: Any) -> Any:
    """LoftQ (Li et al., arXiv 2310.08659): puts the base into NF4, and starts from what that loses."""
    return _lora(settings, targets)


def _in_order(settings: Any, first: str, last: str) -> Iterator[tuple[tuple[str | int, ...], str, str]]:
    begin, end = getattr(settings, first), getattr(settings, last)
    if begin >= end:
        yield (last,), f"{end:g} is not after {first}, {begin:g}", f"Write a larger share, or a smaller {first}."


def _adalora_mistakes(settings: AdaLora, adapter: Any) -> Iterator[tuple[tuple[str | int, ...], str, str]]:
    if settings.initial_rank is not None and settings.initial_rank <= adapter.rank:
        reason = f"{settings.initial_rank} is not above adapter.rank, {adapter.rank}: nothing could shrink to it"
        yield ("initial_rank",), reason, f"Write {adapter.rank + 1} or more."
    yield from _in_order(settings, "shrink_from", "shrink_to")


def _drive_adalora(model: Any, settings: AdaLora, steps: int) -> RankScheduler:
    from lorakit.model.adapters.adalora import AdaLoraScheduler

    return AdaLoraScheduler(model, settings, steps)


def _first_rank(settings: Any) -> int:
    from lorakit.recipe.choice import entry_settings

    own = entry_settings(ADAPTERS, settings.kind)
    return int(own.initial_rank or max(settings.rank + 1, round(1.5 * settings.rank)))


def _adalora_numbers(settings: Any, rank: int, weight: Any) -> int:
    return _flexlora_numbers(settings, _first_rank(settings), weight)


@ADAPTERS.register(
    "adalora",
    numbers=_adalora_numbers,
    settings=AdaLora,
    mistakes=_adalora_mistakes,
    callback=_drive_adalora,
    refuses=(*_OVERRIDES, "train.lora_plus"),
    rate=_svd_rate,
)
def adalora(settings: Any, targets: Any) -> Any:
    """AdaLoRA (Zhang et al., arXiv 2303.10512): ranks shrink where directions matter least, while it trains."""
    return _svd(settings, targets, _first_rank(settings))


def _flexlora_mistakes(settings: FlexLora, adapter: Any) -> Iterator[tuple[tuple[str | int, ...], str, str]]:
    yield from _in_order(settings, "move_from", "move_to")


def _drive_flexlora(model: Any, settings: FlexLora, steps: int) -> RankScheduler:
    from lorakit.model.adapters.flexlora import FlexLoraScheduler

    return FlexLoraScheduler(model, settings, steps)


def _flexlora_numbers(settings: Any, rank: int, weight: Any) -> int:
    return rank * (int(weight.inner) + int(weight.outer) + 1)


@ADAPTERS.register(
    "flexlora",
    numbers=_flexlora_numbers,
    settings=FlexLora,
    mistakes=_flexlora_mistakes,
    callback=_drive_flexlora,
    refuses=(*_OVERRIDES, "train.lora_plus"),
    rate=_svd_rate,
    optimizers=("auto", "adamw"),
)
def flexlora(settings: Any, targets: Any) -> Any:
    """FlexLoRA (arXiv 2601.22905), experimental: ranks move from modules of low entropy to those of high."""
    return _svd(settings, targets, settings.rank)


def _full_rate(settings: Any) -> tuple[float, str]:
    return 0.1, "over 10: all weights want a tenth of LoRA's rate (LoRA Without Regret)"


@ADAPTERS.register(
    "none",
    quantizations=("none",),
    refuses=(*_OF_LORA, "adapter.train_modules", "train.lora_plus"),
    experts=True,
    rate=_full_rate,
)
def none(settings: Any, targets: Any) -> Any:
    """Full fine-tuning: the weights themselves are trained, all of them, or those of the chosen modules."""
    return None
