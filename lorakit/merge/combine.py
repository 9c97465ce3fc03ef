"""Adapters of several runs in one: combined without the base's weights, scored on each run's held-out rows, and merged
into the base on request."""

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit.atomic_io import sha256_of
from lorakit.data.batches import collate, split_batch
from lorakit.distributed.processes import gather, on_first, together
from lorakit.distributed.sharing import opened_by_first, own_share
from lorakit.errors import LorakitError, UserError
from lorakit.merge.inputs import input_of_run
from lorakit.merge.low_rank import METHODS
from lorakit.merge.run import MergeResult, merge
from lorakit.merge.writer import COMBINED, describe_output
from lorakit.model import low_rank
from lorakit.model.block_code import use_inference_code
from lorakit.model.companion_files import write_tokenizer
from lorakit.model.layerwise import adapter_without_base
from lorakit.model.load import load_model
from lorakit.model.loss import supervised_loss
from lorakit.model.low_rank import AdapterLayer, LowRankFactors, squared_norm, write_adapter
from lorakit.model.peft_adapter import SharedBase
from lorakit.model.tokenizer import pad_token_id
from lorakit.output_dir import claim_output, output_draft, refuse_overwriting_inputs
from lorakit.prepare import Prepared, reopen_run
from lorakit.progress import Progress
from lorakit.run_dir import MERGED, Run, now, versions

_LOSS_ROWS = 8
# float32 holds a sum of products to about this share.
_EXACT = 1e-5
_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Combination:
    """How adapters are combined. `weights`: one for each, which may be negative and need not add up to 1."""

    method: str
    weights: Sequence[float]
    density: float | None = None
    seed: int | None = None
    rank: int | None = None

    def check(self, count: int) -> None:
        """Refuse what is out of range for so many adapters, or would do nothing."""
        method = METHODS.get(self.method)
        if method is None:
            raise UserError(f"--method: there is no {self.method}. Write one of {', '.join(METHODS)}.")
        if count < 2:
            raise UserError(f"--method: {self.method} combines two adapters or more; {count} was given.")
        if len(self.weights) != count:
            raise UserError(f"--weights: {len(self.weights)} for {count} adapters. Write one for each, as 0.5,0.5.")
        if odd := [weight for weight in self.weights if not math.isfinite(weight) or weight == 0]:
            raise UserError(f"--weights: {odd[0]:g} is not a weight. Leave the adapter out, or write another number.")
        for option in ("density", "seed", "rank"):
            if getattr(self, option) is not None and option not in method.options:
                able = ", ".join(name for name, other in METHODS.items() if option in other.options)
                raise UserError(f"--{option}: {self.method} does not use it. Leave it out, or take one of {able}.")
        if "density" in method.options and not (self.density and 0 < self.density <= 1):
            given = "nothing" if self.density is None else f"{self.density:g}"
            raise UserError(
                f"--density: {self.method} keeps a share of each adapter's numbers: expected more than 0 and at most "
                f"1, got {given}. Write --density 0.5."
            )


@dataclass(frozen=True)
class _OpenAdapter:
    folder: Path
    config: Any
    factors: dict[AdapterLayer, LowRankFactors]
    rank: int


def combine_runs(
    runs: Sequence[Run],
    how: Combination,
    output: Path,
    progress: Progress,
    *,
    overwrite: bool = False,
    into_base: dict[str, Any] | None = None,
    base: str | None = None,
) -> tuple[dict[str, Any], MergeResult | None]:
    """Combine the adapters of runs on one base, into an adapter or, with the options of `merge`, into a merged model.
    Returns what --json says, and the merged model. `base`: where that base lies now."""
    how.check(len(runs))
    check_same_base(runs, progress)
    with ExitStack() as stack:
        for run in runs:
            stack.enter_context(run.shared())
        document = COMBINED if into_base is None else MERGED
        stack.enter_context(opened_by_first(lambda: claim_output(output, overwrite, document)))
        opened = [reopen_run(run.folder, progress, base) for run in runs]
        folders = [folder for run, prepared in opened for folder in (run.folder, prepared.base.source)]
        refuse_overwriting_inputs(output, *folders)
        name = output.absolute().name
        if into_base is None:
            draft = stack.enter_context(opened_by_first(lambda: output_draft(output)))
        else:
            draft = stack.enter_context(opened_by_first(lambda: _temporary_folder(name)))
        first, prepared = opened[0]
        adapters = [run.adapter for run, _ in opened]
        combined = on_first(lambda: combine(adapters, how, prepared.base.folder, draft, name, prepared.tokenizer))
        scores, without = score_sources(opened, draft, progress)
        merged = None
        if into_base is not None:
            merged = merge(input_of_run(first, prepared, progress, adapter=draft), output, progress, **into_base)
    facts = {"combined": {"folder": str(output), **combined}, "scores": scores, "without_held_out_rows": without}
    return facts, merged


@contextmanager
def _temporary_folder(name: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lorakit-combined.") as parent:
        folder = Path(parent) / name
        folder.mkdir()
        yield folder


def check_same_base(runs: Sequence[Run], progress: Progress) -> None:
    """Refuse runs that have no adapter or other bases, and warn of what else differs between them."""
    manifests = [run.read_manifest() for run in runs]
    for run in runs:
        if not (run.adapter / "adapter_config.json").is_file():
            raise UserError(f"{run.folder}: has no adapter to combine. Give runs that trained one.")
    first, name = manifests[0], runs[0].folder
    for run, manifest in zip(runs[1:], manifests[1:], strict=True):
        weights, expected = (
            {file: sha for file, sha in one["base"]["sha256"].items() if file.endswith(".safetensors")}
            for one in (manifest, first)
        )
        if weights != expected:
            raise UserError(
                f"{run.folder}: was trained on other base weights ({manifest['base'].get('name')}) than "
                f"{name} ({first['base'].get('name')}). Adapters of different bases cannot be combined."
            )
        quantizations = (manifest["base"].get("quantization"), first["base"].get("quantization"))
        tokenizers = (str(one.get("tokenizer_sha256"))[:12] for one in (manifest, first))
        variables = (one.get("template_variables") or {} for one in (manifest, first))
        for what, (ours, other), consequence in (
            ("on the base in", quantizations, "each adapter also makes up for what its own quantization lost"),
            ("with the tokenizer and chat template", tokenizers, f"the combined adapter gets those of {name}"),
            ("with model.template_variables", variables, "use the combined adapter with one of these"),
        ):
            if ours != other:
                progress.warn(f"{run.folder} was trained {what} {ours}, {name} {what} {other}: {consequence}")


def combine(
    adapters: Sequence[Path], how: Combination, base_folder: Path, draft: Path, name: str, tokenizer: Any = None
) -> dict[str, Any]:
    """Combine adapters of one base, folders in PEFT's format, into a new one in the folder `draft`, called `name`, with
    `tokenizer` beside it. Of `base_folder` the configuration is read and no weight. Returns what `combine.json` says
    (docs/merging.md): `off_sum` is how far the change is from the weighted sum of the adapters' changes, over that
    sum's length (Frobenius norms over all layers)."""
    opened = [open_adapter(folder, base_folder) for folder in adapters]
    seed = (how.seed or 0) if "seed" in METHODS[how.method].options else None
    combined = _combine_layers(opened, how, seed or 0)
    base, revision = opened[0].config.base_model_name_or_path, opened[0].config.revision
    size = write_adapter(draft, combined, base_folder, base, revision)
    written, length, off = open_adapter(draft, base_folder), 0.0, 0.0  # as PEFT reads it from its files
    for layer, change in written.factors.items():
        terms = list(zip(*_parts(layer, opened, how.weights), strict=True))
        length, off = length + squared_norm(terms), off + squared_norm([*terms, (change, -1.0)])
    off_sum = math.sqrt(off / length) if length else math.sqrt(off)
    if how.method == "cat" and not off_sum <= _EXACT:
        raise LorakitError(f"{name}: the written adapter is {off_sum:.2g} off the weighted sum. It was not kept.")
    if tokenizer is not None:
        write_tokenizer(base_folder, tokenizer, draft)
    facts: dict[str, Any] = {"method": how.method, "density": how.density, "seed": seed, "sources": []}
    for one, weight in zip(opened, how.weights, strict=True):
        digests = {file: sha256_of(one.folder / file) for file in _FILES}
        source = {"folder": str(one.folder), "weight": float(weight), "rank": one.rank, "sha256": digests}
        facts["sources"].append(source)
    facts |= {"rank": written.rank, "modules": len(combined), "parameters": size, "off_sum": off_sum}
    _describe(draft, name, facts, str(base))
    return facts


def _combine_layers(opened: list[_OpenAdapter], how: Combination, seed: int) -> dict[AdapterLayer, LowRankFactors]:
    method, combined = METHODS[how.method], {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for layer in sorted({layer for one in opened for layer in one.factors}, key=lambda layer: layer.path):
            parts, weights = _parts(layer, opened, how.weights)
            if method.equal_ranks and len({part.rank for part in parts}) > 1:
                folders = [one.folder for one in opened if layer in one.factors]
                ranks = " and ".join(f"{part.rank} ({folder})" for part, folder in zip(parts, folders, strict=True))
                able = " or ".join(name for name, entry in METHODS.items() if not entry.equal_ranks)
                raise UserError(
                    f"--method: {layer.target} has the ranks {ranks}, which this method cannot combine: it goes "
                    f"through A and B number by number. Take {able}, which take any ranks."
                )
            combined[layer] = method.function(parts, weights, how.density, how.rank)
    return combined


def _parts(
    layer: AdapterLayer, opened: list[_OpenAdapter], weights: Sequence[float]
) -> tuple[list[LowRankFactors], list[float]]:
    pairs = [(one.factors[layer], weight) for one, weight in zip(opened, weights, strict=True) if layer in one.factors]
    return [factors for factors, _ in pairs], [weight for _, weight in pairs]


def _describe(draft: Path, name: str, facts: dict[str, Any], base: str) -> None:
    density, seed = facts["density"], facts["seed"]
    settings = "" if density is None else f"Density {density:g}{'' if seed is None else f', seed {seed}'}. "
    rows = [f"| {one['folder']} | {one['weight']:g} | {one['rank']} |" for one in facts["sources"]]
    paragraphs = [
        f"Adapters of `{base}`, combined by PEFT's method `{facts['method']}` (lorakit {versions().get('lorakit')}).",
        "\n".join(["| adapter | weight | rank |", "|---|---|---|", *rows]),
        f"{settings}The combined adapter has rank {facts['rank']} on {facts['modules']} weights. Its "
        f"distance from the weighted sum of the adapters' changes is {facts['off_sum']:.2g} of that sum's length.",
    ]
    facts = {"format": 1, "made": now(), "versions": versions(), "base": base, **facts}
    describe_output(draft, COMBINED, facts, name, base, "combined", *paragraphs)


def open_adapter(folder: Path, base_folder: Path) -> _OpenAdapter:
    """Read an adapter; one is refused that is damaged, or has parts that no method combines."""
    model, replaced = adapter_without_base(base_folder, folder)
    tensors = low_rank.adapter_tensors(model)
    others = [name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))] + replaced
    if others:
        raise UserError(
            f"{folder}: holds {others[0]}, which would be lost: only A and B of LoRA on linear layers are combined. "
            "Merge it into the base on its own: lorakit merge RUN."
        )
    broken = next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None)
    if broken:
        raise UserError(f"{folder}: holds numbers that are not finite, the first in {broken}. It is not combined.")
    factors = low_rank.adapter_factors(model)
    rank = max(of_layer.rank for of_layer in factors.values())
    return _OpenAdapter(folder, model.peft_config["default"], factors, rank)


def score_sources(
    runs: Sequence[tuple[Run, Prepared]], combined: Path, progress: Progress
) -> tuple[list[dict[str, Any]], list[str]]:
    """The scores of every run that has held-out rows, and the names of those that have none.

    A score is the mean cross-entropy over the trained tokens of one run's held-out rows, in nats, of the `base`, with
    its `own` adapter, and `combined` (the folder of an adapter of the same base). `kept` is the share of the fall from
    `base` to `own` that is left; None where there was none. The base is loaded once, as the first run's training loaded
    it, and one adapter at a time is put on it. The processes share each run's rows.
    """
    sources: list[tuple[Run, list[dict[str, Any]]]] = []
    without = []
    for run, prepared in runs:
        held_out, limit = prepared.rows.read_or_warn("held_out"), prepared.recipe.evaluate.rows
        if held_out is None:
            without.append(str(run.folder))
        else:
            rows = held_out.rows if limit == "all" else held_out.rows.select(range(min(limit, len(held_out.rows))))
            sources.append((run, sorted(rows, key=lambda row: len(row["input_ids"]))))
    scores: list[dict[str, Any]] = [{"run": str(run.folder), "rows": len(rows)} for run, rows in sources]
    if not sources:
        return [], without
    first, everything = runs[0][1], range(len(sources))
    shared = SharedBase(lambda: load_model(first.base, first.model, first.machine.device))
    own = [("own", run.adapter, [at]) for at, (run, _) in enumerate(sources)]
    pad = pad_token_id(first.tokenizer)
    for name, adapter, numbers in [("base", None, everything), *own, ("combined", combined, everything)]:
        sets = [(f"{sources[at][0].folder.name}: {name}", sources[at][1]) for at in numbers]
        for at, loss in zip(numbers, _mean_losses(shared, adapter, sets, pad, progress), strict=True):
            scores[at][name] = loss
    for score in scores:
        score["kept"] = share_of_gain(score["base"], score["own"], score["combined"])
    return scores, without


def share_of_gain(base: float, own: float, combined: float) -> float | None:
    """The share of the fall of a loss from `base` to `own` that `combined` keeps; None where it did not fall."""
    return (base - combined) / (base - own) if own < base else None


def _mean_losses(
    shared: SharedBase, adapter: Path | None, sets: list[tuple[str, list[dict[str, Any]]]], pad: int, progress: Progress
) -> list[float]:
    """The mean loss over each set of rows, with its label, of the base with an adapter. Processes on machines that do
    not see the adapter leave the rows to the others."""
    sees = adapter is None or adapter.is_dir()
    shares = [[rows[at] for at in own_share([len(row["input_ids"]) for row in rows], sees)] for _, rows in sets]

    def sum_losses() -> list[tuple[float, int]]:
        if not any(shares):
            return [(0.0, 0)] * len(sets)
        model = shared.model_with(adapter)
        with use_inference_code(model):
            return [_summed_loss(model, rows, pad, sets[at][0], progress) for at, rows in enumerate(shares)]

    of_processes = gather(together(sum_losses))
    totals = [[sum(column) for column in zip(*of_set, strict=True)] for of_set in zip(*of_processes, strict=True)]
    return [total / tokens for total, tokens in totals]


def _summed_loss(model: Any, rows: list[dict[str, Any]], pad: int, label: str, progress: Progress) -> tuple[float, int]:
    total, tokens = 0.0, 0
    with torch.inference_mode(), progress.bar(label, total=len(rows)) as bar:
        for batch in split_batch(rows, _LOSS_ROWS):
            tensors = {key: value.to(model.device) for key, value in collate(batch, pad).items()}
            summed, count = supervised_loss(model, **tensors)
            total, tokens = total + float(summed), tokens + count
            bar.advance(len(batch))
    if not math.isfinite(total):
        raise LorakitError(f"{label}: the loss on the held-out rows is {total}.")
    return total, tokens
