"""The configs of well-known models, bundled so that they are planned without a network and without their files."""

import copy
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TABLE = Path(__file__).with_name("known_models.json")


@dataclass(frozen=True)
class KnownModel:
    """Models of one config: their hub ids, what config.json says of their size, and where that is from."""

    ids: list[str]
    parameters: int  # as the model's hub page counts them
    source: str
    config: dict[str, Any]


@functools.cache
def known_models() -> tuple[KnownModel, ...]:
    """Every entry of the bundled table."""
    models = json.loads(_TABLE.read_text(encoding="utf-8"))["models"]
    return tuple(KnownModel(**model) for model in models)


def known_config(hub_id: str) -> dict[str, Any] | None:
    """config.json of a hub model, reduced to what sizes it (with `dtype`, the type in which it is stored); else None.

    Letter case does not matter. Quantized repackagings have other ids and are not known.
    """
    wanted = hub_id.lower()
    for model in known_models():
        if any(known.lower() == wanted for known in model.ids):
            return copy.deepcopy(model.config)
    return None
