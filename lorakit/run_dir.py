"""The folder of a run. This is the only module that names its files."""

import json
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lorakit.atomic_io import (
    LOCK,
    file_lock,
    is_draft,
    is_locked,
    read_json_object,
    read_own_json,
    refuse_other_files,
    refuse_pipes,
    remove_drafts,
    remove_folder,
    write_atomic,
)
from lorakit.errors import UserError
from lorakit.recipe.did_you_mean import nearest_name

_RECORDED = ("lorakit", "torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate", "tokenizers")

MERGED = "merge.json"  # by which a folder is known to hold a merged model
SWEEP, RANKING = "sweep.json", "ranking.json"  # of the folder of a sweep, whose runs lie below it
BASE = "base.json"  # beside an adapter: what it was trained on, for when it leaves its run
EXPORT = "export.json"  # by which a folder is known to hold an export
CLEARED = "cleared"  # the status of a run whose results were deleted for another one's
RUNNING, COMPLETE, INTERRUPTED, FAILED = "running", "complete", "interrupted", "failed"
_GIVE_RUN = "Give the folder of a run, such as runs/NAME."
_SAMPLED = ("where", "prompt", "reference")  # what samples.jsonl has of a held-out row
_SCORES = re.compile(r"(tasks-)?\d{8}T\d{6}(-\d+)?\.jsonl?")
_NAME = re.compile(r"""name: *['"]?([\w.-]+)['"]?""")
_EVALUATION = re.compile(r"(\d{8}T\d{6})(?:-(\d+))?\.json")


@dataclass(unsafe_hash=True)
class Run:
    """One training's folder."""

    folder: Path

    def __post_init__(self) -> None:
        self.recipe = self.folder / "recipe.yaml"
        self.manifest = self.folder / "manifest.json"
        self.log = self.folder / "log.jsonl"
        self.checkpoints = self.folder / "checkpoints"
        self.adapter = self.folder / "adapter"
        self.model = self.folder / "model"  # of a full fine-tuning, which has no adapter
        self.merged = self.folder / "merged"
        self.evaluations = self.folder / "eval"
        self.samples = self.folder / "samples.jsonl"  # training rows with what is trained; held-out ones of the log
        self.report = self.folder / "report.html"
        self.exports = self.folder / "export"
        self.rows = self.folder / "rows"  # that were written for this run alone, and rows of a packed one
        self.tracking = self.folder / "tracking"  # what trackers store on this machine, a folder each
        self.tracked = self.tracking / "runs.json"  # tracker -> by which it knows this run

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after `step` optimizer steps."""
        return self.checkpoints / f"step-{step:06d}"

    def complete_checkpoints(self) -> list[Path]:
        """Every checkpoint, oldest first. A folder with this name is complete: it is renamed into place."""
        folders = self.checkpoints.glob("step-*")
        return sorted(folder for folder in folders if folder.is_dir() and re.fullmatch(r"step-\d{6,}", folder.name))

    def holds_results(self) -> bool:
        """Whether a training has begun here. Its manifest is its first file; other programs have one of that name."""
        try:
            return self.manifest.is_file() and bool(self.read_manifest())
        except UserError:
            return False

    def is_vacant(self) -> bool:
        """Whether nothing is there but rows that were written for this run, and drafts."""
        folder = self.folder
        return not folder.is_dir() or all(is_draft(path) or path == self.rows for path in folder.iterdir())

    def is_complete(self) -> bool:
        """Whether the training here has ended, with its result in place."""
        return self.holds_results() and self.read_manifest().get("status") == COMPLETE

    def is_training(self) -> bool:
        """Whether a process is writing into the run's folder now."""
        return is_locked(self.folder / LOCK)

    def exclusive_lock(self) -> AbstractContextManager[None]:
        """While this process writes into the run's folder, no other may write into it or read it (UserError)."""
        refusal = f"{self.folder}: another process is training into this folder, or reads it. Wait, or stop it."
        return file_lock(self.folder / LOCK, refusal)

    def shared(self) -> AbstractContextManager[None]:
        """While processes read the run, or add a merge or an evaluation, no training may use its folder (UserError)."""
        refusal = f"{self.folder}: another process is training into this folder. Wait, or stop it."
        return file_lock(self.folder / LOCK, refusal, shared=True) if self.folder.is_dir() else nullcontext()

    def read_manifest(self) -> dict[str, Any]:
        """The manifest; UserError where there is none, or it is damaged."""
        if self.folder.is_dir():
            refuse_pipes(self.folder)
        try:
            manifest = json.loads(self.manifest.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            if not self.folder.exists():
                raise missing_run(self.folder) from error
            remedy = suggest_run(self.folder) or _GIVE_RUN
            raise UserError(f"{self.folder}: not a run folder: it has no {self.manifest.name}. {remedy}") from error
        except NotADirectoryError as error:
            raise UserError(f"{self.folder}: is a file. {_GIVE_RUN}") from error
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{self.manifest}: damaged: {error}.") from error
        for section, key in (("base", "sha256"), ("data", "files")):
            facts = manifest.get(section) if isinstance(manifest, dict) else None
            if not (isinstance(facts, dict) and isinstance(facts.get(key), dict)):
                raise UserError(f"{self.manifest}: damaged: it does not say what the run was trained on.")
        return manifest

    def write_manifest(self, facts: dict[str, Any]) -> None:
        write_atomic(self.manifest, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")

    def log_line(self, facts: dict[str, Any]) -> None:
        """Add one line to the log."""
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")

    def read_log(self, key: str) -> Iterator[dict[str, Any]]:
        """The lines of the log that have a key, newest first. One that a crash cut short counts as never logged."""
        if not self.log.is_file():
            return
        sign = f'"{key}"'
        for line in reversed(self.log.read_text(encoding="utf-8", errors="replace").split("\n")):
            if sign in line:
                with suppress(ValueError, RecursionError):
                    if isinstance(facts := json.loads(line), dict):
                        yield facts

    def read_sampled_rows(self) -> list[dict[str, str]]:
        """Prompt and reference of the held-out rows whose answers the log has, in the order of the answers."""
        if not self.samples.is_file():
            return []
        rows = []
        for line in self.samples.read_text(encoding="utf-8", errors="replace").split("\n"):
            with suppress(ValueError, RecursionError):
                facts = json.loads(line)
                if isinstance(facts, dict) and all(isinstance(facts.get(key), str) for key in _SAMPLED):
                    rows.append({key: facts[key] for key in ("prompt", "reference")})
        return rows

    def recipe_name(self) -> str | None:
        """The name that the recipe has, read from its line alone; None where there is none."""
        try:
            lines = self.recipe.read_text(encoding="utf-8").splitlines() if self.recipe.is_file() else []
        except (OSError, ValueError):
            return None
        names = (_NAME.fullmatch(line) for line in lines)
        return next((name[1] for name in names if name), None)

    def list_evaluations(self) -> list[Path]:
        """The documents of scores on rows, newest first; those of benchmarks are not among them."""
        names = ((path, _EVALUATION.fullmatch(path.name)) for path in self.evaluations.glob("*.json"))
        dated = [((name[1], int(name[2] or 1)), path) for path, name in names if name]
        return [path for _, path in sorted(dated, reverse=True)]

    def go_back_to(self, step: int) -> None:
        """Delete the checkpoints after `step`, which are damaged, and their lines of the log."""
        for folder in self.complete_checkpoints():
            if folder > self.checkpoint(step):
                remove_folder(folder)
        self._filter_log(lambda line: _step_of(line) <= step)

    def forget_evaluation(self, step: int) -> None:
        """Delete the held-out loss after `step` from the log, and the answers beside it: it is measured again."""
        self._filter_log(lambda line: _step_of(line) != step or not {"eval_loss", "samples"} & json.loads(line).keys())

    def _filter_log(self, keeps: Callable[[str], bool]) -> None:
        if self.log.is_file():
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            write_atomic(self.log, "".join(line + "\n" for line in lines if keeps(line)))

    def prune_checkpoints(self, keep: int, best_step: int | None) -> None:
        """Delete all checkpoints but the newest `keep` and the best."""
        best = self.checkpoint(best_step) if best_step else None
        for folder in self.complete_checkpoints()[:-keep]:
            if folder != best:
                remove_folder(folder)

    def results(self) -> list[Path]:
        """Every file and folder that a run may write."""
        folders = [self.checkpoints, self.adapter, self.model, self.merged, self.evaluations, self.exports]
        return [*folders, self.tracking, self.log, self.samples, self.report, self.recipe, self.manifest]

    def refuse_other_programs(self) -> None:
        """Refuse to clear results that have files that the run did not write."""
        manifest = self.read_manifest()
        ended = manifest.get("status") == COMPLETE
        for folder, recorded, sign in (
            (self.adapter, "adapter_sha256", "adapter_config.json"),
            (self.model, "model_sha256", "config.json"),
        ):
            if folder.exists() and not (recorded in manifest if ended else (folder / sign).is_file()):
                raise UserError(f"{folder}: the run did not write it. Move it away, or choose another --output.")
            refuse_other_files(folder, manifest.get("files") if ended else None)
        if self.merged.exists():
            refuse_other_files(self.merged, read_own_json(self.merged / MERGED).get("files", []))
        for folder in (folder for folder in self.exports.glob("*/") if not is_draft(folder)):
            refuse_other_files(folder, read_own_json(folder / EXPORT).get("files", []))

    def clear(self) -> None:
        """Delete what a run wrote, and nothing else. The manifest stays, as that of a cleared run, so that the folder
        is a run's whenever the process ends."""
        if self.manifest.exists():
            self.write_manifest(self.read_manifest() | {"status": CLEARED})
        parts = [folder for folder in self.exports.glob("*/") if not is_draft(folder)]
        tracked = read_json_object(self.tracked) or {}
        parts += [folder for folder in self.tracking.glob("*/") if folder.name in tracked]
        for folder in (*self.complete_checkpoints(), self.adapter, self.model, self.merged, *parts):
            if folder.is_dir():
                remove_folder(folder)
        scores = [path for path in self.evaluations.glob("*") if _SCORES.fullmatch(path.name)]
        for file in (*scores, self.log, self.samples, self.report, self.tracked, self.recipe):
            file.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.evaluations, self.exports, self.tracking):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def is_scores(name: str) -> bool:
    """Whether a file of eval/ has a name by which lorakit stores scores or answers."""
    return _SCORES.fullmatch(name) is not None


def suggest_run(folder: Path) -> str | None:
    """ "Did you mean", where one of the two folders above a folder is a run, or one run alone lies in it."""
    above = [parent for parent in (folder.parent, folder.parent.parent) if Run(parent).holds_results()]
    below = [path for path in sorted(folder.glob("*")) if Run(path).holds_results()]
    if above or len(below) == 1:
        return f"Did you mean {(above or below)[0]}?"
    return None


def missing_run(folder: Path) -> UserError:
    """The error for a run that does not exist, with the one that was probably meant: beside it, or in runs/."""
    for parent in (folder.parent, Path("runs")) if folder.parent == Path() else (folder.parent,):
        names = [path.name for path in parent.glob("*") if Run(path).holds_results()]
        if near := nearest_name(folder.name, names):
            return UserError(f"{folder}: there is no such run. Did you mean {parent / near}?")
    return UserError(f"{folder}: there is no such run. {_GIVE_RUN}")


@contextmanager
def open_run(folder: Path, resume: bool, overwrite: bool) -> Iterator[Run]:
    """The run of `folder`, which is new, or is to be resumed or overwritten; until the end nobody else writes there. A
    `UserError` where it holds another run's results, is not a run folder, is being written, or cannot be written."""
    run = Run(folder)
    with ExitStack() as stack:
        try:
            _refuse_folder(run, resume, overwrite)
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(run.exclusive_lock())
            _refuse_folder(run, resume, overwrite)  # another run may have ended between the two
            for place in (folder, run.checkpoints, run.evaluations, run.exports, run.tracking):
                remove_drafts(place)
            if overwrite and run.holds_results():
                run.refuse_other_programs()
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{folder}: cannot be written: {reason}. Choose another with --output.") from error
        yield run


def _refuse_folder(run: Run, resume: bool, overwrite: bool) -> None:
    folder = run.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, not a folder. Choose another with --output.")
    outer = next((parent for parent in folder.absolute().parents if Run(parent).holds_results()), None)
    if outer:
        raise UserError(f"{folder}: lies inside the run {outer}. Choose another with --output.")
    if run.holds_results():
        if not (resume or overwrite):
            raise UserError(
                f"{folder}: holds another run's results. Continue it with --resume, replace it with --overwrite, or "
                "choose another folder with --output."
            )
    elif not run.is_vacant():
        why = f": its {run.manifest.name} is not a run's, or is damaged" if run.manifest.exists() else ""
        raise UserError(f"{folder}: is not empty and not a run folder{why}. Choose another with --output.")


def versions() -> dict[str, str]:
    """The versions of the packages that decide what a run computes."""
    installed = {"python": platform.python_version()}
    for name in _RECORDED:
        with suppress(PackageNotFoundError):
            installed[name] = version(name)
    return installed


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _step_of(line: str) -> int:
    """The step of a log line; a line that a crash cut short counts as never logged."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62
