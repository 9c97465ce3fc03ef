"""The folder of a run. This is the only module that names its files."""

import json
import platform
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lorakit.errors import UserError
from lorakit.folders import alone, is_draft, remove_drafts, remove_folder, write_whole

_RECORDED = ("lorakit", "torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate", "tokenizers")


@dataclass(frozen=True)
class Run:
    """One training's folder."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.json"

    @property
    def log(self) -> Path:
        return self.folder / "log.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def model(self) -> Path:
        """The whole model of a full fine-tuning, which has no adapter."""
        return self.folder / "model"

    @property
    def merged(self) -> Path:
        return self.folder / "merged"

    @property
    def evaluations(self) -> Path:
        return self.folder / "eval"

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after `step` optimizer steps."""
        return self.checkpoints / f"step-{step:06d}"

    def complete_checkpoints(self) -> list[Path]:
        """Every checkpoint, oldest first. A folder with this name is complete: it is renamed into place."""
        folders = self.checkpoints.glob("step-*") if self.checkpoints.is_dir() else []
        return sorted(folder for folder in folders if folder.is_dir() and re.fullmatch(r"step-\d{6,}", folder.name))

    def holds_results(self) -> bool:
        """Whether a training has begun here. The manifest is its first file."""
        return self.manifest.exists()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While this process writes into the run's folder no other may.

        Raises:
            UserError: another one does.
        """
        with alone(self.folder, "training into"):
            yield

    def read_manifest(self) -> dict[str, Any]:
        """The manifest.

        Raises:
            UserError: there is none, or it is damaged.
        """
        try:
            manifest = json.loads(self.manifest.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"{self.folder}: this is no run's folder: it has no {self.manifest.name}.") from error
        except NotADirectoryError as error:
            raise UserError(f"{self.folder}: is a file. Give the folder of a run, such as runs/NAME.") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{self.manifest}: damaged: {error}.") from error
        base, data = (manifest.get(key) if isinstance(manifest, dict) else None for key in ("base", "data"))
        whole = isinstance(base, dict) and isinstance(base.get("sha256"), dict)
        if not (whole and isinstance(data, dict) and isinstance(data.get("files"), dict)):
            raise UserError(f"{self.manifest}: damaged: it does not say what the run was trained on.")
        return manifest

    def write_manifest(self, facts: dict[str, Any]) -> None:
        write_whole(self.manifest, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")

    def log_line(self, facts: dict[str, Any]) -> None:
        """Add one line to the log."""
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")

    def go_back_to(self, step: int) -> None:
        """Forget the log and the checkpoints after `step`: a resumed run makes them again. Such a checkpoint is
        damaged, else it would be the one resumed from."""
        for folder in self.complete_checkpoints():
            if folder > self.checkpoint(step):
                remove_folder(folder)
        if self.log.is_file():
            text = self.log.read_text(encoding="utf-8", errors="replace")
            lines = [line for line in text.splitlines() if _step_of(line) <= step]
            write_whole(self.log, "".join(line + "\n" for line in lines))

    def forget_evaluation(self, step: int) -> None:
        """Take the held-out loss after `step` out of the log: it is measured again."""
        if self.log.is_file():
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if not (_step_of(line) == step and "eval_loss" in json.loads(line))]
            write_whole(self.log, "".join(line + "\n" for line in kept))

    def prune_checkpoints(self, keep: int, best_step: int | None) -> None:
        """Delete all checkpoints but the newest `keep` and the best."""
        best = self.checkpoint(best_step) if best_step else None
        for folder in self.complete_checkpoints()[:-keep]:
            if folder != best:
                remove_folder(folder)

    def clear(self) -> None:
        """Delete the run's results. What else lies in the folder is the user's, and stays."""
        for folder in (self.checkpoints, self.adapter, self.model, self.merged, self.evaluations):
            if folder.is_dir():
                remove_folder(folder)
        for file in (self.log, self.recipe, self.manifest):
            file.unlink(missing_ok=True)


def open_run(folder: Path, resume: bool, overwrite: bool) -> Run:
    """The run of `folder`, which is new, or is to be resumed or overwritten. Nothing in it is deleted here.

    Raises:
        UserError: the folder holds another run's results, is no run's folder at all, or cannot be written.
    """
    run = Run(folder)
    try:
        _refuse_folder(run, resume, overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        with run.alone():
            remove_drafts(folder)
            remove_drafts(run.checkpoints)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written: {error.strerror or error}. Choose another with --output."
        ) from error
    return run


def _refuse_folder(run: Run, resume: bool, overwrite: bool) -> None:
    folder = run.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, not a folder. Choose another with --output.")
    outer = next((parent for parent in folder.absolute().parents if Run(parent).holds_results()), None)
    if outer:
        raise UserError(f"{folder}: lies inside the run {outer}. Choose another with --output.")
    if run.holds_results() and not (resume or overwrite):
        raise UserError(
            f"{folder}: holds another run's results. Continue it with --resume, replace it with --overwrite, or choose "
            "another folder with --output."
        )
    if not run.holds_results() and folder.is_dir() and any(not is_draft(path) for path in folder.iterdir()):
        raise UserError(f"{folder}: is not empty and no run's folder. Choose another with --output.")


def versions() -> dict[str, str]:
    """The versions of the packages that decide what a run computes."""
    found = {"python": platform.python_version()}
    for name in _RECORDED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _step_of(line: str) -> int:
    """The step of a log line; a line that a crash cut short counts as never logged."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62


def read_log(run: Run) -> Iterable[dict[str, Any]]:
    """The lines of a run's log."""
    if run.log.is_file():
        for line in run.log.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)
