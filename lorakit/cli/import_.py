"""`lorakit import`"""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lorakit.amounts import counted
from lorakit.cli.options import Json
from lorakit.errors import EXIT_FAILED, UserError

if TYPE_CHECKING:
    from lorakit.share.importing import ImportResult

_TITLES = {
    "mapped": "mapped",
    "same": "the same as lorakit's default",
    "without effect": "without effect here",
    "refused": "refused: it changes the result, and lorakit has no counterpart",
}


def import_(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE", help="A config of Axolotl, LLaMA-Factory, Unsloth or TRL, or a script with `trl sft`."
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write the recipe.")] = Path(
        "recipe.yaml"
    ),
    tool: Annotated[
        Literal["axolotl", "llama-factory", "unsloth", "trl"] | None,
        typer.Option("--from", help="Whose config it is; by default its keys tell."),
    ] = None,
    trl_command: Annotated[
        str | None, typer.Option("--trl-command", metavar="TEXT", help="A `trl sft ...` command, instead of a file.")
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option("--devices", metavar="N", min=1, help="How many devices the config was made for: 1 by default."),
    ] = None,
    rows_per_pack: Annotated[
        int | None,
        typer.Option("--rows-per-pack", metavar="N", min=1, help="How many rows fill a pack, where rows are packed."),
    ] = None,
    row_format: Annotated[
        Literal["messages", "sharegpt", "prompt-completion", "alpaca", "text"] | None,
        typer.Option("--format", help="What the rows are, where a config of TRL or Unsloth does not say it."),
    ] = None,
    dataset_info: Annotated[
        Path | None,
        typer.Option("--dataset-info", metavar="FILE", help="LLaMA-Factory's dataset_info.json."),
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Write the recipe without what is refused, and say what is missing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", "--force", help="Replace the file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Make a recipe of another tool's config, and account for every key of it.

    A value that the config leaves out is written where the tool's default is another than lorakit's. A key that changes
    the result and has no counterpart is refused: then nothing is written and the exit code is 1, unless
    [cyan]--partial[/cyan] says otherwise. Tokens and keys are never copied.
    """
    from lorakit import console
    from lorakit.atomic_io import write_atomic
    from lorakit.share.importing import import_config, read_command, read_config

    if (config is None) == (trl_command is None):
        raise UserError(
            "give a file, or --trl-command with its text, and not both. For example lorakit import qlora.yml"
        )
    _check_output(output, config, overwrite)
    source = read_config(config) if config else read_command(trl_command or "", "--trl-command", Path.cwd())
    result = import_config(source, output, tool, devices, rows_per_pack, row_format, dataset_info, partial)
    writes = result.text is not None and (partial or not result.refused)
    if writes:
        for file, text in result.files.items():
            if file.exists() and not overwrite and file.read_bytes() != text.encode():
                raise UserError(f"{file}: exists. Choose another --output, or replace it with --overwrite.")
        for file, text in {**result.files, output: result.text or ""}.items():
            write_atomic(file, text)
    if as_json:
        console.result_json(result.to_dict() | {"output": str(output) if writes else None, "partial": partial})
    else:
        _print(result)
        console.result_wrapped(_conclusion(result, output, writes))
    if not writes:
        raise SystemExit(EXIT_FAILED)


def _check_output(output: Path, config: Path | None, overwrite: bool) -> None:
    """A `UserError` where the recipe cannot be written, or would replace what is to be kept."""
    if output.exists() and not overwrite:
        raise UserError(f"{output}: exists. Choose another with --output, or replace it with --overwrite.")
    if config and output.exists() and config.exists() and output.samefile(config):
        raise UserError(f"{output}: is the config itself, which is not replaced. Give another --output.")
    if output.is_dir():
        raise UserError(f"{output}: is a folder. Give the name of a file with --output.")
    if output.suffix == ".jinja":
        raise UserError(f"{output}: is a name of a template's file. Give --output a name such as recipe.yaml.")
    for parent in output.absolute().parents:
        if parent.exists() and not parent.is_dir():
            raise UserError(f"{parent}: is a file, and cannot hold the recipe. Give another --output.")


def _print(result: "ImportResult") -> None:
    from lorakit import console

    console.result(f"{result.source}: a config of {result.tool}, {len(result.keys)} keys\n")
    if result.is_other:  # one sentence says it, below
        return
    for verdict, title in _TITLES.items():
        facts = [(f"{one.key}: {one.value}", _describe(one)) for one in result.keys if one.verdict == verdict]
        if facts:
            console.result(f"{title} ({len(facts)})")
            console.result_facts([(f"  {name}", fact) for name, fact in facts])
            console.result("")
    if result.defaults:
        console.result(f"left out by the config, and another default there ({len(result.defaults)})")
        console.result_facts([(f"  {one.to}: {one.value}", one.reason) for one in result.defaults])
        console.result("")
    for note in result.notes:
        console.result_wrapped(note, under="  ", begin="note: ")


def _describe(one: Any) -> str:
    parts = [f"-> {one.to}" if one.to else "", one.reason]
    text = "; ".join(filter(None, parts))
    return f"{text}. {one.remedy}" if one.remedy else text


def _conclusion(result: "ImportResult", output: Path, writes: bool) -> str:
    refused = len(result.refused)
    if writes and not refused:
        return f"written: {output}. Next: lorakit check {shlex.quote(str(output))}"
    if writes:
        what = f"without {counted(refused, 'refused key')}: it does not do all that the config does"
        return f"written: {output}, {what}. Next: lorakit check {shlex.quote(str(output))}"
    if result.text is None:
        return f"nothing is written: {result.reason}"
    what = "a key is" if refused == 1 else f"{refused} keys are"
    return f"nothing is written: {what} refused. Change the config, or leave them out with --partial."
