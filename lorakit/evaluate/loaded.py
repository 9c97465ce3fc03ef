"""Subjects in memory: one base at a time, loaded when something of it has to be computed, adapters put on and off."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lorakit.evaluate.models import EvalModelSpec
from lorakit.model.load import load_model
from lorakit.model.shared_base import SharedBase


@dataclass
class ModelLoader:
    """The model in memory, and the subject that it is now. `loads` counts how often weights were read."""

    device: str
    loads: int = 0
    _held: tuple[Any, ...] | None = field(default=None, repr=False)
    _base: SharedBase | None = field(default=None, repr=False)

    def model_of(self, spec: EvalModelSpec) -> Any:
        """The subject's model, in evaluation mode; what was in memory before is not to be used any more.

        Raises:
            UserError: the weights are damaged, or the adapter does not fit them.
            LorakitError: they do not fit into memory.
        """
        if self._base is None or self._held != spec.base_key:
            self._base = None  # before the next one is read
            self._base, self._held = SharedBase(lambda: self._read(spec)), spec.base_key
        return self._base.model_with(spec.adapter)

    def _read(self, spec: EvalModelSpec) -> Any:
        self.loads += 1
        return load_model(spec.base, spec.settings, self.device)


def loading_order(specs: Sequence[EvalModelSpec]) -> list[int]:
    """The subjects by number so that each base is loaded once, and is scored before an adapter was ever on it."""
    first = {spec.base_key: number for number, spec in reversed(list(enumerate(specs)))}
    return sorted(range(len(specs)), key=lambda at: (first[specs[at].base_key], specs[at].adapter is not None, at))
