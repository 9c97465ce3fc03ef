"""Several runs' adapters in one: combined, scored on each run's held-out rows, and merged into the base on request."""

import math
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from lorakit.atomic_io import atomic_dir, files_in, remove_drafts
from lorakit.data.batches import collate, split_batch
from lorakit.errors import LorakitError, UserError
from lorakit.merge.card import COMBINED, MergeResult
from lorakit.merge.combine import check_options, combine
from lorakit.merge.inputs import input_of_run
from lorakit.merge.run import claim_output, merge, refuse_overwriting_inputs
from lorakit.merge.writer import explain_full_disk
from lorakit.model.fused_lora import fused_lora
from lorakit.model.load import load_model
from lorakit.model.loss import supervised_loss
from lorakit.model.peft_adapter import SharedBase
from lorakit.model.tokenizer import pad_token_id
from lorakit.prepare import Prepared, reopen_run
from lorakit.progress import Progress
from lorakit.run_dir import MERGED, Run

_LOSS_ROWS = 8


def combine_runs(
    runs: Sequence[Run],
    weights: Sequence[float],
    method: str,
    output: Path,
    progress: Progress,
    *,
    density: float | None = None,
    seed: int | None = None,
    rank: int | None = None,
    overwrite: bool = False,
    into_base: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], MergeResult | None]:
    """Combine the adapters of runs on one base, into an adapter or, with the options of `merge`, into a merged model.
    Returns what --json says, and the merged model."""
    check_options(len(runs), weights, method, density, seed, rank)
    check_same_base(runs, progress)
    with ExitStack() as stack:
        for run in runs:
            stack.enter_context(run.shared())
        stack.enter_context(claim_output(output, overwrite, COMBINED if into_base is None else MERGED))
        opened = [reopen_run(run.folder, progress) for run in runs]
        folders = [folder for run, prepared in opened for folder in (run.folder, prepared.base.folder)]
        refuse_overwriting_inputs(output, *folders)
        draft = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lorakit-combined.")))
        draft /= output.absolute().name  # the name on its card
        first, prepared = opened[0]
        combined = combine(
            [run.adapter for run, _ in opened],
            weights,
            method,
            prepared.base.folder,
            draft,
            density=density,
            seed=seed,
            rank=rank,
            tokenizer=prepared.tokenizer,
        )
        scores, without = score_sources(opened, draft, progress)
        merged = None
        if into_base is not None:
            given = input_of_run(first, prepared, progress, adapter=draft)
            merged = merge(given, output, progress, **into_base)
        else:
            with explain_full_disk(output):
                remove_drafts(output.absolute().parent, output.name)
                with atomic_dir(output) as folder:
                    for name in files_in(draft):
                        (folder / name).parent.mkdir(parents=True, exist_ok=True)
                        shutil.copyfile(draft / name, folder / name)
    facts = {"combined": {"folder": str(output), **combined}, "scores": scores, "without_held_out_rows": without}
    return facts, merged


def check_same_base(runs: Sequence[Run], progress: Progress) -> None:
    """Refuse runs that have no adapter or other bases, and warn of what else differs between them."""
    manifests = [run.read_manifest() for run in runs]
    for run in runs:
        if not (run.adapter / "adapter_config.json").is_file():
            raise UserError(f"{run.folder}: has no adapter to combine. Give runs that trained one.")
    first, name = manifests[0], runs[0].folder
    for run, manifest in zip(runs[1:], manifests[1:], strict=True):
        if _weight_digests(manifest) != _weight_digests(first):
            raise UserError(
                f"{run.folder}: was trained on other base weights ({manifest['base'].get('name')}) than "
                f"{name} ({first['base'].get('name')}). Adapters of different bases cannot be combined."
            )
        expected, quantization = (one["base"].get("quantization") for one in (first, manifest))
        if quantization != expected:
            progress.warn(
                f"{run.folder} was trained on the base in {quantization}, {name} in {expected}: each adapter also "
                "makes up for what its own quantization lost"
            )
        if manifest.get("tokenizer_sha256") != first.get("tokenizer_sha256"):
            progress.warn(
                f"{run.folder} was trained with another tokenizer or chat template than {name}, whose own the combined "
                "adapter gets"
            )
        expected, variables = (one.get("template_variables") or {} for one in (first, manifest))
        if variables != expected:
            progress.warn(
                f"{run.folder} was trained with model.template_variables {variables}, {name} with {expected}: use the "
                "combined adapter with one of these"
            )


def _weight_digests(manifest: dict[str, Any]) -> dict[str, str]:
    return {name: sha for name, sha in manifest["base"]["sha256"].items() if name.endswith(".safetensors")}


def score_sources(
    runs: Sequence[tuple[Run, Prepared]], combined: Path, progress: Progress
) -> tuple[list[dict[str, Any]], list[str]]:
    """The scores of every run that has held-out rows, and the names of those that have none.

    A score is the mean cross-entropy over the trained tokens of one run's held-out rows, in nats, of the `base`, with
    its `own` adapter, and `combined` (the folder of an adapter of the same base). The base is loaded once, as the first
    run's training loaded it, and one adapter at a time is put on it.
    """
    scored = [(run, prepared) for run, prepared in runs if prepared.rows.held_out_if_there is not None]
    without = [str(run.folder) for run, prepared in runs if prepared.rows.held_out_if_there is None]
    if not scored:
        return [], without
    first = runs[0][1]
    shared = SharedBase(lambda: load_model(first.base, first.model, first.machine.device))

    def losses(adapter: Path | None, scored: list[tuple[Run, Prepared]], label: str) -> list[float]:
        model = shared.model_with(adapter)
        with fused_lora(model):
            return [_loss(model, prepared, f"{run.folder.name}: {label}", progress) for run, prepared in scored]

    before = losses(None, scored, "base")
    own = [losses(run.adapter, [(run, prepared)], "its adapter")[0] for run, prepared in scored]
    after = losses(combined, scored, "combined")
    scores = []
    for (run, prepared), *three in zip(scored, before, own, after, strict=True):
        score = dict(zip(("base", "own", "combined"), three, strict=True))
        rows = len(_held_out_rows(prepared))
        scores.append({"run": str(run.folder), "rows": rows, **score, "kept": share_of_gain(*three)})
    return scores, without


def share_of_gain(base: float, own: float, combined: float) -> float | None:
    """The share of the fall of a loss from `base` to `own` that `combined` keeps; None where it did not fall."""
    return (base - combined) / (base - own) if own < base else None


def _held_out_rows(prepared: Prepared) -> list[dict[str, Any]]:
    """The rows that the recipe scores on."""
    assert prepared.held_out is not None
    rows, limit = prepared.held_out.rows, prepared.recipe.evaluate.rows
    return list(rows if limit == "all" else rows.select(range(min(int(limit), len(rows)))))


def _loss(model: Any, prepared: Prepared, label: str, progress: Progress) -> float:
    rows = sorted(_held_out_rows(prepared), key=lambda row: len(row["input_ids"]))
    total, tokens = 0.0, 0
    with torch.inference_mode(), progress.bar(label, total=len(rows)) as bar:
        for batch in split_batch(rows, _LOSS_ROWS):
            tensors = collate(batch, pad_token_id(prepared.tokenizer))
            summed, count = supervised_loss(model, **{key: value.to(model.device) for key, value in tensors.items()})
            total, tokens = total + float(summed), tokens + count
            bar.advance(len(batch))
    if not math.isfinite(total):
        raise LorakitError(f"{label}: the loss on the held-out rows is {total}.")
    return total / tokens
