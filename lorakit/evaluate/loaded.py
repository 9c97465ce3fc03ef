"""Subjects in memory: one base at a time, loaded when something of it has to be computed, adapters put on and off."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lorakit.evaluate.subjects import Subject
from lorakit.model.attach import load_adapter
from lorakit.model.load import load_model


@dataclass
class Loaded:
    """The model in memory, and the subject that it is now. `loads` counts how often weights were read."""

    device: str
    loads: int = 0
    _held: tuple[Any, ...] | None = field(default=None, repr=False)
    _model: Any = field(default=None, repr=False)
    _adapter: Any = field(default=None, repr=False)

    def model_of(self, subject: Subject) -> Any:
        """The subject's model, in evaluation mode; what was in memory before is not to be used any more.

        Raises:
            UserError: the weights are damaged, or the adapter does not fit them.
            LorakitError: they do not fit into memory.
        """
        if self._held == subject.held and self._adapter == subject.adapter:
            return self._model
        if self._adapter is not None:
            self._model, self._adapter = self._model.unload(), None
        if self._held != subject.held:
            self._model = self._held = None  # before the next one is read
            self._model = load_model(subject.base, subject.settings, self.device)
            self._held, self.loads = subject.held, self.loads + 1
        if subject.adapter is not None:
            self._model = load_adapter(self._model, subject.adapter)
            self._adapter = subject.adapter
        return self._model


def in_loading_order(subjects: Sequence[Subject]) -> list[int]:
    """The subjects by number so that each base is loaded once, and is scored before an adapter was ever on it."""
    first = {subject.held: number for number, subject in reversed(list(enumerate(subjects)))}
    return sorted(range(len(subjects)), key=lambda at: (first[subjects[at].held], subjects[at].adapter is not None, at))
