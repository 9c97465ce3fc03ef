"""The folder of a result, such as a merge or an export: claimed first, then complete or absent."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lorakit.atomic_io import atomic_dir, exclusive_lock, read_own_json, refuse_other_files, remove_drafts
from lorakit.errors import LorakitError, UserError, explain_error
from lorakit.run_dir import MERGED


@contextmanager
def claim_output(output: Path, overwrite: bool, facts: str = MERGED) -> Iterator[None]:
    """Until the end no other process puts a result into this place. A place where none can go is refused; only an
    earlier result, which holds the file `facts`, is replaced."""
    _check_output(output, overwrite, facts)
    with ExitStack() as stack:
        try:
            output.absolute().parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(exclusive_lock(output))
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{output}: cannot be written: {reason}. Choose another with --output.") from error
        _check_output(output, overwrite, facts)  # another process may have put one there between the two
        yield


def _check_output(output: Path, overwrite: bool, facts: str) -> None:
    if output.is_symlink():
        raise UserError(f"{output}: is a link. Write --output with the folder that it means.")
    if output.exists():
        written = read_own_json(output / facts).get("files", [])
        if not overwrite:
            raise UserError(f"{output}: already exists. Replace it with --overwrite, or choose another with --output.")
        refuse_other_files(output, written)


def refuse_overwriting_inputs(output: Path, *inputs: Path) -> None:
    """Refuse to replace what a result is made from: an earlier one may be its base, or hold its run."""
    for path in inputs:
        if path.resolve().is_relative_to(output.resolve()):
            raise UserError(f"--output would overwrite an input: {path} is in {output}. Choose another.")


@contextmanager
def output_draft(output: Path) -> Iterator[Path]:
    """A folder that becomes `output`, a claimed place, at the end, and of which nothing stays where anything fails. A
    refusal of the system, as of a full disk, says so."""
    try:
        remove_drafts(output.absolute().parent, output.name)
        with atomic_dir(output) as draft:
            yield draft
    except LorakitError:
        raise
    except Exception as error:
        if (explanation := explain_error(error)) is None:
            raise
        message = f"{output}: was not written, and nothing of it was kept: {explanation}"
        raise type(explanation)(message) from error
