"""Target selection: which weights of a model get an adapter, of which rank, and which modules are trained whole."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lorakit.model.module_inventory import list_weights
from lorakit.model.target_selection import resolve_overrides, select_weights
from lorakit.model.train_modules import select_train_modules
from lorakit.recipe.schema import Adapter


@dataclass(frozen=True)
class Targets:
    """What an adapter is put on, in PEFT's terms."""

    modules: list[str]
    """Full paths of linear layers."""
    experts: list[str]
    """Full paths of parameters: the fused weights of experts (experts, rows, columns), and the weights (out, in) of
    layers whose names PEFT would take for theirs."""
    ranks: dict[str, int]
    """Full path -> rank, where it is not the recipe's."""
    alphas: dict[str, float]
    """Full path -> alpha, where it is not the recipe's."""
    whole: list[str]
    """Full paths of the modules that are trained whole. Where embeddings are tied, both ends are among them."""
    tied: bool
    """Whether `whole` has embeddings that the model ties to its output head."""
    notes: list[str]
    """What the words of `adapter.targets` left out on their own, and why: one sentence each."""


def select_targets(
    model: Any,
    settings: Adapter,
    kind_adapts_experts: bool,
    signal: Callable[[list[str]], dict[str, float]] | None = None,
) -> Targets:
    """What `adapter.targets`, `exclude`, `layers`, the overrides and `train_modules` mean for a causal language model.

    Args:
        kind_adapts_experts: whether the adapter's kind can be put on the fused weights of experts.
        signal: paths of weights -> their signal-to-noise ratios, for `layers: {spectrum: ...}`.

    Raises:
        UserError: a name, a pattern or a number that matches nothing of this model, or a choice that cannot be adapted;
            the message says what the model has.
    """
    chosen, notes = select_weights(list_weights(model), settings, kind_adapts_experts, signal)
    whole, tied = select_train_modules(model, settings.train_modules, [weight.path for weight in chosen])
    if tied:
        notes.append(f"{' and '.join(whole[:2])} are one weight in this model, and are trained as one")
    return Targets(
        modules=[weight.path for weight in chosen if not weight.parameter],
        experts=[weight.parameter for weight in chosen if weight.parameter],
        ranks=resolve_overrides("rank_overrides", chosen, settings.rank_overrides, settings.rank),
        alphas=resolve_overrides("alpha_overrides", chosen, settings.alpha_overrides, settings.alpha),
        whole=whole,
        tied=tied,
        notes=notes,
    )
