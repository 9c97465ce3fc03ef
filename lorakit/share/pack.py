"""Packing: a run -> one file that others unpack, evaluate, merge, chat with and export on machines of their own."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lorakit
from lorakit.atomic_io import exclusive_lock
from lorakit.errors import UserError
from lorakit.progress import Progress
from lorakit.recipe.fields import is_split
from lorakit.recipe.load import load
from lorakit.run_dir import Run
from lorakit.share.archive import suffix_of, write_archive
from lorakit.share.contents import PackOptions, collect_contents


@dataclass(frozen=True)
class Packed:
    """A packed run: the file, its index, and what the run's manifest says of its base model."""

    file: Path
    index: dict[str, Any]
    base: dict[str, Any]


def pack(run: Run, target: Path, options: PackOptions, progress: Progress) -> Packed:
    """Write a run into one file, `target`, whose ending tells how it is compressed; complete or not at all. The same
    run gives the same bytes. UserError where the file is there already, or the run has not ended."""
    suffix_of(target)
    _refuse_existing(target)
    with run.shared(), TemporaryDirectory(prefix="lorakit-pack.") as scratch:
        files = collect_contents(run, options, Path(scratch), progress)
        facts = {
            "lorakit": lorakit.__version__,
            "rows": {"eval": _has_held_out_rows(run, options), "train": options.training_rows},
        }
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(target):
            _refuse_existing(target)
            index = write_archive(target, run.folder.resolve().name.lstrip(".") or "run", facts, files)
        return Packed(target, index, run.read_manifest()["base"])


def _has_held_out_rows(run: Run, options: PackOptions) -> bool:
    """Whether the held-out rows are packed: those that are a share of the training files go with these."""
    if options.held_out_rows or not options.training_rows:
        return options.held_out_rows
    return is_split(load(run.recipe, ended=True).recipe.data.eval)


def _refuse_existing(target: Path) -> None:
    if target.is_symlink() or target.exists():
        raise UserError(f"--output {target}: already exists, and nothing is replaced. Write another name.")
