"""Merging: the adapter of a run folded into its base, and proved before it is called done."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lorakit.atomic_io import atomic_dir, read_own_json, refuse_other_files, remove_drafts
from lorakit.errors import UserError
from lorakit.locks import exclusive_lock
from lorakit.merge.apply_delta import adapter_deltas
from lorakit.merge.card import FACTS, describe
from lorakit.merge.case import (
    Case,
    MergeResult,
    Onto,
    check_proof,
    coarsest_dtype,
    plain_base,
    refuse_unmergeable,
    training_quantization,
)
from lorakit.merge.inputs import MergeInput, input_of_run
from lorakit.merge.untie import weights_to_write
from lorakit.merge.writer import explain_full_disk, write_weights
from lorakit.model.adapter_effect import is_no_op
from lorakit.model.companion_files import write_companion_files
from lorakit.model.load import DTYPES, stored_dtype
from lorakit.model.quantization_config import stored_quantization
from lorakit.model.quantized_weights import stored_precision, training_precision
from lorakit.model.resolve import Base
from lorakit.model.state_dict import open_weights
from lorakit.prepare import Prepared
from lorakit.progress import Progress
from lorakit.run_dir import Run


def check_output(output: Path, overwrite: bool, facts: str = FACTS) -> None:
    """Refuse a place where a result cannot go; nothing but an earlier one, which holds the file `facts`, is replaced.

    Raises:
        UserError: something is there, or the place cannot be written.
    """
    if output.is_symlink():
        raise UserError(f"{output}: is a link. Write --output with the folder that it means.")
    if output.exists():
        written = read_own_json(output / facts).get("files", [])
        if not overwrite:
            raise UserError(
                f"{output}: is there already. Replace it with --overwrite, or choose another with --output."
            )
        refuse_other_files(output, written)
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=f".lorakit-draft.{output.name}."):
            pass
    except OSError as error:
        raise UserError(
            f"{output}: cannot be written: {error.strerror or error}. Choose another with --output."
        ) from error


@contextmanager
def claim_output(output: Path, overwrite: bool, facts: str = FACTS) -> Iterator[None]:
    """A place that `check_output` does not refuse, in which until the end no other process puts a result.

    Raises:
        UserError: as `check_output`, or another process is writing there.
    """
    check_output(output, overwrite, facts)
    with exclusive_lock(output):
        check_output(output, overwrite, facts)  # another process may have put one there between the two
        yield


def merge(
    run: Run,
    prepared: Prepared,
    output: Path,
    progress: Progress,
    onto: Onto = "trained",
    dtype: str | None = None,
    proved: bool = True,
    adapter: Path | None = None,
) -> MergeResult:
    """Write the merged model of a run to `output`, a `claimed` place, where it appears only when the proof holds.

    `trained` adds the adapter to the weights that it saw while it trained: rounded to the type of the training, and,
    of a quantized base, dequantized as its quantizer does. `original` adds it to the weights as they lie in the base's
    files. All is added in float32 and rounded once, to the type in which each tensor is stored or to `dtype`.

    Args:
        adapter: another one than the run's own, on the same base.

    Raises:
        UserError: there is no adapter, or it or the base are of a kind that cannot be merged.
        LorakitError: the disk is full, or the merged files do not predict what the adapter model predicts.
    """
    return merge_input(input_of_run(run, prepared, progress, adapter=adapter), output, progress, onto, dtype, proved)


def merge_input(
    given: MergeInput,
    output: Path,
    progress: Progress,
    onto: Onto = "trained",
    dtype: str | None = None,
    proved: bool = True,
) -> MergeResult:
    """`merge` of an adapter that need not be a run's.

    Raises:
        UserError, LorakitError: as `merge`.
    """
    refuse_unmergeable(given.base, onto)
    refuse_overwriting_inputs(output, given.base.folder, given.folder, given.adapter, *given.files)
    with explain_full_disk(output):
        remove_drafts(output.absolute().parent, output.name)
        with plain_base(given, output, progress) as (folder, settings), atomic_dir(output) as draft:
            weights = open_weights(folder)
            trained, chosen = training_precision(weights, settings), stored_precision(settings)
            if onto == "trained":
                chosen = trained
            if is_no_op(given.adapter):
                progress.warn(f"{given.adapter}: changes nothing: one half of each of its changes is zero")
            case = Case(given, weights, progress)
            one_type = _given_type(given.base, dtype)
            folding = adapter_deltas(case.adapter_model(trained))
            target = weights_to_write(weights, folding)
            untied = target is not weights
            types = write_weights(target, chosen, folding, one_type, draft, progress)
            write_companion_files(given.base.folder, given.tokenizer, given.stop_ids, one_type, draft, untied)
            written = coarsest_dtype(types)
            holds = [chosen, trained] if onto == "original" and trained.differs(weights) else [chosen]
            proofs = case.proofs(draft, written, holds) if proved else []
            proof, drift = [*proofs, None, None][:2]
            if proof:
                check_proof(proof, written, f"{output}: the merged model", " It was not put in place.")
            rows_of = case.rows[1] if proof else ""
            merged = MergeResult(output, onto, training_quantization(given), written, rows_of, proof, drift, untied)
            describe(draft, given, merged)
    return merged


def refuse_overwriting_inputs(output: Path, *inputs: Path) -> None:
    """Refuse to replace what a merge is made from: an earlier result may be its base, or hold its run.

    Raises:
        UserError: one of the inputs lies in the folder that would be replaced.
    """
    for needed in inputs:
        if needed.resolve().is_relative_to(output.resolve()):
            raise UserError(
                f"--output would overwrite an input of the merge: {needed} lies in {output}. Choose another."
            )


def _given_type(base: Base, dtype: str | None) -> torch.dtype | None:
    """The one type that all weights are rounded to; None where each keeps its own."""
    if dtype is None and stored_quantization(base.folder):
        dtype = stored_dtype(base)
    return DTYPES[dtype] if dtype else None
