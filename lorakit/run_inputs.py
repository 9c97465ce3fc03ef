"""What a run that has ended was made from, wherever it lies now: its base model, its rows, its chat template. Each is
known by its content: what lies at a recorded place and is another thing is not taken for it."""

import os
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lorakit.atomic_io import read_json_object, sha256_of
from lorakit.data.chat_template import ChatTemplate
from lorakit.data.dataset import Examples
from lorakit.data.examples import examples_of, file_sha256s, held_out_of
from lorakit.data.readers import files_in
from lorakit.errors import UserError
from lorakit.model.resolve import Base, resolve_base
from lorakit.progress import Progress, Silent
from lorakit.recipe.adapter_kind import trains_all
from lorakit.recipe.data_files import is_pattern, pattern_start
from lorakit.recipe.fields import is_split
from lorakit.recipe.paths import is_path, path_from, relative_path
from lorakit.recipe.problem import show_path
from lorakit.recipe.schema import Data, Recipe, Source
from lorakit.run_dir import BASE, Run, versions

OUTSIDE = "../"
"""How a path begins in the manifest of a packed run that leads out of the run's folder: its files were not packed."""
_HUB_COMMIT = re.compile(r"hub, commit ([0-9a-f]{40})")
_LOST = {
    "train": "nothing is compared with the rows of the training, which cannot be read",
    "held_out": "nothing is scored on held-out rows that cannot be read",
}


class MissingRows(UserError):
    """Rows of a run that are neither where it says nor at another place that it knows of."""


def changed_weights(base: Base, recorded: Mapping[str, str]) -> list[str]:
    """The files of a base's weights, and its configuration, that are not those of these sha256s."""
    current = base.sha256(".safetensors", ".json")
    names = [name for name in sorted({*recorded, *current}) if name.endswith(".safetensors") or name == "config.json"]
    return [name for name in names if recorded.get(name) != current.get(name)]


def locate_base(
    recipe: Recipe, run: Run, manifest: Mapping[str, Any], given: str | None, option: str = "--base"
) -> tuple[str, str] | None:
    """Where the base of a run is now, and the revision: `given` (by the `option`), else the first of the places in the
    recipe and the manifest that has the same weights, else what is there. None for a full fine-tuning that has to do
    without its base. UserError where nothing is at any of these places."""
    if given:
        return given, recipe.model.revision if given == recipe.model.base else "main"
    facts = manifest["base"]
    recorded = recorded_path(str(facts.get("name")), run.folder)
    places = list(dict.fromkeys([recipe.model.base, recorded]))
    there = [place for place in places if not is_path(place) or Path(place).exists()]
    if not there:
        if trains_all(recipe.adapter) and run.model.is_dir():
            return None
        what = f"its base model is not at {' or '.join(places)}"
        raise UserError(f"{run.folder}: {what}. Write {option} with the folder or hub id where it is now.")
    commit = _HUB_COMMIT.fullmatch(str(facts.get("origin")))
    revisions = [commit[1] if commit and place == recorded else recipe.model.revision for place in there]
    choices = list(zip(there, revisions, strict=True))
    return next((one for one in choices if len(choices) > 1 and _has_weights(*one, facts["sha256"])), choices[0])


def recorded_path(name: str, folder: Path) -> str:
    """What a manifest names, as an absolute path where it is one: that of a packed run has them relative to it."""
    return path_from(folder.absolute(), name) if name.startswith(("./", OUTSIDE)) else name


def _has_weights(place: str, revision: str, recorded: Mapping[str, str]) -> bool:
    try:
        return not changed_weights(resolve_base(place, revision, Silent()), recorded)
    except UserError:  # the other place is tried, and the first one says what is wrong where none is it
        return False


def recorded_base(adapter: Path) -> dict[str, str] | None:
    """The sha256 of each file of the base that an adapter was trained on, where lorakit wrote them beside it."""
    facts = (read_json_object(adapter / BASE) or {}).get("base")
    sha256s = facts.get("sha256") if isinstance(facts, dict) else None
    return sha256s if isinstance(sha256s, dict) else None


def warn_of_other_base(adapter: Path, base: Base, recorded: Mapping[str, str] | None, progress: Progress) -> None:
    """Warn where an adapter alone is put on other weights than it was trained on, as its `recorded_base` says."""
    if recorded is not None and (changed := changed_weights(base, recorded)):
        differ = ", ".join(changed[:3])
        progress.warn(f"{adapter}: was trained on other weights than those of {base.name}: {differ} differ")


def locate_sources(written: Any, folder: Path, recorded: Mapping[str, str]) -> Any:
    """`data.train` or `data.eval` of the run in `folder` with each path where its files lie now. `recorded`: the sha256
    of every file of rows, by its path in the training. MissingRows where one is nowhere."""
    if isinstance(written, list):
        return [locate_sources(one, folder, recorded) for one in written]
    if isinstance(written, Source):
        return written.model_copy(update={"path": _locate_rows(written.path, folder, recorded)})
    return _locate_rows(written, folder, recorded)


def _locate_rows(path: str, folder: Path, recorded: Mapping[str, str]) -> str:
    """A file, folder or pattern is the run's where it lay in the training, whatever it holds (changes are told when it
    is read), and elsewhere where its content is recorded."""
    if not is_path(path):
        return path
    paths, sha256s = [recorded_path(name, folder) for name in recorded], set(recorded.values())
    own = [recorded_path(name, folder) for name in recorded if not name.startswith(OUTSIDE)]
    there = _exists(path)
    if there and (any(_lies_in(one, path) for one in own) or _has_content(path, sha256s)):
        return path
    earlier = list(dict.fromkeys(_earlier_places(path, folder, paths)))
    if place := next((one for one in earlier if _has_content(one, sha256s)), None):
        return place
    name = show_path(Path(path))
    if there:
        raise MissingRows(f"{name}: not the rows of this run's training: their sha256 is another.")
    raise MissingRows(f"{name}: there is no such {'match' if is_pattern(path) else 'file'}.")


def _exists(path: str) -> bool:
    """Whether something lies there; what cannot be read does."""
    if not is_pattern(path):
        return os.path.lexists(path)
    try:
        return bool(files_in(Path(path)))
    except UserError:
        return False


def _has_content(path: str, sha256s: set[str]) -> bool:
    if not _exists(path):
        return False
    try:
        return all(sha256_of(file) in sha256s for file in files_in(Path(path)))
    except (UserError, OSError):
        return False


def _lies_in(file: str, path: str) -> bool:
    """Whether a file is what a source's path means, is below it, or may match it."""
    start = str(pattern_start(Path(path))[0]) if is_pattern(path) else path
    return file == path or file.startswith(start.rstrip("/") + "/")


def _earlier_places(path: str, folder: Path, recorded: list[str]) -> Iterator[str]:
    """Where a path of the recipe, which is relative to the run, led when the run lay elsewhere."""
    end = [part for part in Path(relative_path(path, folder)).parts if part != ".."]
    fixed = next((at for at, part in enumerate(end) if any(sign in part for sign in "*?[")), len(end))
    for parts in (Path(name).parts for name in recorded):
        for start in range(len(parts) - fixed + 1):
            if fixed and list(parts[start : start + fixed]) == end[:fixed]:
                yield str(Path(*parts[:start], *end))


class RunRows:
    """Both sides of a recipe's rows, where a file of held-out rows is read without the rows that are trained on. A
    `UserError` where they cannot be read. `run`, `manifest`: of the run that has ended."""

    def __init__(
        self,
        settings: Data,
        template: ChatTemplate,
        progress: Progress,
        run: Run | None = None,
        manifest: Mapping[str, Any] | None = None,
    ) -> None:
        self.template = template
        self._settings, self._progress, self._run, self._manifest = settings, progress, run, manifest
        self._remarks: set[str] = set()

    def read_or_warn(self, side: Literal["train", "held_out"]) -> Examples | None:
        """One side, or None where it cannot be read, with a warning; a remark where training rows are not here, as is
        usual of a run that was handed over."""
        try:
            return self.train if side == "train" else self.held_out
        except UserError as error:
            tell = self._progress.say if side == "train" and isinstance(error, MissingRows) else self._progress.warn
            self._once(tell, f"{_LOST[side]}: {error}")
            return None

    @cached_property
    def section(self) -> Data:
        """The recipe's data section, with each path where its files lie now."""
        if self._run is None or self._manifest is None:
            return self._settings
        train = locate_sources(self._settings.train, self._run.folder, self._manifest["data"]["files"])
        return self.held_out_section.model_copy(update={"train": train})

    @cached_property
    def held_out_section(self) -> Data:
        """The same, in which training rows may be gone where the held-out ones are no share of them."""
        written = self._settings.eval
        if self._run is None or self._manifest is None or written is None:
            return self._settings
        recorded = self._manifest["data"]["files"]
        if is_split(written):
            train = locate_sources(self._settings.train, self._run.folder, recorded)
            return self._settings.model_copy(update={"train": train})
        return self._settings.model_copy(update={"eval": locate_sources(written, self._run.folder, recorded)})

    @cached_property
    def _both(self) -> tuple[Examples, Examples | None]:
        train, held_out = examples_of(self.section, self.template, self._progress)
        self._warn_of_changes(self.section, held_out, all_rows=True)
        return train, held_out

    @property
    def train(self) -> Examples:
        """What is trained on."""
        return self._both[0]

    @cached_property
    def held_out(self) -> Examples | None:
        """What is never trained on; None where the recipe names none."""
        if "_both" in vars(self) or self._settings.eval is None or is_split(self._settings.eval):
            return self._both[1]
        held_out = held_out_of(self.held_out_section, self.template, self._progress)
        self._warn_of_changes(self.held_out_section, held_out, all_rows=False)
        return held_out

    def _warn_of_changes(self, section: Data, held_out: Examples | None, all_rows: bool) -> None:
        """Warn where the rows are not those of the training. They are known by their sha256, wherever they lie now.
        `all_rows`: whether the rows that are trained on were read too."""
        if self._manifest is None:
            return
        recorded = self._manifest["data"]["files"]
        files = file_sha256s(section, held_out_only=not all_rows)
        changed = changed_files(recorded if all_rows else {}, files, recorded)
        tokens = {"eval": held_out.tokens_sha256()} if held_out and not changed else {}
        changes = "not the rows of this run's training: they changed, or the recipe names others now"
        for warning in (*(f"{path}: {changes}" for path in changed), changed_tokens(tokens, self._manifest)):
            self._once(self._progress.warn, warning)

    def _once(self, tell: Any, remark: str) -> None:
        if remark and remark not in self._remarks:
            tell(remark)
        self._remarks.add(remark)


def changed_files(
    recorded: Mapping[str, str], files: Mapping[str, str], known: Mapping[str, str] | None = None
) -> list[str]:
    """The files of rows whose content is not among those that a run recorded, and those that it recorded whose content
    is gone. A file that was moved or renamed is the same. `known`: what is recorded in all, where that is more."""
    current, before = set(files.values()), set((recorded if known is None else known).values())
    other = {path for path, sha in files.items() if sha not in before}
    return sorted(other | {path for path, sha in recorded.items() if sha not in current})


def changed_tokens(sha256s: Mapping[str, str | None], manifest: Mapping[str, Any]) -> str:
    """In words, that the same rows become other tokens than when the run began, and what else changed since; empty
    where they do not. `sha256s`: of each side's tokens."""
    recorded = manifest["data"].get("tokens_sha256")
    names = {"train": "training", "eval": "held-out"}
    sides = [names[side] for side in sha256s if recorded is not None and recorded.get(side) != sha256s[side]]
    if not sides:
        return ""
    changed = changed_versions(manifest)
    return f"the {' and '.join(sides)} rows become other tokens than when the run began" + (changed and f" ({changed})")


def changed_versions(manifest: Mapping[str, Any]) -> str:
    """The packages whose versions are others than when the run began, in words."""
    then, now = manifest.get("versions", {}), versions()
    changed = (f"{name} {then[name]} then, {now.get(name)} now" for name in then if then[name] != now.get(name))
    return "; ".join(changed)
