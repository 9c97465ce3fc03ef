"""Several adapters of one base -> one plain LoRA adapter, without the base's weights."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit.atomic_io import atomic_dir, sha256_of
from lorakit.errors import LorakitError, UserError
from lorakit.merge.low_rank import METHODS, CombineMethod, LowRankFactors, distance
from lorakit.merge.peft_layout import AdapterLayer, plain_lora_config, write_adapter, write_facts
from lorakit.merge.sources import FILES, OpenAdapter, check_experts, open_adapter
from lorakit.merge.writer import explain_full_disk
from lorakit.model.tokenizer_files import write_tokenizer
from lorakit.run_dir import now, versions

FACTS = "combine.json"
"""The file by which a folder is known to hold combined adapters."""
# float32 holds a sum of products to about this share.
_EXACT = 1e-5

_CARD = """\
---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags: [lora, lorakit, combined]
---

# {name}

Adapters of `{base}`, combined with lorakit {version} by `{method}`: {summary}.

| adapter | weight | rank |
|---|---|---|
{sources}

{settings}The combined adapter has rank {rank} on {modules} weights. From the weighted sum of the adapters' changes
it lies {distance:.2g} of that sum's length away.
"""


@dataclass(frozen=True)
class CombinedAdapter:
    """One adapter that went into a combination."""

    folder: str
    weight: float
    rank: int
    """The largest of its layers."""
    sha256: dict[str, str]


@dataclass(frozen=True)
class CombineResult:
    """A combination of adapters."""

    folder: Path
    method: str
    density: float | None
    seed: int | None
    sources: tuple[CombinedAdapter, ...]
    rank: int
    """The largest of its layers."""
    modules: int
    parameters: int
    off_sum: float
    """How far its change lies from the weighted sum of the sources' changes, over that sum's length (Frobenius norms
    over all layers). 0 within rounding for `cat`; of `svd`, 1 - off_sum^2 is the share of the sum that is kept."""


def check_options(
    count: int, weights: Sequence[float], method: str, density: float | None, seed: int | None, rank: int | None
) -> None:
    """Refuse options that do not go together.

    Raises:
        UserError: one of them cannot be, or would do nothing.
    """
    chosen = METHODS.get(method)
    if chosen is None:
        raise UserError(f"--method: there is no {method}. Write one of {', '.join(METHODS)}.")
    if count < 2:
        raise UserError(f"--method {method}: combines two adapters or more; {count} was given. Give more runs.")
    if len(weights) != count:
        raise UserError(f"--weights: {len(weights)} for {count} adapters. Write one for each, such as 0.5,0.5.")
    for weight in weights:
        if not math.isfinite(weight) or weight == 0:
            raise UserError(f"--weights: {weight:g} is not a weight. Leave the adapter out, or write a number but 0.")
    density_methods = ", ".join(name for name, entry in METHODS.items() if entry.takes_density)
    if density is None and chosen.takes_density:
        raise UserError(
            f"--density: {method} keeps a share of each adapter's numbers, and none is given. Write --density 0.5."
        )
    if density is not None and not chosen.takes_density:
        raise UserError(f"--density: {method} keeps every number. Leave it out, or take one of {density_methods}.")
    if density is not None and not 0 < density <= 1:
        raise UserError(f"--density: {density:g} is not a share of an adapter's numbers. Write one over 0 and up to 1.")
    if seed is not None and not chosen.is_random:
        raise UserError(f"--seed: nothing in {method} is random. Leave it out.")
    if seed is not None and not 0 <= seed < 2**63:
        raise UserError(f"--seed: {seed} is not a seed. Write a whole number from 0 on, below 2^63.")
    if rank is not None and not chosen.takes_rank:
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
) -> CombineResult:
    """Combine adapters of one base into a new adapter in `output`, which is replaced where it is there.

    Args:
        adapters: folders in PEFT's format, two or more.
        weights: one for each, which may be negative; not shares, so they need not add up to 1.
        base_folder: the model that they belong to, of which the configuration is read and no weight.
        density: the share of an adapter's numbers that is kept, for the methods that drop some.
        seed: of the methods that drop numbers at random; 0 where none is given.
        rank: of `svd`; the largest of the adapters' where none is given.
        tokenizer: the base's, to be written beside the adapter, maybe with another chat template.

    Raises:
        UserError: options that do not go together, or an adapter that cannot be combined.
    """
    check_options(len(adapters), weights, method, density, seed, rank)
    chosen = METHODS[method]
    seed = (seed or 0) if chosen.is_random else None
    opened = [open_adapter(folder, base_folder) for folder in adapters]
    check_experts(opened)
    made = _combined(opened, weights, chosen, density, seed, rank)
    ranks = {layer: factors.rank for layer, factors in made.items()}
    config = plain_lora_config(ranks)
    config.base_model_name_or_path = opened[0].config.base_model_name_or_path
    config.revision = opened[0].config.revision
    tensors = {f"{layer.stem}.lora_A.weight": factors.a for layer, factors in made.items()}
    tensors |= {f"{layer.stem}.lora_B.weight": factors.b for layer, factors in made.items()}
    sources = tuple(_source(one, weight) for one, weight in zip(opened, weights, strict=True))
    size = sum(tensor.numel() for tensor in tensors.values())
    with explain_full_disk(output), atomic_dir(output) as draft:
        write_adapter(draft, base_folder, config, tensors)
        off_sum = _off_sum(open_adapter(draft, base_folder), opened, weights)
        if method == "cat" and not off_sum <= _EXACT:
            raise LorakitError(f"{output}: what was written lies {off_sum:.2g} off the weighted sum. It is not kept.")
        if tokenizer is not None:
            write_tokenizer(base_folder, tokenizer, draft)
        result = CombineResult(output, method, density, seed, sources, max(ranks.values()), len(made), size, off_sum)
        _describe(draft, result, str(config.base_model_name_or_path))
    return result


def _combined(
    opened: list[OpenAdapter],
    weights: Sequence[float],
    method: CombineMethod,
    density: float | None,
    seed: int | None,
    rank: int | None,
) -> dict[AdapterLayer, LowRankFactors]:
    """The factors of every layer that one of the adapters has."""
    made = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed or 0)
        for stem, layer in sorted({stem: layer for one in opened for stem, layer in one.layers.items()}.items()):
            having = [at for at, one in enumerate(opened) if stem in one.layers]
            parts = [opened[at].factors(stem) for at in having]
            _check_ranks(layer, parts, method, [opened[at].folder for at in having])
            made[layer] = method.function(parts, [weights[at] for at in having], density, rank)
    return made


def _off_sum(written: OpenAdapter, opened: list[OpenAdapter], weights: Sequence[float]) -> float:
    """How far an adapter, as PEFT reads it from its files, lies from the weighted sum of others: `off_sum`."""
    length, off = 0.0, 0.0
    for stem in written.layers:
        having = [at for at, one in enumerate(opened) if stem in one.layers]
        parts = [opened[at].factors(stem) for at in having]
        some_length, some_off = distance(written.factors(stem), parts, [weights[at] for at in having])
        length, off = length + some_length, off + some_off
    return math.sqrt(off / length) if length else math.sqrt(off)


def _source(one: OpenAdapter, weight: float) -> CombinedAdapter:
    digests = {name: sha256_of(one.folder / name) for name in FILES}
    return CombinedAdapter(str(one.folder), float(weight), one.rank, digests)


def _describe(draft: Path, result: CombineResult, base: str) -> None:
    facts = asdict(result) | {"folder": None}
    del facts["folder"]
    write_facts(draft / FACTS, {"format": 1, "made": now(), "versions": versions(), "base": base, **facts})
    rows = "\n".join(f"| {one.folder} | {one.weight:g} | {one.rank} |" for one in result.sources)
    settings = f"Density {result.density:g}" if result.density is not None else ""
    settings += f", seed {result.seed}" if result.seed is not None else ""
    card = _CARD.format(
        base=base,
        name=result.folder.name,
        version=versions().get("lorakit", ""),
        method=result.method,
        summary=METHODS[result.method].summary,
        sources=rows,
        settings=f"{settings}. " if settings else "",
        rank=result.rank,
        modules=result.modules,
        distance=result.off_sum,
    )
    (draft / "README.md").write_text(card, encoding="utf-8")


def _check_ranks(layer: AdapterLayer, parts: list[LowRankFactors], method: CombineMethod, folders: list[Path]) -> None:
    if method.equal_ranks and len({part.rank for part in parts}) > 1:
        ranks = " and ".join(f"{part.rank} ({folder})" for part, folder in zip(parts, folders, strict=True))
        able = " or ".join(name for name, entry in METHODS.items() if not entry.equal_ranks)
        raise UserError(
            f"--method: {layer.target} has the ranks {ranks}, which this method cannot combine: it goes through A and "
            f"B number by number. Take {able}, which take any ranks."
        )
