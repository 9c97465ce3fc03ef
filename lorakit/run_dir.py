"""The folder of a run. This is the only module that names its files."""

import json
import platform
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lorakit.atomic_io import (
    is_draft,
    read_own_json,
    refuse_other_files,
    refuse_pipes,
    remove_drafts,
    remove_folder,
    write_atomic,
)
from lorakit.errors import UserError
from lorakit.locks import LOCK, file_lock
from lorakit.recipe.did_you_mean import nearest_name

_RECORDED = ("lorakit", "torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate", "tokenizers")

MERGED = "merge.json"
"""The file by which a folder is known to hold a merged model."""
CLEARED = "cleared"
"""The status of a run whose results were deleted for another one's."""
_SCORES = re.compile(r"(tasks-)?\d{8}T\d{6}(-\d+)?\.jsonl?")


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
        """Whether a training has begun here. Its manifest is its first file; other programs have one of that name."""
        if not self.manifest.is_file():
            return False
        try:
            self.read_manifest()
        except UserError:
            return False
        return True

    def is_complete(self) -> bool:
        """Whether the training here has ended, with its result in place."""
        return self.holds_results() and self.read_manifest().get("status") == "complete"

    @contextmanager
    def exclusive_lock(self) -> Iterator[None]:
        """While this process writes into the run's folder no other may, nor read it as a run that has ended.

        Raises:
            UserError: another one does.
        """
        refusal = f"{self.folder}: another process is training into this folder, or reads it. Wait, or stop it."
        with file_lock(self.folder / LOCK, refusal):
            yield

    @contextmanager
    def shared(self) -> Iterator[None]:
        """While processes read the run, or add a merge or an evaluation to it, no training may begin in its folder.

        Raises:
            UserError: one goes on there.
        """
        if not self.folder.is_dir():
            yield
            return
        refusal = f"{self.folder}: another process is training into this folder. Wait, or stop it."
        with file_lock(self.folder / LOCK, refusal, shared=True):
            yield

    def read_manifest(self) -> dict[str, Any]:
        """The manifest.

        Raises:
            UserError: there is none, or it is damaged.
        """
        if self.folder.is_dir():
            refuse_pipes(self.folder)
        try:
            manifest = json.loads(self.manifest.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            if not self.folder.exists():
                raise missing_run(self.folder) from error
            raise UserError(
                f"{self.folder}: not a run folder: it has no {self.manifest.name}. Give the folder of a run, such as "
                "runs/NAME."
            ) from error
        except NotADirectoryError as error:
            raise UserError(f"{self.folder}: is a file. Give the folder of a run, such as runs/NAME.") from error
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{self.manifest}: damaged: {error}.") from error
        base, data = (manifest.get(key) if isinstance(manifest, dict) else None for key in ("base", "data"))
        whole = isinstance(base, dict) and isinstance(base.get("sha256"), dict)
        if not (whole and isinstance(data, dict) and isinstance(data.get("files"), dict)):
            raise UserError(f"{self.manifest}: damaged: it does not say what the run was trained on.")
        return manifest

    def write_manifest(self, facts: dict[str, Any]) -> None:
        write_atomic(self.manifest, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")

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
            write_atomic(self.log, "".join(line + "\n" for line in lines))

    def forget_evaluation(self, step: int) -> None:
        """Take the held-out loss after `step` out of the log: it is measured again."""
        if self.log.is_file():
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if not (_step_of(line) == step and "eval_loss" in json.loads(line))]
            write_atomic(self.log, "".join(line + "\n" for line in kept))

    def prune_checkpoints(self, keep: int, best_step: int | None) -> None:
        """Delete all checkpoints but the newest `keep` and the best."""
        best = self.checkpoint(best_step) if best_step else None
        for folder in self.complete_checkpoints()[:-keep]:
            if folder != best:
                remove_folder(folder)

    def results(self) -> list[Path]:
        """Every file and folder that a run writes, be it there or not."""
        folders = [self.checkpoints, self.adapter, self.model, self.merged, self.evaluations]
        return [*folders, self.log, self.recipe, self.manifest]

    def refuse_other_programs(self) -> None:
        """Refuse to clear a folder of a run's name that the run did not write, or that holds files it did not write.

        Raises:
            UserError: it names the first.
        """
        manifest = self.read_manifest()
        ended = manifest.get("status") == "complete"
        for folder, recorded, sign in (
            (self.adapter, "adapter_sha256", "adapter_config.json"),
            (self.model, "model_sha256", "config.json"),
        ):
            if folder.exists() and not (recorded in manifest if ended else (folder / sign).is_file()):
                raise UserError(f"{folder}: the run did not write it. Move it away, or choose another --output.")
            refuse_other_files(folder, manifest.get("files") if ended else None)
        if self.merged.exists():
            refuse_other_files(self.merged, read_own_json(self.merged / MERGED).get("files", []))

    def clear(self) -> None:
        """Delete what a run wrote, and nothing else that lies in the folder.

        The manifest stays, as that of a cleared run, until the next one takes its place: the folder is a run's, and no
        old result is taken for a new one, whenever the process ends.
        """
        if self.manifest.exists():
            self.write_manifest(self.read_manifest() | {"status": CLEARED})
        for folder in (*self.complete_checkpoints(), self.adapter, self.model, self.merged):
            if folder.is_dir():
                remove_folder(folder)
        scores = [path for path in self.evaluations.glob("*") if _SCORES.fullmatch(path.name)]
        for file in (*scores, self.log, self.recipe):
            file.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.evaluations):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def missing_run(folder: Path) -> UserError:
    """The error for a run that is not there, with the one that was probably meant: beside it, or in runs/."""
    near = None
    for around in (folder.parent, Path("runs")) if folder.parent == Path() else (folder.parent,):
        if near is None and around.is_dir():
            found = nearest_name(folder.name, [path.name for path in around.iterdir() if Run(path).holds_results()])
            near = around / found if found else None
    remedy = f"Did you mean {near}?" if near else "Give the folder of a run, such as runs/NAME."
    return UserError(f"{folder}: there is no such run. {remedy}")


@contextmanager
def open_run(folder: Path, resume: bool, overwrite: bool) -> Iterator[Run]:
    """The run of `folder`, which is new, or is to be resumed or overwritten; until the end nobody else writes there.

    Nothing in it is deleted here but what killed runs left.

    Raises:
        UserError: the folder holds another run's results, is not a run folder at all, is being written, or cannot be.
    """
    run = Run(folder)
    with ExitStack() as held:
        try:
            _refuse_folder(run, resume, overwrite)
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(run.exclusive_lock())
            _refuse_folder(run, resume, overwrite)  # another run may have ended between the two
            for place in (folder, run.checkpoints, run.evaluations):
                remove_drafts(place)
            if overwrite and run.holds_results():
                run.refuse_other_programs()
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be written: {error.strerror or error}. Choose another with --output."
            ) from error
        yield run


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
        why = f": its {run.manifest.name} is not a run's, or is damaged" if run.manifest.exists() else ""
        raise UserError(f"{folder}: is not empty and not a run folder{why}. Choose another with --output.")


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
