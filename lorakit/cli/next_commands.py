"""What can be done next with a run: commands that work as they stand."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorakit.merge.card import MergeResult
    from lorakit.merge.inputs import MergeInput
    from lorakit.prepare import Prepared
    from lorakit.run_dir import Run


def next_commands(run: "Run", prepared: "Prepared") -> list[str]:
    """The commands for a run that has ended: its evaluation, and its merge where one can be made."""
    from lorakit.model.quantization_config import stored_quantization
    from lorakit.recipe.adapter_kind import trains_all

    folder = quoted(run.folder)
    commands = [f"lorakit eval {folder}" + ("" if prepared.held_out else " --data FILE")]
    stored = stored_quantization(prepared.base.folder)
    made = run.merged.exists() or prepared.recipe.output.merged
    if not trains_all(prepared.recipe.adapter) and not made and (stored is None or stored.reversible):
        commands.append(f"lorakit merge {folder}")
    return commands


def after_merge(given: "MergeInput", merged: "MergeResult") -> str:
    """The evaluation that compares a merged model with its adapter and its base."""
    command = f"lorakit eval {quoted(given.folder)}"
    if not given.is_run or merged.folder.resolve() != given.folder.resolve() / "merged":
        command += f" {quoted(merged.folder)}"
    command += "" if given.is_run else " base"
    return command + ("" if given.names_held_out and merged.rows_of in ("", "held-out") else " --data FILE")


def quoted(path: Path) -> str:
    """A path as a shell reads it, not to be taken for an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)
