"""Merging: an adapter added to its base, and proved before it is put in place; and the proof of an existing merge."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lorakit.atomic_io import atomic_dir, exclusive_lock, read_own_json, refuse_other_files, remove_drafts
from lorakit.errors import LorakitError, UserError
from lorakit.merge.apply_delta import Deltas, adapter_deltas
from lorakit.merge.card import MergeResult, describe
from lorakit.merge.inputs import MergeInput, Onto, adapter_model, unquantized_base
from lorakit.merge.proof import TOLERANCES, Proof, compare, compute_reference
from lorakit.merge.writer import explain_full_disk, weights_to_write, with_tied_names, write_weights
from lorakit.model.adapters.plain_lora import is_no_op
from lorakit.model.companion_files import write_companion_files
from lorakit.model.config_values import read_json, untied_config
from lorakit.model.layerwise import layerwise_model
from lorakit.model.load import DTYPES, stored_dtype
from lorakit.model.quantization_config import parse_quantization, stored_quantization
from lorakit.model.safetensors_io import TYPES
from lorakit.model.state_dict import WeightPrecision, Weights, open_weights, stored_precision, training_precision
from lorakit.model.tokenizer import pad_token_id
from lorakit.progress import Progress
from lorakit.run_dir import MERGED

# Two machines may round the same sum to neighbours.
_NEIGHBOURS = 4


@contextmanager
def claim_output(output: Path, overwrite: bool, facts: str = MERGED) -> Iterator[None]:
    """Until the end no other process puts a result into this place. A place where none can go is refused; only an
    earlier result, which holds the file `facts`, is replaced."""
    check_output(output, overwrite, facts)
    with exclusive_lock(output):
        check_output(output, overwrite, facts)  # another process may have put one there between the two
        yield


def check_output(output: Path, overwrite: bool, facts: str = MERGED) -> None:
    """Refuse a place where a result cannot go."""
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

    `trained` adds the adapter to the weights that it saw while it trained: rounded to the type of the training, and, of
    a quantized base, dequantized as its quantizer does. `original` adds it to the weights as they are in the base's
    files. All is added in float32 and rounded once, to the type in which each tensor is stored or to `dtype`.
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
            config = read_json(given.base.folder / "config.json")
            config = untied_config(config) if untied else config
            write_companion_files(given.base.folder, given.tokenizer, given.stop_ids, config, draft, dtype)
            proof, drift, rows_of = None, None, ""
            if proved:
                differs = onto == "original" and trained.differs(weights)
                precisions = [precision, trained] if differs else [precision]
                proof, drift, rows_of = _prove(given, weights, draft, written, precisions, progress, output)
            merged = MergeResult(output, onto, given.quantization, written, rows_of, proof, drift, untied)
            describe(draft, given, merged)
    return merged


def _prove(
    given: MergeInput,
    weights: Weights,
    folder: Path,
    dtype: str,
    precisions: list[WeightPrecision],
    progress: Progress,
    output: Path | None = None,
) -> tuple[Proof, Proof | None, str]:
    """Compare a merged folder, the draft of `output` if there is one, with the adapter on its base: the proof, the
    drift from the adapter in training if that differs, and which rows judged. An error if the proof does not hold.

    `dtype`: the coarsest of the folder's weights. `precisions`: of the base that was merged into, and of that in
    training where it is another one.
    """
    pad, (rows, rows_of) = pad_token_id(given.tokenizer), given.read_rows()
    expected = [
        compute_reference(adapter_model(given, weights, precision), rows, pad, progress) for precision in precisions
    ]
    merged = open_weights(folder)
    model = layerwise_model(folder, given.attention, merged.read, merged.pieces)
    proof, drift = [*compare(expected, model, pad, TOLERANCES[dtype].tie, progress), None][:2]
    assert proof is not None
    failures = proof.failures(TOLERANCES[dtype])
    if failures:
        what = f"{output}: the merged model" if output else f"{folder}: this model"
        consequence = " It was not put in place." if output else ""
        raise LorakitError(f"{what} does not answer as the adapter does: {'; '.join(failures)}.{consequence}")
    return proof, drift, rows_of


def coarsest_dtype(types: list[str]) -> str:
    """The coarsest of safetensors' types, in torch's words."""
    words = {str(TYPES[word]).removeprefix("torch.") for word in types}
    return next((word for word in ("bfloat16", "float16", "float32") if word in words), "float32")


def verify(given: MergeInput, folder: Path, progress: Progress) -> MergeResult:
    """Prove again that a folder holds the merged model of an adapter; the folder is only read. A UserError if it holds
    no plain model of the base's architecture, a LorakitError if it predicts something else."""
    facts, config = read_json(folder / MERGED), read_json(folder / "config.json")
    onto: Onto = "original" if facts.get("onto") == "original" else "trained"
    if "model_type" not in config:
        raise UserError(f"{folder}: has no config.json that names a model_type, so it is not a model folder.")
    if config.get("auto_map"):
        raise UserError(f"{folder}: brings its own Python code (auto_map), which lorakit does not run.")
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder}: holds an adapter beside its weights, which would be applied twice.")
    if parse_quantization(config):
        raise UserError(f"{folder}: its weights are quantized, and lorakit merges into unquantized ones only.")
    with unquantized_base(given, onto, given.folder / "verify", progress) as (base, settings):
        weights, merged = open_weights(base), open_weights(folder)
        _check_shapes(weights, merged)
        used = [merged.tensors[name] for group in merged.groups for name in group.names]
        dtype = coarsest_dtype([tensor.dtype for tensor in used if tensor.is_plain])
        precisions = [training_precision(weights, settings)]
        if onto == "original" and precisions[0].differs(weights):
            precisions.insert(0, stored_precision(settings))
        proof, drift, rows_of = _prove(given, weights, folder, dtype, precisions, progress)
        deltas = adapter_deltas(adapter_model(given, weights, precisions[0]))
        target = weights_to_write(weights, deltas)
        _check_weights(target, merged, precisions[0], deltas)
    return MergeResult(folder, onto, given.quantization, dtype, rows_of, proof, drift, target is not weights)


def _check_weights(base: Weights, merged: Weights, precision: WeightPrecision, deltas: Deltas) -> None:
    """Compare each weight with what a merge writes: rows of the held-out set do not reach all of them."""
    deltas = with_tied_names(base, deltas)
    for group in base.groups:
        values = {path: precision(path, value) for path, value in base.read_group(group).items()}
        for path, value in values.items():
            if not value.is_floating_point():
                continue
            expected = deltas[path].apply(value, 0) if path in deltas else value
            stored = TYPES[merged.tensors[merged.group_of(path).names[0]].dtype]
            scale = expected.abs() + expected.square().mean().sqrt()
            difference = (merged.read(path) - expected).abs()
            if not bool((difference <= _NEIGHBOURS * torch.finfo(stored).eps * scale).all()):
                raise LorakitError(
                    f"{merged.folder}: {path} is not the base's weight with the adapter in it: this is not a merge of "
                    "this run, or it was changed since."
                )


def _check_shapes(base: Weights, merged: Weights) -> None:
    expected, shapes = (
        {path: tuple(value.shape) for path, value in weights.model.state_dict().items()} for weights in (base, merged)
    )
    path = min((path for path in {*expected, *shapes} if expected.get(path) != shapes.get(path)), default=None)
    if path:
        raise UserError(
            f"{merged.folder}: is a model of another shape than the run's base: {path} is "
            f"{shapes.get(path, 'missing')} there and {expected.get(path, 'missing')} in the base."
        )
