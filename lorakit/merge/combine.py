"""Several adapters of one base -> one plain LoRA adapter, without the base's weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit.atomic_io import atomic_dir, sha256_of
from lorakit.errors import LorakitError, UserError
from lorakit.merge.card import COMBINED, write_card, write_facts
from lorakit.merge.low_rank import METHODS, CombineMethod, LowRankFactors, squared_distance
from lorakit.merge.peft_layout import (
    AdapterLayer,
    adapter_layers,
    adapter_tensors,
    name_factors,
    plain_lora_config,
    write_adapter,
)
from lorakit.merge.writer import explain_full_disk
from lorakit.model.companion_files import write_tokenizer
from lorakit.model.layerwise import adapter_without_base
from lorakit.model.peft_adapter import adapter_config
from lorakit.run_dir import now, versions

# float32 holds a sum of products to about this share.
_EXACT = 1e-5
_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class _OpenAdapter:
    folder: Path
    config: Any
    factors: dict[AdapterLayer, LowRankFactors]
    rank: int


def check_options(
    count: int, weights: Sequence[float], method: str, density: float | None, seed: int | None, rank: int | None
) -> None:
    """Refuse options that are out of range, or would do nothing."""
    entry = METHODS.get(method)
    if entry is None:
        raise UserError(f"--method: there is no {method}. Write one of {', '.join(METHODS)}.")
    if count < 2:
        raise UserError(f"--method {method}: combines two adapters or more; {count} was given. Give more runs.")
    if len(weights) != count:
        raise UserError(f"--weights: {len(weights)} for {count} adapters. Write one for each, such as 0.5,0.5.")
    for weight in weights:
        if not math.isfinite(weight) or weight == 0:
            raise UserError(f"--weights: {weight:g} is not a weight. Leave the adapter out, or write a number but 0.")
    if density is None and entry.takes_density:
        raise UserError(f"--density: {method} keeps a share of each adapter's numbers. Write --density 0.5.")
    if density is not None and not entry.takes_density:
        able = ", ".join(name for name, other in METHODS.items() if other.takes_density)
        raise UserError(f"--density: {method} keeps every number. Leave it out, or take one of {able}.")
    if density is not None and not 0 < density <= 1:
        raise UserError(f"--density: {density:g} is not a share of an adapter's numbers. Write one over 0 and up to 1.")
    if seed is not None and not entry.is_random:
        raise UserError(f"--seed: nothing in {method} is random. Leave it out.")
    if seed is not None and not 0 <= seed < 2**63:
        raise UserError(f"--seed: {seed} is not a seed. Write a whole number from 0 on, below 2^63.")
    if rank is not None and not entry.takes_rank:
        raise UserError(f"--rank: {method} has the rank that its adapters give it. Leave it out, or take svd.")
    if rank is not None and rank < 1:
        raise UserError(f"--rank: {rank} is not a rank. Write 1 or more.")


def combine(
    adapters: Sequence[Path],
    weights: Sequence[float],
    method: str,
    base_folder: Path,
    output: Path,
    *,
    density: float | None = None,
    seed: int | None = None,
    rank: int | None = None,
    tokenizer: Any = None,
) -> dict[str, Any]:
    """Combine adapters of one base into a new adapter in `output`, which is replaced where it is there.

    Args:
        adapters: folders in PEFT's format, two or more; the options are those that `check_options` allows.
        weights: one for each, which may be negative and need not add up to 1.
        base_folder: the model that they belong to, of which the configuration is read and no weight.
        tokenizer: the base's, to be written beside the adapter, maybe with another chat template.

    Returns:
        What `combine.json` says of the combination (docs/merging.md). `off_sum` is how far its change is from the
        weighted sum of the adapters' changes, over that sum's length (Frobenius norms over all layers).
    """
    seed = (seed or 0) if METHODS[method].is_random else None
    opened = [open_adapter(folder, base_folder) for folder in adapters]
    _check_experts(opened)
    combined = _combine_layers(opened, weights, METHODS[method], density, seed or 0, rank)
    config = plain_lora_config(combined)
    config.base_model_name_or_path = opened[0].config.base_model_name_or_path
    config.revision = opened[0].config.revision
    tensors = name_factors(combined)
    facts: dict[str, Any] = {"method": method, "density": density, "seed": seed, "sources": []}
    for one, weight in zip(opened, weights, strict=True):
        digests = {name: sha256_of(one.folder / name) for name in _FILES}
        source = {"folder": str(one.folder), "weight": float(weight), "rank": one.rank, "sha256": digests}
        facts["sources"].append(source)
    with explain_full_disk(output), atomic_dir(output) as draft:
        write_adapter(draft, config, tensors)
        written = open_adapter(draft, base_folder)  # as PEFT reads it from its files
        distances = [squared_distance(own, *_parts(layer, opened, weights)) for layer, own in written.factors.items()]
        length, off = (sum(column) for column in zip(*distances, strict=True))
        off_sum = math.sqrt(off / length) if length else math.sqrt(off)
        if method == "cat" and not off_sum <= _EXACT:
            raise LorakitError(f"{output}: the written adapter is {off_sum:.2g} off the weighted sum. It was not kept.")
        if tokenizer is not None:
            write_tokenizer(base_folder, tokenizer, draft)
        size = sum(tensor.numel() for tensor in tensors.values())
        facts |= {"rank": written.rank, "modules": len(combined), "parameters": size, "off_sum": off_sum}
        _describe(draft, output.name, facts, str(config.base_model_name_or_path))
    return facts


def _combine_layers(
    opened: list[_OpenAdapter],
    weights: Sequence[float],
    method: CombineMethod,
    density: float | None,
    seed: int,
    rank: int | None,
) -> dict[AdapterLayer, LowRankFactors]:
    combined = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for layer in sorted({layer for one in opened for layer in one.factors}, key=lambda layer: layer.stem):
            parts, of_parts = _parts(layer, opened, weights)
            if method.equal_ranks and len({part.rank for part in parts}) > 1:
                folders = [one.folder for one in opened if layer in one.factors]
                ranks = " and ".join(f"{part.rank} ({folder})" for part, folder in zip(parts, folders, strict=True))
                able = " or ".join(name for name, entry in METHODS.items() if not entry.equal_ranks)
                raise UserError(
                    f"--method: {layer.target} has the ranks {ranks}, which this method cannot combine: it goes "
                    f"through A and B number by number. Take {able}, which take any ranks."
                )
            combined[layer] = method.function(parts, of_parts, density, rank)
    return combined


def _parts(
    layer: AdapterLayer, opened: list[_OpenAdapter], weights: Sequence[float]
) -> tuple[list[LowRankFactors], list[float]]:
    pairs = [(one.factors[layer], weight) for one, weight in zip(opened, weights, strict=True) if layer in one.factors]
    return [factors for factors, _ in pairs], [weight for _, weight in pairs]


def _describe(draft: Path, name: str, facts: dict[str, Any], base: str) -> None:
    write_facts(draft / COMBINED, {"format": 1, "made": now(), "versions": versions(), "base": base, **facts})
    method, density, seed = facts["method"], facts["density"], facts["seed"]
    settings = "" if density is None else f"Density {density:g}{'' if seed is None else f', seed {seed}'}. "
    rows = [f"| {one['folder']} | {one['weight']:g} | {one['rank']} |" for one in facts["sources"]]
    write_card(
        draft,
        name,
        base,
        "combined",
        f"Adapters of `{base}`, combined with lorakit {versions().get('lorakit', '')} by `{method}`: "
        f"{METHODS[method].summary}.",
        "\n".join(["| adapter | weight | rank |", "|---|---|---|", *rows]),
        f"{settings}The combined adapter has rank {facts['rank']} on {facts['modules']} weights. Its "
        f"distance from the weighted sum of the adapters' changes is {facts['off_sum']:.2g} of that sum's length.",
    )


def open_adapter(folder: Path, base_folder: Path) -> _OpenAdapter:
    """Read an adapter; one is refused that is damaged, or has parts that no method combines."""
    config, reason = adapter_config(folder), ""
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        reason = f"is of PEFT's kind {config.peft_type}, and only LoRA adapters are combined"
    elif config.use_dora:
        reason = "is a DoRA adapter, whose magnitudes belong to its own A and B and cannot be combined"
    elif config.modules_to_save:
        names = ", ".join(sorted(config.modules_to_save))
        reason = f"brings modules trained whole ({names}), which would be lost: only low-rank changes are combined"
    else:
        model, replaced = adapter_without_base(base_folder, folder)
        tensors = adapter_tensors(model)
        others = [name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))] + replaced
        if others:
            reason = f"holds {others[0]}, which would be lost: only A and B of linear layers are combined"
    if reason:
        raise UserError(f"{folder}: {reason}. Merge it into the base on its own: lorakit merge RUN.")
    broken = next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None)
    if broken:
        raise UserError(f"{folder}: holds numbers that are not finite, the first in {broken}. It is not combined.")
    factors = {}
    for layer in adapter_layers(model):
        a, b = (tensors[f"{layer.stem}.lora_{half}.weight"].float() for half in "AB")
        factors[layer] = LowRankFactors(a, b, layer.scale, layer.experts)
    rank = max(of_layer.rank for of_layer in factors.values())
    return _OpenAdapter(folder, model.peft_config["default"], factors, rank)


def _check_experts(opened: list[_OpenAdapter]) -> None:
    """PEFT names the tensors of fused experts by how many of their weights are adapted, so these must be the same."""
    expected: set[str] = set()
    for one in opened:
        paths = {layer.path for layer in one.factors if layer.is_parameter}
        expected = expected or paths
        if paths and paths != expected:
            raise UserError(
                f"{one.folder}: adapts other fused weights of experts than the adapters before it, such as "
                f"{min(paths ^ expected)}: PEFT holds them in one adapter only where all have the same."
            )
