"""`lorakit pack` and `lorakit unpack`"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.amounts import counted, decimal_bytes
from lorakit.cli.options import Json, Quiet, quoted
from lorakit.errors import UserError

if TYPE_CHECKING:
    from lorakit.run_dir import Run


def pack(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that has ended.", show_default=False)],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The file to write: its ending tells the form, .tar.zst, .tar.gz or .tar.",
            show_default=False,
        ),
    ],
    held_out_rows: Annotated[
        bool, typer.Option("--held-out-rows", help="Pack the held-out rows, and the answers to them.")
    ] = False,
    training_rows: Annotated[
        bool, typer.Option("--training-rows", help="Pack the files of the training rows.")
    ] = False,
    merged: Annotated[bool, typer.Option("--merged", help="Pack the merged model as well.")] = False,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="MODEL",
            help="Where the base model is now, for held-out rows that are a share of the training files.",
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a run into one file, which others unpack on another machine.

    It has the recipe, the manifest, the log, the adapter (or the model of a full fine-tuning) and the scores, each with
    its sha256; rows only where they are asked for; never checkpoints, exports, the base model or absolute paths of this
    machine. [cyan]lorakit unpack FILE[/cyan] writes the run from it.
    """
    from lorakit import console
    from lorakit.share.contents import PackOptions
    from lorakit.share.pack import pack as pack_run

    progress = console.Terminal(quiet)
    options = PackOptions(held_out_rows, training_rows, merged, base)
    packed = pack_run(_run_of(run), output, options, progress)
    size = packed.file.stat().st_size
    if as_json:
        facts = {"file": str(packed.file), "bytes": size, **packed.index}
        console.result_json(facts | {"base": {key: packed.base.get(key) for key in ("revision", "origin", "sha256")}})
        return
    sides = {"eval": "held-out", "train": "training"}
    without = [words for side, words in sides.items() if not packed.index["rows"][side]]
    lines = [f"packed: {packed.file} ({decimal_bytes(size)})", *_describe(packed.index["files"])]
    if without:
        lines.append(f"  without {' and '.join(without)} rows")
    name = str(packed.base.get("name"))
    shown = Path(name).name if name.startswith(("/", "./", "../")) else name
    lines.append(f"  its base model is not in it: {shown} ({packed.base.get('origin')})")
    console.result("\n".join([*lines, f"there: lorakit unpack {quoted(Path(packed.file.name))}"]))


def unpack(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What lorakit pack wrote.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="The new folder of the run; by default ./NAME of the run."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the run of a packed file into a new folder.

    Every name, size and sha256 is checked before anything appears there; nothing is replaced, and no code is run.
    """
    from lorakit import console
    from lorakit.share.unpack import unpack as unpack_run

    unpacked = unpack_run(file, output)
    folder, index = unpacked.run.folder, unpacked.index
    if as_json:
        console.result_json({"folder": str(folder), "bytes": unpacked.size, **index})
        return
    lines = [f"run: {folder} ({decimal_bytes(unpacked.size)})", *_describe(index["files"])]
    packed_rows = index.get("rows")
    has_rows = isinstance(packed_rows, dict) and packed_rows.get("eval") is True
    rows = "" if has_rows else " --data FILE"
    lines.append(f"next: lorakit eval {quoted(folder)}{rows} (--base MODEL says where its base model is here)")
    console.result("\n".join(lines))


def _describe(files: dict[str, Any]) -> list[str]:
    """A line for each part of a run: how many files, and how large."""
    sizes: dict[str, list[int]] = {}
    for name, facts in files.items():
        sizes.setdefault(name.partition("/")[0], []).append(int(facts["bytes"]))
    return [f"  {part}: {counted(len(of), 'file')}, {decimal_bytes(sum(of))}" for part, of in sizes.items()]


def _run_of(folder: Path) -> "Run":
    from lorakit.run_dir import Run

    run, outer = Run(folder), Run(folder.resolve().parent)
    if not run.holds_results() and (folder / "adapter_config.json").is_file():
        if outer.holds_results() and outer.adapter == folder.resolve():
            return outer
        raise UserError(
            f"{folder}: is an adapter without its run, which has nothing to pack: it can be handed over as it is."
        )
    return run
