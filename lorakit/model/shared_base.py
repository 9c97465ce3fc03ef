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

    PEFT's `unload` does not always restore it: modules that an adapter trained whole stay, some initializations write
    into the base's weights, tied weights come apart. So its fingerprint is compared, and it is loaded again if needed.
    """

    load: Callable[[], Any]
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
        base, self._model = self._model, None  # until the adapter is on it as a whole
        if base is not None and self._adapter is not None:
            # PEFT cannot take off every kind of adapter.
            base = base.unload() if hasattr(base, "unload") else None
        if base is None or fingerprint_of(base) != self._fingerprint:
            base = None  # frees its memory before the next one is loaded
            base = self.load()
            self._fingerprint = fingerprint_of(base)
        self._model, self._adapter = base if adapter is None else load_adapter(base, adapter), adapter
        return self._model
