"""What can be done next with a run: commands that work as they stand."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorakit.plan.prepare import Prepared
    from lorakit.runs import Run


def next_commands(run: "Run", prepared: "Prepared") -> list[str]:
    """The commands for a run that has ended: its evaluation, and its merge where one can be made."""
    from lorakit.model.stored import stored_quantization
    from lorakit.recipe.kinds import trains_all

    folder = quoted(run.folder)
    found = [f"lorakit eval {folder}" + ("" if prepared.held_out else " --data FILE")]
    stored = stored_quantization(prepared.base.folder)
    made = run.merged.exists() or prepared.recipe.output.merged
    if not trains_all(prepared.recipe.adapter) and not made and (stored is None or stored.reversible):
        found.append(f"lorakit merge {folder}")
    return found


def after_merge(run: "Run", prepared: "Prepared", merged: Path) -> str:
    """The evaluation that compares a merged model with its adapter and its base."""
    beside = "" if merged.resolve() == run.merged.resolve() else f" {quoted(merged)}"
    return f"lorakit eval {quoted(run.folder)}{beside}" + ("" if prepared.held_out else " --data FILE")


def quoted(path: Path) -> str:
    """A path as a shell reads it, not to be taken for an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)
