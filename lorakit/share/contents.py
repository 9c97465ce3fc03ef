"""What of a run goes into a packed one, and as what: everything that `eval`, `merge`, `chat` and `export` need of it,
and no rows unless they are asked for."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from lorakit.atomic_io import files_in, lies_inside, read_json_object, read_own_json, sha256_of
from lorakit.errors import UserError
from lorakit.export.private_text import find_secrets, redact
from lorakit.prepare import refuse_changed_weights, reopen_run
from lorakit.progress import Progress
from lorakit.recipe.fields import is_split
from lorakit.recipe.load import load
from lorakit.recipe.paths import input_paths, is_path
from lorakit.recipe.schema import Recipe
from lorakit.recipe.schema_introspection import annotation_at, path_role
from lorakit.recipe.to_yaml import dump_yaml, plain_recipe
from lorakit.run_dir import MERGED, Run, is_scores
from lorakit.share.archive import why_refused
from lorakit.share.packed_rows import PackedRows, extract_held_out, needs_base, pack_files
from lorakit.share.private_names import LocalNames

_OF_RUN = "the held-out rows of "  # how scores name a run's own rows


@dataclass(frozen=True)
class PackOptions:
    """What is packed besides recipe, manifest, log, adapter or model, and scores. `base`: where the base lies now."""

    held_out_rows: bool = False
    training_rows: bool = False
    merged: bool = False
    base: str | None = None


def collect_contents(run: Run, options: PackOptions, scratch: Path, progress: Progress) -> dict[str, bytes | Path]:
    """The files to pack of a run that has ended, by their names in the packed run; UserError where it has not ended, or
    is not what was trained. `scratch`: a temporary folder for what is made for the pack."""
    manifest = run.read_manifest()
    if manifest.get("status") != "complete":
        raise UserError(f"{run.folder}: its training has not ended. Continue it with lorakit train --resume.")
    refuse_changed_weights(run, manifest)
    recipe = load(run.recipe, ended=True).recipe
    paths, rows = _paths_of(run, recipe, manifest), _rows(run, recipe, manifest, options, scratch, progress)
    recipe, named = _pack_named_files(run, _with_rows(recipe, rows, options))
    files: dict[str, bytes | Path] = {name: path for step in rows for name, path in step.files.items()}
    for secret in _secrets_of(files):
        progress.warn(f"{secret}. Rows are packed as they are")
    files |= named
    moved = {str(path): f"./{name}" for name, path in files.items()}
    recorded = dict(manifest["data"]["files"])
    manifest["data"]["files"] = recorded | {name: sha for step in rows for name, sha in step.new.items()}
    for step in rows:  # a file may have been recorded at another place than where it lies now
        by_content = {sha256_of(path): f"./{name}" for name, path in step.files.items()}
        moved |= {path: by_content[sha] for path, sha in recorded.items() if sha in by_content and is_path(path)}
    names = LocalNames(run.folder, paths, moved)
    files |= _trained_files(run, manifest, names) | _score_files(run, options, names, progress)
    if options.merged:
        files |= _merged_files(run, names)
    if run.log.is_file():
        files[run.log.name] = _log_file(run, options, names)
    files[run.recipe.name] = _recipe_text(plain_recipe(_portable(recipe), run.folder), names, progress)
    files[run.manifest.name] = _manifest_text(manifest, files, options, names)
    return files


def _rows(
    run: Run, recipe: Recipe, manifest: dict[str, Any], options: PackOptions, scratch: Path, progress: Progress
) -> list[PackedRows]:
    """The rows to pack, each step with the data section after it."""
    data, recorded, steps = recipe.data, manifest["data"]["files"], list[PackedRows]()
    if options.held_out_rows and data.eval is None:
        raise UserError("--held-out-rows: the recipe of this run names none (data.eval). Leave it out.")
    if options.training_rows:
        steps.append(pack_files(run, data, "train", recorded))
    share_of_packed = options.training_rows and is_split(data.eval)
    extracts = options.held_out_rows and needs_base(data) and not share_of_packed
    if options.base and not extracts:
        raise UserError("--base: is for held-out rows that only the tokenizer tells apart. Leave it out.")
    if extracts:
        steps.append(extract_held_out(*reopen_run(run.folder, progress, options.base), manifest, scratch))
    elif options.held_out_rows and not share_of_packed:
        steps.append(pack_files(run, data, "eval", recorded))
    return steps


def _with_rows(recipe: Recipe, steps: list[PackedRows], options: PackOptions) -> Recipe:
    """The recipe whose paths lead to the packed rows."""
    update: dict[str, Any] = {}
    for number, step in enumerate(steps):
        if number == 0 and options.training_rows:
            update["train"] = step.section.train
        else:
            update |= {"eval": step.section.eval, "clean": step.section.clean}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=update)})


def _secrets_of(files: Mapping[str, bytes | Path]) -> Iterator[str]:
    """What looks like a token or a key in rows, which are packed as they are."""
    for name, file in files.items():
        if isinstance(file, Path):
            yield from (f"{name}: {what.partition(': ')[2]}" for what in find_secrets(file.parent, [file.name]))


def _pack_named_files(run: Run, recipe: Recipe) -> tuple[Recipe, dict[str, Path]]:
    """The recipe with each file that it names (a chat template, a JSON schema; not rows, models and adapters) below the
    run's folder, and these files. One that is gone stays as it is named."""
    files: dict[str, Path] = {}

    def moved(value: Any, annotation: Any) -> Any:
        if isinstance(value, dict):
            return {key: moved(inner, annotation_at(annotation, (key,))) for key, inner in value.items()}
        if isinstance(value, list):
            return [moved(inner, annotation_at(annotation, (at,))) for at, inner in enumerate(value)]
        role = path_role(annotation) if isinstance(value, str) and is_path(value) else None
        if role is None or role.or_hub or role.or_folder or role.of_data or not Path(value).is_file():
            return value
        if Path(value).is_relative_to(run.folder.absolute() / "files"):
            name = str(Path(value).relative_to(run.folder.absolute()))
        else:
            name = f"files/{len(files)}/{Path(value).name}"
            name = f"files/{len(files)}/file{Path(value).suffix}" if why_refused(name) else name
        files[name] = Path(value)
        return str(run.folder.absolute() / name)

    return Recipe.model_validate(moved(recipe.model_dump(), Recipe)), files


def _paths_of(run: Run, recipe: Recipe, manifest: Mapping[str, Any]) -> list[str]:
    """Every path that the run names, wherever."""
    source = manifest.get("adapter_from") or {}
    recorded = [*manifest["data"]["files"], str(manifest["base"].get("name")), str(source.get("folder"))]
    return [*map(str, input_paths(recipe)), *_texts(recipe.model_dump(exclude={"output"})), *recorded]


def _texts(value: Any) -> Iterator[str]:
    """Every text in a recipe: those that are paths lead to files that are there, to patterns, or to nothing now."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)


def _trained_files(run: Run, manifest: Mapping[str, Any], names: LocalNames) -> dict[str, bytes | Path]:
    """The adapter, or the model of a full fine-tuning: the files that the training wrote."""
    folder = run.model if "model_sha256" in manifest else run.adapter
    written = manifest.get("files") or files_in(folder)
    return {f"{folder.name}/{name}": names.file(own_file(folder / name, folder)) for name in written}


def _score_files(run: Run, options: PackOptions, names: LocalNames, progress: Progress) -> dict[str, bytes | Path]:
    """The scores, without texts of rows that are not packed; answers to the run's own rows where these are packed."""
    files: dict[str, bytes | Path] = {}
    for file in sorted(run.evaluations.glob("*.json")):
        facts = read_json_object(own_file(file, run.evaluations))
        if not is_scores(file.name):
            continue
        if facts is None or any(not isinstance(facts.get(key) or {}, dict) for key in ("models", "rows", "findings")):
            progress.warn(f"{file}: these scores are damaged, and are left out")
            continue
        answers, source = file.with_suffix(".jsonl"), str((facts.get("rows") or {}).get("source"))
        if options.held_out_rows and source.startswith(_OF_RUN) and answers.is_file():
            files[f"eval/{answers.name}"] = names.file(answers)
        elif "answers" in facts:
            facts["answers"] = None
        facts["findings"] = {
            model: [{**one, "details": without_texts(one.get("details"))} for one in of if isinstance(one, dict)]
            for model, of in (facts.get("findings") or {}).items()
        }
        facts = names.value(facts)
        of_models = [one for one in (facts.get("models") or {}).values() if isinstance(one, dict)]
        for part in [*of_models, *([facts["rows"]] if isinstance(facts.get("rows"), dict) else [])]:
            for key in ("given", "base", "adapter", "source"):  # of models and rows that are not the run's
                if str(part.get(key)).startswith("/"):
                    part[key] = Path(part[key]).name
        files[f"eval/{file.name}"] = json_text(facts)
    return files


def _log_file(run: Run, options: PackOptions, names: LocalNames) -> bytes | Path:
    """The log; answers to held-out rows only where these are packed."""
    content = names.file(run.log)
    if options.held_out_rows:
        return content
    lines = (content if isinstance(content, bytes) else content.read_bytes()).splitlines(keepends=True)
    return b"".join(line for line in lines if b'"samples"' not in line)


def _merged_files(run: Run, names: LocalNames) -> dict[str, bytes | Path]:
    if not run.merged.is_dir():
        remedy = "Leave it out." if run.model.is_dir() else "Leave it out, or merge first: lorakit merge RUN."
        raise UserError(f"--merged: {run.folder} has no merged model. {remedy}")
    written = read_own_json(run.merged / MERGED).get("files", [])
    return {f"merged/{name}": names.file(own_file(run.merged / name, run.merged)) for name in written}


def own_file(file: Path, folder: Path) -> Path:
    """A file of a run; UserError where it is gone, or a link that leads out of its folder."""
    if not file.is_file():
        raise UserError(f"{file}: is gone, so the run is not whole and is not packed.")
    if not lies_inside(file, folder):
        raise UserError(f"{file}: is a link to a file outside of the run. Put the file itself there.")
    return file


def without_texts(details: Any) -> Any:
    """The numbers of a finding's details: texts may be parts of rows."""
    if isinstance(details, dict):
        return {key: without_texts(one) for key, one in details.items() if isinstance(one, dict | int | float | None)}
    return details if isinstance(details, int | float | None) else None


def _portable(recipe: Recipe) -> Recipe:
    """The recipe without the folder that its run was written into."""
    return recipe.model_copy(update={"output": recipe.output.model_copy(update={"dir": f"runs/{recipe.name}"})})


def _recipe_text(recipe: dict[str, Any], names: LocalNames, progress: Progress) -> bytes:
    """The recipe without names of this machine and secrets; a text that tokens come from is another then."""
    cleaned = names.value(recipe, names.recipe_text)
    if any(redact(str(value), Path.cwd()) != str(value) for value in recipe["data"].values()):
        progress.warn(
            "recipe.yaml: what looks like a token, a key or a path of the home was taken out of data. Where it was in "
            "a prompt, the rows do not become the tokens of the training"
        )
    return dump_yaml(cleaned).encode()


def _manifest_text(
    manifest: dict[str, Any], files: Mapping[str, bytes | Path], options: PackOptions, names: LocalNames
) -> bytes:
    """The manifest with the names that files have in the pack, the sha256 of those that were rewritten, and no texts of
    rows that are not packed."""
    facts = names.value(manifest)
    for side, packed in (("train", options.training_rows), ("eval", options.held_out_rows)):
        report = facts["data"].get(side)
        for part in report.values() if isinstance(report, dict) and not packed else ():
            if isinstance(part, dict) and isinstance(part.get("first"), dict):
                places = {reason: [case.partition(": ")[0] for case in of] for reason, of in part["first"].items()}
                part["first"] = places
    rewritten = {name: sha256(content).hexdigest() for name, content in files.items() if isinstance(content, bytes)}
    if "adapter/adapter_config.json" in rewritten and "adapter_config_sha256" in facts:
        facts["adapter_config_sha256"] = rewritten["adapter/adapter_config.json"]
    model = facts.get("model_sha256", {})
    model |= {name: rewritten[f"model/{name}"] for name in model if f"model/{name}" in rewritten}
    return json_text(facts)


def json_text(value: Any) -> bytes:
    """A document as lorakit writes them."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
