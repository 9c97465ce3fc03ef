"""Unpacking: a packed run -> a run folder, complete or absent. Whoever sent it is not trusted: no file is written that
the index does not have, and none appears before all of them are what the index says."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.atomic_io import atomic_dir, exclusive_lock
from lorakit.errors import UserError
from lorakit.run_dir import Run
from lorakit.share.archive import INDEX, index_text, open_archive, read_index, refuse_full_disk, write_files

_ENOUGH = "Write another folder with --output, or remove it first."


@dataclass(frozen=True)
class Unpacked:
    """A run that was unpacked: its folder, and the index of the archive."""

    run: Run
    index: dict[str, Any]

    @property
    def size(self) -> int:
        return sum(int(one["bytes"]) for one in self.index["files"].values())


def unpack(file: Path, output: Path | None) -> Unpacked:
    """Write the run of an archive into a new folder, `output` or one with the run's name; UserError where the folder
    is there already, or the archive is not to the byte what its index says."""
    with open_archive(file) as stream:
        try:
            top, index = read_index(stream)
            target = output or Path(top)
            _refuse_existing(target)
            target.absolute().parent.mkdir(parents=True, exist_ok=True)
            with exclusive_lock(target):
                _refuse_existing(target)
                refuse_full_disk(target.absolute().parent, index["files"])
                with atomic_dir(target) as draft:
                    write_files(stream, top, index["files"], draft)
                    (draft / INDEX).write_text(index_text(index), "utf-8")
                    _check_run(Run(draft), index["files"])
                    _refuse_existing(target)
        except UserError as error:
            raise UserError(f"{file}: {error} Nothing was unpacked.") from error
    return Unpacked(Run(target), index)


def _refuse_existing(target: Path) -> None:
    if target.is_symlink() or target.exists():
        raise UserError(f"{target}: already exists, and nothing is replaced. {_ENOUGH}")


def _check_run(run: Run, files: dict[str, dict[str, Any]]) -> None:
    """Refuse what is not a run that has ended, with the weights that its manifest names."""
    try:
        manifest = run.read_manifest()
    except UserError as error:
        raise UserError("its manifest.json is not that of a run.") from error
    if manifest.get("status") != "complete":
        raise UserError("its training has not ended.")
    model = manifest.get("model_sha256")
    recorded = {f"model/{name}": sha256 for name, sha256 in (model if isinstance(model, dict) else {}).items()}
    if "adapter_sha256" in manifest:
        recorded["adapter/adapter_model.safetensors"] = manifest["adapter_sha256"]
    for name, sha256 in recorded.items():
        if files.get(name, {}).get("sha256") != sha256:
            raise UserError(f"{name}: is not what this run trained: its sha256 is not the manifest's.")
