"""`lorakit export`"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.amounts import decimal_bytes
from lorakit.cli.options import BaseOption, Json, Overwrite, Quiet, RowColumns, RowFormat, given_rows
from lorakit.errors import UserError

if TYPE_CHECKING:
    from lorakit.export.run import ExportResult
    from lorakit.export.source import ExportSource
    from lorakit.merge.inputs import MergeInput
    from lorakit.prepare import Prepared
    from lorakit.progress import Progress
    from lorakit.recipe.export_target import ExportTarget
    from lorakit.run_dir import Run


def export(
    given: Annotated[
        str,
        typer.Argument(metavar="X", help="The folder of a run, an adapter or a merged model."),
    ],
    to: Annotated[
        list[str],
        typer.Option(
            "--to",
            metavar="TARGET",
            help="What to write: [cyan]gguf:TYPE[/cyan] (such as gguf:q4_k_m), [cyan]ollama[/cyan] (or "
            "ollama:TYPE), [cyan]gguf-lora[/cyan], [cyan]vllm[/cyan], [cyan]sglang[/cyan], [cyan]lorax[/cyan], "
            "[cyan]huggingface[/cyan] (or huggingface:merged). Several with commas, or given several times.",
            show_default=False,
        ),
    ] = [],  # noqa: B006
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Where the targets' folders go; by default export/ of X."),
    ] = None,
    overwrite: Overwrite = False,
    ladder: Annotated[
        bool,
        typer.Option(
            "--ladder",
            help="Also write full precision, q8_0, q4_k_m and q2_k where they are missing, and compare them: size, "
            "memory, speed and scores on the held-out rows.",
        ),
    ] = False,
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, metavar="N", help="The ladder on the first N held-out rows.")
    ] = None,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(
            "--llama-cpp", metavar="DIR", help="A checkout or build of llama.cpp to use instead of the extra's."
        ),
    ] = None,
    base: BaseOption = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="Rows of the ladder, instead of the run's held-out rows."),
    ] = None,
    row_format: RowFormat = None,
    columns: RowColumns = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a run's model for the programs that serve it, and check what was written.

    Each target gets a folder of its own, with a README that says how to start a server on it, and export.json with what
    was read back from the files. What is made from merged weights is made from a merge that was proved; where there is
    none yet, it is made first.

    [cyan]lorakit export runs/NAME --to gguf:q4_k_m[/cyan]; [cyan]lorakit export runs/NAME --ladder[/cyan] finds the
    smallest file that answers as well.
    """
    from lorakit import console
    from lorakit.cli.ladder import climb, ladder_json, refuse_without_run, rung_targets, show_ladder
    from lorakit.export.conversion import converter_folder
    from lorakit.export.run import default_root
    from lorakit.export.run import export as export_targets
    from lorakit.recipe.export_target import refuse_missing_modules

    rows_of_ladder = given_rows(data, row_format, columns)
    for option, value in {"--rows": rows, "--data": data}.items():
        if value and not ladder:
            raise UserError(f"{option}: is for --ladder, which scores on rows. Add --ladder, or leave it out.")
    targets = parse_targets(to) if to or not ladder else []
    refuse_missing_modules([*targets, *(rung_targets() if ladder else [])], "--ladder" if ladder else "--to")
    if llama_cpp is not None:
        if not ladder and not any(target.spec.modules for target in targets):
            raise UserError(f"--llama-cpp: does nothing for {', '.join(map(str, targets))}. Leave it out.")
        converter_folder(llama_cpp)
    if ladder:
        refuse_without_run(given)
    progress = console.Terminal(quiet)
    with open_source(given, base, llama_cpp, progress) as source:
        root = output or default_root(source.folder)
        results = export_targets(source, targets, root, overwrite, progress) if targets else []
        climbed = (
            climb(given, base, source, targets, root, overwrite, (rows, rows_of_ladder), progress) if ladder else None
        )
    if as_json:
        facts: dict[str, Any] = {"exports": [result.facts() for result in results]}
        console.result_json(facts | ({"ladder": ladder_json(*climbed)} if climbed else {}))
        return
    if results:
        console.result("\n".join(line for result in results for line in _describe(result)))
    if climbed:
        show_ladder(*climbed, source.name)


def parse_targets(words: list[str]) -> "list[ExportTarget]":
    """The targets of `--to A,B --to C`, each once."""
    from lorakit.recipe.export_target import parse_target
    from lorakit.registry import EXPORTERS

    targets = []
    for word in (part for text in words for part in text.split(",")):
        try:
            target = parse_target(word)
        except ValueError as error:
            raise UserError(f"--to: {error}") from error
        if target in targets:
            raise UserError(f"--to: {target} is there twice. Leave one out.")
        targets.append(target)
    if not targets:
        raise UserError(f"--to is missing. Write one or several of {', '.join(EXPORTERS.names())}.")
    return targets


@contextmanager
def open_source(given: str, base: str | None, llama_cpp: Path | None, progress: "Progress") -> "Iterator[ExportSource]":
    """What an argument means, with its run locked against a training that would replace it."""
    from lorakit.evaluate.models import argument_kind, run_folder
    from lorakit.merge.inputs import input_of_adapter
    from lorakit.model.endpoint import shown_address
    from lorakit.prepare import reopen_run
    from lorakit.run_dir import Run

    kind = argument_kind(given)
    if kind in ("base", "endpoint") or Path(given).is_file():
        raise UserError(f"{shown_address(given)}: is not a run, an adapter or a model's folder. Give one of these.")
    folder = run_folder(given)
    with Run(folder).shared() if kind == "run" else nullcontext():
        if kind in ("merged", "model"):
            yield _source_of_model(given, llama_cpp, progress)
            return
        if kind == "run":
            yield source_of_run(*reopen_run(folder, progress, base), llama_cpp, progress)
        else:
            yield _source_of_adapter(input_of_adapter(folder, base, progress), llama_cpp, None, progress)


def source_of_run(run: "Run", prepared: "Prepared", llama_cpp: Path | None, progress: "Progress") -> "ExportSource":
    """What a run trained: its adapter, or its model."""
    from lorakit.export.source import ExportSource
    from lorakit.merge.inputs import input_of_run, rows_of_run
    from lorakit.recipe.adapter_kind import adapter_spec, trains_all

    system = prepared.recipe.data.system
    if not trains_all(prepared.recipe.adapter):
        source = _source_of_adapter(input_of_run(run, prepared, progress), llama_cpp, system, progress)
        needs = adapter_spec(prepared.recipe.adapter).quantizes is not None
        return replace(source, **_prompts_of(prepared), needs_quantized=needs)

    def read_rows() -> list[dict[str, Any]]:
        return rows_of_run(prepared, progress)[0]

    name, stops = str(prepared.recipe.name), tuple(prepared.stop_ids)
    model = (None, lambda: run.model, prepared.tokenizer, stops)
    prompts = _prompts_of(prepared)
    return ExportSource(name, run.folder, prepared.base, *model, read_rows, llama_cpp, system, **prompts)


def _prompts_of(prepared: "Prepared") -> dict[str, Any]:
    """What the prompts of a run's rows were written with, and how long its rows may be."""
    from lorakit.evaluate.rendering import prompt_variables

    template, max_length = prepared.rows.template, prepared.recipe.data.max_length
    if not template.tokenizer.chat_template:
        return {"max_length": max_length}
    return {"variables": prompt_variables(template, prepared), "date": template.date, "max_length": max_length}


def _source_of_adapter(
    given: "MergeInput", llama_cpp: Path | None, system: str | None, progress: "Progress"
) -> "ExportSource":
    from lorakit.export.source import ExportSource

    return ExportSource(
        given.name,
        given.folder,
        given.base,
        given.adapter,
        _merge_of(given, given.folder / "merged", progress),
        given.tokenizer,
        tuple(given.stop_ids),
        lambda: given.read_rows()[0],
        llama_cpp,
        system,
        quantization=given.quantization,
    )


def _merge_of(merge_input: "MergeInput", folder: Path, progress: "Progress") -> Callable[[], Path]:
    """The merged model of an adapter: the one that is there, or one that is made and proved now."""

    def merged() -> Path:
        from lorakit.merge.run import merge
        from lorakit.output_dir import claim_output

        if not folder.exists():
            progress.say(f"merging first, into {folder}")
            with claim_output(folder, overwrite=False):
                merge(merge_input, folder, progress)
        return folder

    return merged


def _source_of_model(given: str, llama_cpp: Path | None, progress: "Progress") -> "ExportSource":
    """A merged model or another one, without its run."""
    from lorakit.data.general_texts import encode_text, read_general_texts
    from lorakit.export.source import ExportSource
    from lorakit.model.resolve import resolve_base
    from lorakit.model.spec_from_meta import read_hf_config
    from lorakit.model.tokenizer import load_tokenizer, quiet_libraries, stop_token_ids

    quiet_libraries()
    base = resolve_base(given, "main", progress)
    tokenizer = load_tokenizer(base, None)

    def read_rows() -> list[dict[str, Any]]:
        config = read_hf_config(base.folder)
        return [{"input_ids": encode_text(tokenizer, row.text, config)} for row in read_general_texts()]

    folder = Path(given) if Path(given).is_dir() else Path(given.rpartition("/")[2])
    stop_ids = tuple(stop_token_ids(base, tokenizer))
    name = folder.resolve().parent.name if folder.resolve().name == "merged" else folder.resolve().name
    return ExportSource(name, folder, base, None, lambda: base.folder, tokenizer, stop_ids, read_rows, llama_cpp)


def _describe(result: "ExportResult") -> Iterator[str]:
    """A target in lines: where it is, and each check."""
    size = sum(int(file["bytes"]) for file in result.files.values())
    yield f"{result.target}: {result.folder} ({decimal_bytes(size)})"
    for check in result.export.checks:
        yield f"  {check.name}: {check.detail}"
