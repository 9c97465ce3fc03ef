"""A config on its way to a recipe: what each of its keys became, and what the recipe says so far."""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from lorakit.recipe.did_you_mean import nearest
from lorakit.recipe.schema import Recipe
from lorakit.recipe.schema_introspection import default_at, section_of
from lorakit.share.importing.source import ForeignConfig, as_flag, as_number
from lorakit.share.importing.verdicts import (
    ByFunction,
    FilledDefault,
    Harmless,
    KeyAccount,
    KeyTable,
    OffOnly,
    Verdict,
    is_secret,
    shown,
)


@dataclass
class Conversion:
    """`recipe` maps our dotted keys to values, `origins` to the keys of the config (none: a default of the tool);
    `settled` has the values that are ours anyway, too.

    `output`: where the recipe will be; `files`: what has to lie beside it. `end_of_turn`: the token with which the
    config's chat template ends an answer, where it is known. `dataset_info`: LLaMA-Factory's list of data
    sets, where the command names it; `data_folder`: where it lies.
    """

    tool: str
    config: ForeignConfig
    devices: int
    rows_per_pack: int | None = None
    row_format: str | None = None
    dataset_info: Path | None = None
    data_folder: Path | None = None
    output: Path = Path("recipe.yaml")
    end_of_turn: str = ""
    files: dict[Path, str] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    settled: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, list[str]] = field(default_factory=dict)
    accounts: dict[str, KeyAccount] = field(default_factory=dict)
    defaults: list[FilledDefault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def value(self, key: str, default: Any = None) -> Any:
        """The value at a dotted key; `default` where it is not written or null."""
        value: Any = self.config.tree
        for part in _parts(key):
            if isinstance(value, dict):
                value = value.get(str(part))
            elif isinstance(value, list) and isinstance(part, int) and part < len(value):
                value = value[part]
            else:
                return default
        return default if value is None else value

    def has(self, key: str) -> bool:
        """Whether a key is written, and not null."""
        return self.value(key) is not None

    def number(self, key: str, default: Any = None) -> Any:
        """The number at a key; one that cannot be read is refused, and `default` goes on."""
        if not self.has(key):
            return default
        number = as_number(self.value(key))
        if number is None:
            self.refuse(key, "it is not a number", "Write a number.")
            return default
        return number

    def whole(self, key: str, default: Any = None) -> Any:
        """The whole number at a key, as `number`."""
        number = self.number(key, default)
        if isinstance(number, float):
            if number != math.floor(number):
                self.refuse(key, "it is not a whole number", "Write a whole number.")
                return default
            return int(number)
        return number

    def flag(self, key: str, default: bool = False) -> bool:
        """The switch at a key, as `number`."""
        if not self.has(key):
            return default
        flag = as_flag(self.value(key))
        if flag is None:
            self.refuse(key, "it is neither true nor false", "Write true or false.")
        return default if flag is None else flag

    def text(self, key: str, default: str | None = None) -> Any:
        """The text at a key; a list or a mapping is refused."""
        value = self.value(key, default)
        if isinstance(value, dict | list):
            self.refuse(key, "it is not a text", "Write a text.")
            return default
        return value if value is None else str(value)

    def map(self, ours: str, value: Any, keys: str | Sequence[str] = (), note: str = "") -> None:
        """Write `ours: value`, and account for the keys that it comes of. Where none of them is written it is the
        tool's default, and written only where ours is another."""
        names = keys.split() if isinstance(keys, str) else list(keys)
        present = [key for key in names if self.has(key)]
        is_ours = value == _default(ours) and isinstance(value, bool) == isinstance(_default(ours), bool)
        self.settled[ours] = value
        if not present and is_ours and ours not in self.recipe:
            return
        self.recipe[ours] = value
        self.origins[ours] = present
        to = f"{ours}: {shown(ours, value)}"
        for key in present:
            self.account(key, "same" if is_ours else "mapped", to=to, reason=note)
        if not present:
            default = f"{self.tool}'s default" + (f" of {names[0]}" if names else "")
            self.defaults.append(FilledDefault(ours, shown(ours, value), f"{default}{'; ' + note if note else ''}"))

    def write_template(self, text: str, key: str) -> None:
        """A chat template as a file beside the recipe, which `model.chat_template` names."""
        file = self.output.absolute().with_suffix(".jinja")
        if "<|im_end|>" in text:  # of a template in the config itself; a template by name says it afterwards
            self.end_of_turn = "<|im_end|>"
        self.files[file] = text
        self.recipe["model.chat_template"], self.origins["model.chat_template"] = str(file), [key]
        self.account(key, "mapped", to=f"model.chat_template: {file.name}")

    def ignore(self, keys: str | Sequence[str], reason: str) -> None:
        """Account for keys that change nothing here."""
        for key in keys.split() if isinstance(keys, str) else keys:
            if self.has(key):
                self.account(key, "without effect", reason=reason)

    def refuse(self, keys: str | Sequence[str], reason: str, remedy: str) -> None:
        """Account for keys that change the result and have no counterpart; the first that is written, or the name of
        one that is missing."""
        names = keys.split() if isinstance(keys, str) else list(keys)
        present = [key for key in names if self.has(key)]
        for key in present or names[:1]:
            self.account(key, "refused", reason=reason, remedy=remedy)

    def account(self, key: str, verdict: Verdict, to: str = "", reason: str = "", remedy: str = "") -> None:
        """Say what became of a key. A refusal stays; what a key is mapped to besides is added."""
        before = self.accounts.get(key)
        if before and before.verdict == "refused":
            return
        if before and verdict != "refused":
            if before.to and to and to not in before.to:
                to = f"{before.to}; {to}"
            to, verdict = to or before.to, "mapped" if "mapped" in (before.verdict, verdict) else verdict
            reason = "; ".join(dict.fromkeys(filter(None, (before.reason, reason))))
        value = shown(key, self.value(key)) if self.has(key) else "null" if key in self.config.lines else "not written"
        self.accounts[key] = KeyAccount(key, value, verdict, to, reason, remedy, self.config.lines.get(key))

    def note(self, text: str) -> None:
        """Something that holds for the whole recipe."""
        if text not in self.notes:
            self.notes.append(text)

    def refused(self) -> list[KeyAccount]:
        """The keys that the recipe cannot honour."""
        return [one for one in self.accounts.values() if one.verdict == "refused"]


def finish(conversion: Conversion, table: KeyTable) -> None:
    """Account for every key that no function has read, by the tool's table, and put all into the config's order."""
    given = conversion.accounts
    conversion.accounts = {}
    for key, value in leaves(conversion.config.tree):
        own = _nearest_account(given, key)
        if own is not None and own.key == key:
            conversion.accounts[key] = own
        elif own is not None:
            conversion.account(key, own.verdict, own.to, own.reason, own.remedy)
        elif is_secret(key, value):
            reason = "secrets are not copied: lorakit takes tokens from the environment alone (HF_TOKEN)"
            conversion.account(key, "without effect", reason=reason)
        elif value is None:
            conversion.account(key, "without effect", reason="null is as if it were not written")
        else:
            _by_table(conversion, table, key, value)
    missing = {key: account for key, account in given.items() if not _is_written(conversion, key)}
    conversion.accounts |= {key: account for key, account in missing.items() if account.verdict == "refused"}
    for key, value, line, later in conversion.config.replaced:
        where = f" in line {later}" if later else ""
        reason = f"it is written again{where}, and {conversion.tool} takes the last one"
        name = f"{key} (earlier, line {line})" if line else f"{key} (earlier)"
        earlier = KeyAccount(name, shown(key, value), "without effect", reason=reason, line=line or None)
        conversion.accounts[name] = earlier


def _is_written(conversion: Conversion, key: str) -> bool:
    return key in conversion.accounts or conversion.has(key)


def _nearest_account(given: Mapping[str, KeyAccount], key: str) -> KeyAccount | None:
    """The account of a key, or of the innermost part around it that has one."""
    while key:
        if key in given:
            return given[key]
        key = key[: max(key.rfind("."), key.rfind("["), 0)]
    return None


def _by_table(conversion: Conversion, table: KeyTable, key: str, value: Any) -> None:
    record = lookup(table, key)
    if record is None:
        near = _nearest_key(table, key)
        remedy = f"Did you mean {near}?" if near else "Remove it, or check its spelling."
        conversion.account(key, "refused", reason=f"{conversion.tool} has no such key", remedy=remedy)
    elif isinstance(record, OffOnly):
        if _is_off(value, record.off):
            conversion.account(key, "without effect", reason=f"it is off: {record.reason}")
        else:
            conversion.account(key, "refused", reason=record.reason, remedy=record.remedy)
    else:
        is_known = isinstance(record, Harmless) or "data.train" in conversion.recipe
        reason = record.reason if is_known else "it goes with the rows to train on, which are not known"
        conversion.account(key, "without effect", reason=reason)


def _nearest_key(table: KeyTable, key: str) -> str | None:
    """The key of the table that is most like another one, or whose last word is."""
    names = {re.sub(r"\[\d*\]", "", name): name for name in table}
    last = {name.rpartition(".")[2]: name for name in reversed(names)}
    near = nearest(re.sub(r"\[\d*\]", "", key), names)
    word = nearest(key.rpartition(".")[2], last)
    return near or (last[word] if word else None)


def lookup(table: KeyTable, key: str) -> Harmless | OffOnly | ByFunction | None:
    """A table's record of a key: its own, or that of the innermost part around it, unless the table names the keys of
    that part."""
    own = name = re.sub(r"\[\d+\]", "[]", key)
    while name:
        if name in table:
            lists_keys = any(one.startswith((f"{name}.", f"{name}[].")) for one in table)
            return table[name] if name == own or not lists_keys else None
        name = name.removesuffix("[]") if name.endswith("[]") else name[: max(name.rfind("."), name.rfind("["), 0)]
    return None


def _is_off(value: Any, off: Collection[Any]) -> bool:
    if value in (None, False, "", [], {}) or (as_flag(value) is False and not isinstance(value, int)):
        return True
    number = as_number(value)
    return any(
        str(value).lower() == str(one).lower() or (number is not None and number == as_number(one)) for one in off
    )


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a config by its dotted name: scalars, lists of scalars, and what is empty."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{path}[{index}]")
    elif path:
        yield path, value


def _parts(key: str) -> list[str | int]:
    return [int(part[1:-1]) if part.startswith("[") else part for part in re.findall(r"\[\d+\]|[^.\[]+", key)]


def _default(ours: str) -> Any:
    """Our default of a dotted key; none equals a key that must be written."""
    section, _, name = ours.partition(".")
    model = section_of(Recipe.model_fields[section].annotation)
    return default_at(model, name) if model and name in model.model_fields else PydanticUndefined
