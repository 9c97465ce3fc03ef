"""Merging: an adapter added to its base, and proved before it is put in place."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorakit.atomic_io import atomic_dir, exclusive_lock, read_own_json, refuse_other_files, remove_drafts
from lorakit.errors import UserError
from lorakit.merge.apply_delta import adapter_deltas
from lorakit.merge.card import MergeResult, describe
from lorakit.merge.inputs import MergeInput, Onto, adapter_model, unquantized_base
from lorakit.merge.verify import coarsest_dtype, prove
from lorakit.merge.writer import explain_full_disk, weights_to_write, write_weights
from lorakit.model.adapters.plain_lora import is_no_op
from lorakit.model.companion_files import write_companion_files
from lorakit.model.load import DTYPES, stored_dtype
from lorakit.model.quantization_config import stored_quantization
from lorakit.model.quantized_weights import stored_precision, training_precision
from lorakit.model.state_dict import open_weights
from lorakit.progress import Progress
from lorakit.run_dir import MERGED


def check_output(output: Path, overwrite: bool, facts: str = MERGED) -> None:
    """Refuse a place where a result cannot go; only an earlier result, which holds the file `facts`, is replaced."""
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
def claim_output(output: Path, overwrite: bool, facts: str = MERGED) -> Iterator[None]:
    """Until the end no other process puts a result into this place, which `check_output` does not refuse."""
    check_output(output, overwrite, facts)
    with exclusive_lock(output):
        check_output(output, overwrite, facts)  # another process may have put one there between the two
        yield


def refuse_overwriting_inputs(output: Path, *inputs: Path) -> None:
    """Refuse to replace what a merge is made from: an earlier result may be its base, or hold its run."""
    for path in inputs:
        if path.resolve().is_relative_to(output.resolve()):
            raise UserError(f"--output would overwrite an input of the merge: {path} is in {output}. Choose another.")


def merge(
    given: MergeInput,
    output: Path,
    progress: Progress,
    onto: Onto = "trained",
    dtype: str | None = None,
    proved: bool = True,
) -> MergeResult:
    """Write a merged model to `output`, a claimed place, where it appears only when the proof holds.

    `trained` adds the adapter to the weights that it saw while it trained: rounded to the type of the training, and,
    of a quantized base, dequantized as its quantizer does. `original` adds it to the weights as they are in the base's
    files. All is added in float32 and rounded once, to the type in which each tensor is stored or to `dtype`.

    Raises:
        UserError: the adapter or the base are of a kind that cannot be merged.
        LorakitError: the disk is full, or the merged files do not predict what the adapter model predicts.
    """
    refuse_overwriting_inputs(output, given.base.folder, given.folder, given.adapter, *given.files)
    if dtype is None and stored_quantization(given.base.folder):
        dtype = stored_dtype(given.base)
    one_type = DTYPES[dtype] if dtype else None
    with explain_full_disk(output):
        remove_drafts(output.absolute().parent, output.name)
        with unquantized_base(given, onto, output, progress) as (folder, settings), atomic_dir(output) as draft:
            weights = open_weights(folder)
            trained = training_precision(weights, settings)
            precision = trained if onto == "trained" else stored_precision(settings)
            if is_no_op(given.adapter):
                progress.warn(f"{given.adapter}: changes nothing: one half of each of its changes is zero")
            deltas = adapter_deltas(adapter_model(given, weights, trained))
            target = weights_to_write(weights, deltas)
            untied = target is not weights
            written = coarsest_dtype(write_weights(target, precision, deltas, one_type, draft, progress))
            write_companion_files(given.base.folder, given.tokenizer, given.stop_ids, one_type, draft, untied)
            proof, drift, rows_of = None, None, ""
            if proved:
                differs = onto == "original" and trained.differs(weights)
                precisions = [precision, trained] if differs else [precision]
                proof, drift, rows_of = prove(given, weights, draft, written, precisions, progress, output)
            merged = MergeResult(output, onto, given.quantization, written, rows_of, proof, drift, untied)
            describe(draft, given, merged)
    return merged
