"""Subjects in memory: one base at a time, loaded when something of it has to be computed, adapters put on and off."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lorakit.evaluate.subjects import Subject
from lorakit.model.load import load_model
from lorakit.model.shared_base import SharedBase


@dataclass
class Loaded:
    """The model in memory, and the subject that it is now. `loads` counts how often weights were read."""

    device: str
    loads: int = 0
    _held: tuple[Any, ...] | None = field(default=None, repr=False)
    _base: SharedBase | None = field(default=None, repr=False)

    def model_of(self, subject: Subject) -> Any:
        """The subject's model, in evaluation mode; what was in memory before is not to be used any more.

        Raises:
            UserError: the weights are damaged, or the adapter does not fit them.
            LorakitError: they do not fit into memory.
        """
        if self._base is None or self._held != subject.held:
            self._base = None  # before the next one is read
            self._base, self._held = SharedBase(lambda: self._read(subject)), subject.held
        return self._base.model_with(subject.adapter)

    def _read(self, subject: Subject) -> Any:
        self.loads += 1
        return load_model(subject.base, subject.settings, self.device)


def in_loading_order(subjects: Sequence[Subject]) -> list[int]:
    """The subjects by number so that each base is loaded once, and is scored before an adapter was ever on it."""
    first = {subject.held: number for number, subject in reversed(list(enumerate(subjects)))}
    return sorted(range(len(subjects)), key=lambda at: (first[subjects[at].held], subjects[at].adapter is not None, at))
