"""The rows of a recipe as examples, read when somebody asks for them; of an ended run compared with its record."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from lorakit.data.chat_template import ChatTemplate
from lorakit.data.dataset import Examples
from lorakit.data.examples import examples_of, file_sha256s, held_out_of
from lorakit.errors import UserError
from lorakit.progress import Progress
from lorakit.recipe.schema import Data
from lorakit.run_dir import versions


class RunRows:
    """Both sides of a recipe's rows, where a file of held-out rows is read without the rows that are trained on. A
    `UserError` where they cannot be read. `manifest`: of the run that has ended."""

    def __init__(
        self, settings: Data, template: ChatTemplate, progress: Progress, manifest: dict[str, Any] | None = None
    ) -> None:
        self.template = template
        self._settings, self._progress, self._manifest = settings, progress, manifest
        self._warned: set[str] = set()

    @cached_property
    def _both(self) -> tuple[Examples, Examples | None]:
        train, held_out = examples_of(self._settings, self.template, self._progress)
        self._warn_of_changes(held_out, all_rows=True)
        return train, held_out

    @property
    def train(self) -> Examples:
        """What is trained on."""
        return self._both[0]

    @cached_property
    def held_out(self) -> Examples | None:
        """What is never trained on; None where the recipe names none."""
        if "_both" in vars(self) or self._settings.eval is None or isinstance(self._settings.eval, float):
            return self._both[1]
        held_out = held_out_of(self._settings, self.template, self._progress)
        self._warn_of_changes(held_out, all_rows=False)
        return held_out

    @cached_property
    def train_if_there(self) -> Examples | None:
        """`train`, or None where it cannot be read, with a warning."""
        try:
            return self.train
        except UserError as error:
            self._progress.warn(f"nothing is compared with the rows of the training, which cannot be read: {error}")
            return None

    @cached_property
    def held_out_if_there(self) -> Examples | None:
        """`held_out`, or None where it cannot be read, with a warning."""
        try:
            return self.held_out
        except UserError as error:
            self._progress.warn(f"nothing is scored on held-out rows that cannot be read: {error}")
            return None

    def _warn_of_changes(self, held_out: Examples | None, all_rows: bool) -> None:
        """Warn where the rows are not those of the training. They are known by their sha256, wherever they lie now.
        `all_rows`: whether the rows that are trained on were read too."""
        if self._manifest is None:
            return
        recorded = self._manifest["data"]["files"]
        files = file_sha256s(self._settings, held_out_only=not all_rows)
        changed = changed_files(recorded if all_rows else {}, files, recorded)
        tokens = {"eval": held_out.tokens_sha256()} if held_out and not changed else {}
        changes = "not the rows of this run's training: they changed, or the recipe names others now"
        warnings = [*(f"{path}: {changes}" for path in changed), changed_tokens(tokens, self._manifest)]
        for warning in warnings:
            if warning and warning not in self._warned:
                self._progress.warn(warning)
        self._warned |= set(warnings)


def changed_files(recorded: dict[str, str], files: dict[str, str], known: dict[str, str] | None = None) -> list[str]:
    """The files of rows whose content is not among those that a run recorded, and those that it recorded whose content
    is gone. A file that was moved or renamed is the same. `known`: what is recorded in all, where that is more."""
    current, before = set(files.values()), set((recorded if known is None else known).values())
    other = {path for path, sha in files.items() if sha not in before}
    return sorted(other | {path for path, sha in recorded.items() if sha not in current})


def changed_tokens(sha256s: Mapping[str, str | None], manifest: dict[str, Any]) -> str:
    """In words, that the same rows become other tokens than when the run began, and what else changed since; empty
    where they do not. `sha256s`: of each side's tokens."""
    recorded = manifest["data"].get("tokens_sha256")
    names = {"train": "training", "eval": "held-out"}
    sides = [names[side] for side in sha256s if recorded is not None and recorded.get(side) != sha256s[side]]
    if not sides:
        return ""
    changed = changed_versions(manifest)
    return f"the {' and '.join(sides)} rows become other tokens than when the run began" + (changed and f" ({changed})")


def changed_versions(manifest: dict[str, Any]) -> str:
    """The packages whose versions are others than when the run began, in words."""
    then, now = manifest.get("versions", {}), versions()
    changed = (f"{name} {then[name]} then, {now.get(name)} now" for name in then if then[name] != now.get(name))
    return "; ".join(changed)
