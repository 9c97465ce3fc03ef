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

    PEFT's `unload` does not always restore the base: modules that an adapter trained whole stay, some initializations
    write into the base's weights, tied weights come apart. So the base's fingerprint is compared, and the base is
    loaded again where it differs.
    """

    load: Callable[[], Any]
    _base: Any = field(default=None, repr=False)
    _model: Any = field(default=None, repr=False)
    _adapter: Path | None = None
    _fingerprint: str = ""

    def model_with(self, adapter: Path | None) -> Any:
        """The base with the adapter of a folder, or alone; the model returned before must not be used any more.

        Raises:
            UserError: the weights are damaged, or the adapter does not fit them.
            LorakitError: they do not fit into memory.
        """
        if self._model is not None and self._adapter == adapter:
            return self._model
        if self._model is not None and self._adapter is not None:
            unload = getattr(self._model, "unload", None)  # PEFT cannot take off every kind of adapter
            self._base = unload() if unload else None
        base, self._base, self._model = self._base, None, None  # until the adapter is on it as a whole
        if base is None or fingerprint_of(base) != self._fingerprint:
            base = None  # frees its memory before the next one is loaded
            base = self.load()
            self._fingerprint = fingerprint_of(base)
        model = base if adapter is None else load_adapter(base, adapter)
        self._base, self._model, self._adapter = base, model, adapter
        return model
