"""Another tool's config -> a recipe that does what the config does, with every key of it accounted for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.errors import UserError
from lorakit.recipe.problem import one_line
from lorakit.share.importing import axolotl, llama_factory, trl, unsloth
from lorakit.share.importing.conversion import Conversion, finish
from lorakit.share.importing.other_tasks import explain, other_file, other_purpose
from lorakit.share.importing.recipe_text import check_text, recipe_text
from lorakit.share.importing.source import ForeignConfig, read_command, read_config
from lorakit.share.importing.verdicts import VERDICTS, FilledDefault, Harmless, KeyAccount, KeyTable, shown

__all__ = ["TOOLS", "VERDICTS", "ForeignTool", "ImportResult", "import_config", "read_command", "read_config"]


@dataclass(frozen=True)
class ForeignTool:
    """A tool whose configs are read: its keys, those that tell it, and the function that reads them."""

    name: str
    keys: KeyTable
    needed: str
    marks: frozenset[str]
    convert: Callable[[Conversion], None]
    settle_rest: Callable[[Conversion], None]


def _tool(module: Any) -> ForeignTool:
    marks = frozenset(module.MARKS.split())
    return ForeignTool(module.NAME, module.KEYS, module.NEEDED, marks, module.convert, module.settle_rest)


TOOLS: dict[str, ForeignTool] = {
    "axolotl": _tool(axolotl),
    "llama-factory": _tool(llama_factory),
    "unsloth": _tool(unsloth),
    "trl": _tool(trl),
}
"""The word of `--from` -> the tool."""


@dataclass(frozen=True)
class ImportResult:
    """What became of a config: `keys` in its order, `text` the recipe, or None with the `reason` why there is none;
    `files` are what the recipe names beside itself. `is_other`: the config is for something else than lorakit does."""

    tool: str
    source: str
    devices: int
    keys: tuple[KeyAccount, ...]
    defaults: tuple[FilledDefault, ...]
    notes: tuple[str, ...]
    text: str | None
    reason: str = ""
    files: Mapping[Path, str] = field(default_factory=dict)
    is_other: bool = False

    @property
    def refused(self) -> tuple[KeyAccount, ...]:
        """The keys that change the result and have no counterpart."""
        return tuple(one for one in self.keys if one.verdict == "refused")

    def to_dict(self) -> dict[str, Any]:
        """The facts for `--json`."""
        counts = {verdict: sum(one.verdict == verdict for one in self.keys) for verdict in VERDICTS}
        return {
            "tool": self.tool,
            "source": self.source,
            "devices": self.devices,
            "counts": counts,
            "keys": [one.to_dict() for one in self.keys],
            "defaults": [vars(one) for one in self.defaults],
            "notes": list(self.notes),
            "recipe": self.text,
            "reason": self.reason,
            "files": {str(path): text for path, text in self.files.items()},
        }


def import_config(
    config: ForeignConfig,
    output: Path,
    tool: str | None = None,
    devices: int | None = None,
    rows_per_pack: int | None = None,
    row_format: str | None = None,
    dataset_info: Path | None = None,
    partial: bool = False,
) -> ImportResult:
    """Convert a config. `output`: where the recipe will be written, since its paths are relative to that folder.

    `devices`: how many the config was made for; `rows_per_pack`: how many rows fill a pack, where rows are packed;
    `row_format`: the format of the rows, where the config does not say it; `partial`: a place is left for rows that are
    not known.

    Raises:
        UserError: no tool, or several, have the config's keys.
    """
    kind = TOOLS[tool] if tool else recognise(config)
    count = devices or config.processes or 1
    conversion = Conversion(kind.name, config, count, rows_per_pack, row_format, dataset_info, output=output)
    if purpose := other_purpose(conversion):
        return _refuse_whole(conversion, kind, purpose)
    convert(kind, conversion)
    if partial and "data.train" not in conversion.recipe:
        _leave_place_for_rows(conversion)
    text, reason = recipe_text(conversion, output), ""
    if text is None:
        reason = "the base model or the rows to train on are not known"
    elif problems := check_text(text, output, conversion):
        text, reason = None, f"lorakit's own rules refuse it: {' '.join(problems)}"
    keys, defaults, notes = conversion.accounts.values(), conversion.defaults, conversion.notes
    return ImportResult(
        kind.name, config.name, count, tuple(keys), tuple(defaults), tuple(notes), text, reason, conversion.files
    )


def _refuse_whole(c: Conversion, kind: ForeignTool, purpose: tuple[str, str]) -> ImportResult:
    """A config for another task: nothing of it is imported, and the key that tells is refused."""
    key, task = purpose
    reason = explain(purpose, shown(key, c.value(key)))
    c.refuse(key, reason, "Import a config of supervised fine-tuning.")
    others = [name for name in c.config.tree if name != key and not key.startswith((f"{name}.", f"{name}["))]
    c.ignore(others, f"nothing of a config for {task} is imported")
    finish(c, {name: Harmless(f"nothing of a config for {task} is imported") for name in c.config.tree})
    keys = tuple(c.accounts.values())
    return ImportResult(kind.name, c.config.name, c.devices, keys, (), (), None, reason, is_other=True)


def _leave_place_for_rows(c: Conversion) -> None:
    keys = [one.key for one in c.refused() if one.key.startswith(("dataset", "data."))]
    c.recipe["data.train"] = str(c.output.absolute().parent / "rows.jsonl")
    c.origins["data.train"] = keys[:1]
    c.note("The rows are not known: put them where data.train says, or write their path and format there.")


def convert(kind: ForeignTool, conversion: Conversion) -> Conversion:
    """The conversion with every key of its config read and accounted for."""
    kind.convert(conversion)
    kind.settle_rest(conversion)
    finish(conversion, kind.keys)
    return conversion


_EXAMPLES = {
    "data": "local_dataset: [rows.jsonl]",
    "training": "training_type: lora",
    "lora": "lora_r: 16",
    "logging": "enable_wandb: false",
}


def recognise(config: ForeignConfig) -> ForeignTool:
    """The tool whose keys a config has."""
    scores = {name: _score(tool, config.tree) for name, tool in TOOLS.items()}
    best = max(scores.values())
    names = [name for name, score in scores.items() if score == best and best > 0]
    if len(names) == 1:
        return TOOLS[names[0]]
    if not best and (what := other_file(config.tree)):
        raise UserError(f"{config.name}: is {what}. Give the config of the training.")
    sections = [key for key in unsloth.MARKS.split() if key != "model" and key in config.tree]
    if not best and isinstance(config.tree.get("model"), str) and len(sections) > 1:
        wrong = next(key for key in sections if not isinstance(config.tree[key], dict))
        what = f"{wrong} is {one_line(str(config.tree[wrong]), 40)!r}, and in Unsloth's config a mapping of settings"
        raise UserError(f"{config.name}: {what}. Write for example {wrong}: {{{_EXAMPLES[wrong]}}}.")
    seen = one_line(", ".join(map(str, config.tree)), 200) or "none"
    remedy = f"Say which with --from: {', '.join(TOOLS)}."
    if names:
        shown_names = " and ".join(TOOLS[name].name for name in names)
        raise UserError(f"{config.name}: its keys ({seen}) are those of {shown_names} alike. {remedy}")
    needed = "; ".join(f"{tool.name} has {_signature(tool)}" for tool in TOOLS.values())
    raise UserError(f"{config.name}: it is a config of none of the tools. Its keys are {seen}. {needed}. {remedy}")


def _score(tool: ForeignTool, tree: Mapping[str, Any]) -> int:
    marks = tool.marks & tree.keys()
    if tool.name == unsloth.NAME:
        sections = [key for key in ("data", "training", "lora", "logging") if isinstance(tree.get(key), dict)]
        return 10 * len(sections) if isinstance(tree.get("model", ""), str) else 0
    return len(marks) if tool.needed in tree else 0


def _signature(tool: ForeignTool) -> str:
    if tool.name == unsloth.NAME:
        return "model and the sections data, training and lora"
    others: Sequence[str] = [key for key in _mark_order(tool) if key != tool.needed][:4]
    return f"{tool.needed} with {', '.join(others)}"


def _mark_order(tool: ForeignTool) -> list[str]:
    order = {axolotl.NAME: axolotl.MARKS, llama_factory.NAME: llama_factory.MARKS, trl.NAME: trl.MARKS}
    return order[tool.name].split()
