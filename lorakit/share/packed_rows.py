"""The rows of a packed run: files as they are where they lie apart; held-out rows alone where they are a share of a
file or come from the hub, read back and compared with the tokens of the training."""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.atomic_io import sha256_of
from lorakit.data.examples import held_out_of
from lorakit.data.readers import files_in
from lorakit.data.sources import is_file, open_source, source_name, sources_of
from lorakit.errors import UserError
from lorakit.prepare import Prepared
from lorakit.progress import Silent
from lorakit.recipe.data_files import data_suffix, is_pattern, pattern_start
from lorakit.recipe.fields import is_split
from lorakit.recipe.problem import show_path
from lorakit.recipe.schema import Data, Source
from lorakit.run_dir import Run
from lorakit.run_inputs import locate_sources, recorded_path
from lorakit.share.archive import why_refused

# Checks that compare rows: they acted on all rows of the training, and would act otherwise on the held-out ones alone.
_COMPARING = ("duplicates", "near_duplicates", "contradictions", "style", "near_leakage")


_LOCAL = {"subset": None, "data_files": None, "split": "train", "revision": "main"}  # of a source that lies in a file


@dataclass(frozen=True)
class PackedRows:
    """Rows to pack: the data section whose paths lead to them below the run's folder, each file by its name there, and
    the files with their sha256 that the manifest does not have yet."""

    section: Data
    files: Mapping[str, Path]
    new: Mapping[str, str]


def needs_base(data: Data) -> bool:
    """Whether the held-out rows are known only once the rows are tokenized: they are a share of files, or of a hub."""
    if is_split(data.eval):
        return True
    sources = [] if data.eval is None else sources_of(data, data.eval)
    return any(one.take is not None or not is_file(one) for one in sources)


def pack_files(run: Run, data: Data, side: str, recorded: Mapping[str, str]) -> PackedRows:
    """The files of `data.train` or `data.eval` (the `side`), as they are; those of a hub dataset stay there."""
    files: dict[str, Path] = {}
    known = {recorded_path(name, run.folder): sha256 for name, sha256 in recorded.items()}

    def place(written: Any, number: int) -> Any:
        path = written if isinstance(written, str) else written.path
        if not is_file(Source(path=path)):
            return written
        folder, files_of = f"rows/{side}/{number}", files_in(Path(path))
        for file in files_of:
            sha256 = sha256_of(file)
            if sha256 != known.get(str(file), sha256) or sha256 not in known.values():
                raise UserError(f"{show_path(file)}: not the rows of this run's training: they changed. Not packed.")
        names = _names_in_pack(Path(path), files_of, folder)
        files.update(zip(names, files_of, strict=True))
        target = str(run.folder.absolute() / (names[0] if files_of == [Path(path)] else folder))
        return target if isinstance(written, str) else written.model_copy(update={"path": target})

    located = locate_sources(getattr(data, side), run.folder, recorded)
    several = located if isinstance(located, list) else [located]
    placed = [place(one, number) for number, one in enumerate(several)]
    section = data.model_copy(update={side: placed if isinstance(located, list) else placed[0]})
    return PackedRows(section, files, {})


def _names_in_pack(source: Path, files: list[Path], folder: str) -> list[str]:
    """The names that the files of a source get: their own, or numbers where one is not packed. They are read in the
    order of their names, which stays."""
    root = source.parent if files == [source] else pattern_start(source)[0] if is_pattern(source) else source
    names = [f"{folder}/{file.relative_to(root)}" for file in files]
    if any(map(why_refused, names)):
        return [f"{folder}/{at:05}{data_suffix(file.name)}" for at, file in enumerate(files)]
    return names


def extract_held_out(run: Run, prepared: Prepared, manifest: Mapping[str, Any], folder: Path) -> PackedRows:
    """The held-out rows alone, written into a temporary `folder`. UserError where they cannot be written as JSON Lines,
    or do not become the tokens of the training again."""
    remedy = "They are not packed. Pack the files that they are in: --training-rows."
    section, files = write_held_out(run, prepared, manifest, folder, remedy)
    new = {f"./{name}": sha256_of(file) for name, file in files.items()}
    written: list[Source] = section.eval  # type: ignore[assignment]
    places_in_run = [str(run.folder.absolute() / Path(one.path).relative_to(folder)) for one in written]
    moved = [one.model_copy(update={"path": path}) for one, path in zip(written, places_in_run, strict=True)]
    return PackedRows(section.model_copy(update={"eval": moved}), files, new)


def write_held_out(
    run: Run, prepared: Prepared, manifest: Mapping[str, Any], folder: Path, remedy: str
) -> tuple[Data, dict[str, Path]]:
    """Write the held-out rows of a run alone below a folder: the data section that reads them there, and the files by
    their names in it. UserError, with the `remedy`, where they do not become the tokens of the training again."""
    data = prepared.rows.held_out_section
    share, held_out = is_split(data.eval), prepared.held_out
    assert held_out is not None
    recorded = (manifest["data"].get("tokens_sha256") or {}).get("eval")
    if recorded not in (None, held_out.tokens_sha256()):
        what = "its held-out rows are not those of its training: they, or the tokenizer, changed"
        raise UserError(f"{run.folder}: {what}. {remedy}")
    places = defaultdict[int, set[str]](set)
    for row in held_out.rows.select_columns(["source", "where"]):
        places[row["source"]].add(row["where"])
    written, files = list[Source](), dict[str, Path]()
    for number, source in enumerate(sources_of(data, data.train if share else data.eval)):
        if not places[number]:
            continue
        name = f"rows/eval/{number}/held-out.jsonl"
        files[name] = folder / name
        files[name].parent.mkdir(parents=True)
        word = _write_records(source, places[number], files[name], remedy)
        update = {"path": str(files[name]), "format": word, "take": None, "weight": 1.0}
        written.append(source.model_copy(update=update | _LOCAL))
    checks = {name: "report" for name in _COMPARING if getattr(data.clean, name) != "off"} | {"leakage": "fix"}
    section = data.model_copy(update={"eval": written, "clean": data.clean.model_copy(update=checks)})
    again = held_out_of(section, prepared.rows.template, Silent())
    if again is None or again.tokens_sha256() != held_out.tokens_sha256():
        what = "its held-out rows, read alone, do not become the tokens of the training again"
        raise UserError(f"{run.folder}: {what}. {remedy}")
    return section, files


def _write_records(source: Source, places: set[str], target: Path, remedy: str) -> Any:
    """Write the records of a source that stand at some places, as they are; their format."""
    opened = open_source(source)
    with target.open("w", encoding="utf-8") as file:
        for block in opened.blocks:
            for row in block.rows():
                if row.where not in places or not isinstance(row.record, dict):
                    continue
                try:
                    file.write(json.dumps(row.record, ensure_ascii=False, allow_nan=False) + "\n")
                except (TypeError, ValueError) as error:
                    what = f"a held-out row cannot be written as JSON ({error})"
                    raise UserError(f"{source_name(source)}: {row.where}: {what}. {remedy}") from error
    return opened.format if source.format in (None, "auto") else source.format
