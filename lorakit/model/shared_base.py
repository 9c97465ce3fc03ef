"""One base in memory that adapters are put on, one after the other, each as if it were the first."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.model.fingerprint import fingerprint_of
from lorakit.model.peft_adapter import load_adapter


@dataclass
class SharedBase:
    """A base that `load` reads from disk.

    PEFT's `unload` does not always give the base back as it was: modules that an adapter trained whole stay, some
    initializations write into the base's weights, tied weights come apart. So the base is compared with what it was
    when it was read, and read again where it differs.
    """

    load: Callable[[], Any]
    _base: Any = field(default=None, repr=False)
    _model: Any = field(default=None, repr=False)
    _adapter: Path | None = None
    _fingerprint: str = ""

    def model_with(self, adapter: Path | None) -> Any:
        """The base with the adapter of a folder, or alone; what was given before is not to be used any more.

        Raises:
            UserError: the weights are damaged, or the adapter does not fit them.
            LorakitError: they do not fit into memory.
        """
        if self._model is not None and self._adapter == adapter:
            return self._model
        base = self._untouched()
        self._base = self._model = None  # until the adapter is on it as a whole
        model = base if adapter is None else load_adapter(base, adapter)
        self._base, self._model, self._adapter = base, model, adapter
        return model

    def _untouched(self) -> Any:
        """The base as it was read, from memory where that holds it still."""
        if self._model is not None and self._adapter is not None:
            unload = getattr(self._model, "unload", None)  # not every kind of PEFT's can be taken off
            self._base = unload() if unload else None
        self._model = None
        if self._base is not None and fingerprint_of(self._base) == self._fingerprint:
            return self._base
        self._base = None  # before the next one is read
        base = self.load()
        self._fingerprint = fingerprint_of(base)
        return base
