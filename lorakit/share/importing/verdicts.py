"""What can become of a key of a config, and the records of the tools' tables that say so."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lorakit.recipe.problem import one_line

Verdict = Literal["mapped", "same", "without effect", "refused"]
VERDICTS: tuple[Verdict, ...] = ("mapped", "same", "without effect", "refused")

# What is never shown nor copied, by the key's last word and by what the value looks like.
_SECRET_KEY = re.compile(
    r"(?:^|_)(?:token|api_?key|secret|password|passwd|webhook(?:_url)?|access_key(?:_id)?|credentials?)$", re.IGNORECASE
)
_SECRET_VALUE = re.compile(r"\b(?:hf_[A-Za-z0-9]{8,}|sk-[\w-]{8,}|ghp_\w{8,}|AKIA\w{12,})|://[^/\s:@]*:?[^/\s@]+@")
_NO_SECRETS = ("eos_token", "pad_token", "bos_token", "unk_token", "mask_token", "image_token")
_SHOWN = 70


@dataclass(frozen=True)
class KeyAccount:
    """What became of one key of a config: `to` is where it went, `reason` why, `remedy` what to do."""

    key: str
    value: str
    verdict: Verdict
    to: str = ""
    reason: str = ""
    remedy: str = ""
    line: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The facts for `--json`."""
        return {name: getattr(self, name) for name in ("key", "value", "verdict", "to", "reason", "remedy", "line")}


@dataclass(frozen=True)
class FilledDefault:
    """A value that the config leaves out, and that is another here than there."""

    to: str
    value: str
    reason: str


@dataclass(frozen=True)
class Harmless:
    """A table's record of a key that changes nothing here: why."""

    reason: str


@dataclass(frozen=True)
class OffOnly:
    """A table's record of a key that nothing here does: `off` are its values that do nothing."""

    reason: str
    remedy: str
    off: tuple[Any, ...] = ()


@dataclass(frozen=True)
class ByFunction:
    """A table's record of a key that a function of the tool's module reads; without an account it was not needed."""

    reason: str


KeyTable = Mapping[str, Harmless | OffOnly | ByFunction]


def keys_with(record: Harmless | OffOnly | ByFunction, keys: str) -> dict[str, Any]:
    """A table's entries: `record` for each of these keys; `key=value` names a value that does nothing."""
    table: dict[str, Any] = {}
    for word in keys.split():
        key, equals, off = word.partition("=")
        table[key] = record
        if equals and isinstance(record, OffOnly):
            table[key] = OffOnly(record.reason, record.remedy, (*record.off, *off.split("|")))
    return table


def is_secret(key: str, value: Any) -> bool:
    """Whether a value is a secret, by its key's name or by its look."""
    name = re.split(r"[.\[]", key)[-1]
    by_name = bool(_SECRET_KEY.search(name)) and name not in _NO_SECRETS and isinstance(value, str) and bool(value)
    texts = value if isinstance(value, list) else [value]
    return by_name or any(isinstance(text, str) and _SECRET_VALUE.search(text) for text in texts)


def shown(key: str, value: Any) -> str:
    """A value as the account shows it: short, on one line, never a secret."""
    if is_secret(key, value):
        return "(a secret, not shown)"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        text = ", ".join(shown(key, item) for item in value)
        return one_line(f"[{text}]", _SHOWN)
    if isinstance(value, dict):
        text = ", ".join(f"{name}: {shown(f'{key}.{name}', inner)}" for name, inner in value.items())
        return one_line(f"{{{text}}}", _SHOWN)
    return one_line(f"{value:g}" if isinstance(value, float) else str(value), _SHOWN)
