"""Locks: what a recipe reads, and with which packages, as sha256 and versions in a file beside it; and what differs
from one. The manifest of a run is a lock too."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.atomic_io import sha256_of, write_atomic
from lorakit.errors import UserError
from lorakit.prepare import open_template
from lorakit.progress import Progress
from lorakit.recipe.load import LoadedRecipe, load
from lorakit.recipe.paths import is_path, relative_path
from lorakit.recipe.problem import Location, show_path
from lorakit.recipe.to_yaml import dump_yaml, plain_recipe
from lorakit.recipe.yaml_reader import plain, read_file
from lorakit.run_dir import CLEARED, Run
from lorakit.share.diff_side import PLACES, flatten, show_value
from lorakit.share.scores import value_at
from lorakit.train.record import pinned_facts

FORMAT = 1
_ENDING = ".lock.yaml"
_HEADING = """\
# Written by `lorakit lock`: what {name} reads, by sha256, and the versions of the packages. `lorakit train --locked`
# refuses what differs from it. Commit it beside the recipe; write it anew when a difference is meant.
"""
_PARTS = (("versions",), ("base", "sha256"), ("data", "files"))  # what every lock has
_ABSENT = object()
_MOST_FILES = 4_000  # names and sha256s that the reader of YAML takes in one file


@dataclass(frozen=True)
class Lock:
    """A lock file, or a run's manifest: the recipe's `keys`, with paths seen from its folder, and `facts` as
    `pinned_facts` gives them, with `extends` in a lock file."""

    path: Path
    keys: Mapping[str, Any]
    facts: Mapping[str, Any]


def lock_file(recipe: Path) -> Path:
    """Where the lock of a recipe lies: NAME.lock.yaml beside NAME.yaml."""
    return recipe.with_name(recipe.stem + _ENDING)


def write_lock(loaded: LoadedRecipe, progress: Progress) -> tuple[Path, dict[str, Any], list[str]]:
    """Write the lock of a recipe beside it: its path, what it says, and what differs from the lock that it replaces.
    The base is fetched where it is not here. UserError where the recipe reads something that is not there, or a file
    with the lock's name is another one."""
    path, facts, changes = lock_file(loaded.path), _current_facts(loaded, progress), list[str]()
    files = len(facts["data"]["files"])
    if files > _MOST_FILES:
        raise UserError(f"{show_path(path)}: a lock names at most {_MOST_FILES:,} data files, and these are {files:,}.")
    if path.exists():
        if not path.is_file() or not path.read_bytes().startswith(_HEADING.encode()[:28]):
            raise UserError(f"{show_path(path)}: is not a lock that lorakit wrote. Move it away, or rename the recipe.")
        with suppress(UserError):  # a damaged one, or one of another format, is what lorakit lock is asked to replace
            changes = find_differences(read_lock(path, loaded), loaded, facts)
    content = {"format": FORMAT, "recipe": plain_recipe(loaded.recipe, path.parent)}
    content |= _with_relative_paths(facts, path.parent)
    write_atomic(path, _HEADING.format(name=loaded.path.name) + dump_yaml(content))
    return path, content, changes


def refuse_differences(loaded: LoadedRecipe, progress: Progress) -> None:
    """Refuse to train a recipe that differs from its lock in anything, each by its name (UserError). The lock of a
    run's recipe.yaml is the run's manifest."""
    run = Run(loaded.path.parent)
    is_run = loaded.path == run.recipe and run.holds_results()
    lock = lock_of_run(run) if is_run else read_lock(lock_file(loaded.path), loaded)
    if differences := find_differences(lock, loaded, _current_facts(loaded, progress)):
        lines = "\n".join(f"  - {line}" for line in differences)
        remedy = "" if is_run else f", or accept what differs with lorakit lock {show_path(loaded.path)}"
        raise UserError(f"{show_path(lock.path)}: this is not what was locked:\n{lines}\nPut it back{remedy}.")
    progress.say(f"everything is as locked in {show_path(lock.path)}")


def read_lock(path: Path, loaded: LoadedRecipe) -> Lock:
    """The lock of a recipe; UserError where it is missing, damaged, of another recipe or of a later format."""
    name, again = show_path(path), f"lorakit lock {show_path(loaded.path)}"
    if not path.exists():
        raise UserError(f"{name}: there is no lock of {show_path(loaded.path)}. {again} writes one.")
    node, problems = read_file(path, Location(path))
    if node is None or problems:
        raise UserError(f"{name}: damaged: {problems[0]} Take another copy, or write it anew: {again}.")
    content = plain(node)
    version = content.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise UserError(
            f"{name}: has the format {version}, of a later lorakit; this one reads {FORMAT}. Update lorakit, or write "
            f"the lock anew: {again}."
        )
    if version != FORMAT or (missing := _missing_parts(content, [*_PARTS, ("recipe",), ("extends",)])):
        lacks = f"its format is {show_value(version)}" if version != FORMAT else f"it has no {', '.join(missing)}"
        raise UserError(f"{name}: damaged: {lacks}. Take another copy, or write it anew: {again}.")
    if content["recipe"].get("name") != loaded.recipe.name:
        raise UserError(
            f"{name}: is the lock of the recipe {show_value(content['recipe'].get('name'))}, and this one is "
            f"{loaded.recipe.name}. Write its own: {again}."
        )
    return Lock(path, dict(flatten(content["recipe"])), content)


def _missing_parts(facts: Mapping[str, Any], parts: Sequence[tuple[str, ...]]) -> list[str]:
    """The parts of a lock that are not there, or do not map names to texts; the recipe's keys are of any kind."""
    missing, optional = list[str](), (("inputs",), ("adapter_from", "sha256"))
    for part in (*parts, *(part for part in optional if value_at(facts, *part) is not None)):
        value = value_at(facts, *part)
        texts = isinstance(value, dict) and (part == ("recipe",) or all(isinstance(one, str) for one in value.values()))
        missing += [] if texts else [".".join(part)]
    return missing


def lock_of_run(run: Run) -> Lock:
    """The manifest of a run as a lock of its recipe.yaml; UserError where it is damaged, or the run was cleared."""
    manifest = run.read_manifest()
    if manifest.get("status") == CLEARED:
        raise UserError(f"{run.folder}: this run was cleared for another one: its manifest locks nothing.")
    if missing := _missing_parts(manifest, _PARTS):
        raise UserError(f"{run.manifest}: damaged: it has no {', '.join(missing)}.")
    recipe = manifest.get("recipe")
    if not isinstance(recipe, dict):  # of an earlier version: what --set changes is seen all the same
        recipe = plain_recipe(load(run.recipe).recipe, run.folder)
    return Lock(run.manifest, dict(flatten(recipe)), manifest)


def find_differences(lock: Lock, loaded: LoadedRecipe, facts: Mapping[str, Any]) -> list[str]:
    """What differs from a lock now, a line each that begins with its name. `facts`: as they are now."""
    differences = _compare_keys(lock, loaded)
    then, now = lock.facts, facts
    versions = then.get("versions") or {}
    for name in dict.fromkeys([*versions, *now["versions"]]):
        pair = versions.get(name), now["versions"].get(name)
        if pair[0] != pair[1]:
            differences.append(f"{name}: {pair[0] or 'not installed'} locked, {pair[1] or 'not installed'} now")
    differences += _compare_base(then, now)
    differences += _compare_files("", then["data"]["files"], now["data"]["files"])
    for section in ("inputs", "extends"):
        if isinstance(recorded := then.get(section), dict):
            differences += _compare_files("", recorded, now.get(section) or {})
    adapters = [value_at(one, "adapter_from", "sha256") or {} for one in (then, now)]
    differences += _compare_files("adapter.from: ", *adapters)
    return differences


def _compare_keys(lock: Lock, loaded: LoadedRecipe) -> list[str]:
    """Keys with other values. Two paths are not compared: what they lead to is, by its content."""
    keys, lines = dict(flatten(plain_recipe(loaded.recipe, lock.path.parent))), []
    for key in dict.fromkeys([*lock.keys, *keys]):
        pair = [one.get(key, _ABSENT) for one in (lock.keys, keys)]
        if pair[0] == pair[1] or key in PLACES or all(str(value).startswith(("./", "../")) for value in pair):
            continue
        then, now = ("nothing" if value is _ABSENT else show_value(value) for value in pair)
        lines.append(f"{key}: {then} locked, {now} now ({loaded.where(key)})")
    return lines


def _compare_base(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    before, current = then["base"]["sha256"], now["base"]["sha256"]
    names = sorted(name for name in {*before, *current} if before.get(name) != current.get(name))
    commit = then["base"].get("commit")
    pin = (
        f" (model.revision: {commit} pins what was locked)"
        if names and commit != now["base"]["commit"] and commit
        else ""
    )
    lines = [f"model.base: {', '.join(names)} of {now['base']['name']} differ by sha256{pin}"] if names else []
    if then.get("tokenizer_sha256") != now["tokenizer_sha256"]:
        lines.append("the tokenizer of the base, or the chat template, is another one by sha256")
    return lines


def _compare_files(subject: str, then: Mapping[str, Any], now: Mapping[str, str]) -> list[str]:
    """Files by content: one that was moved or renamed is the same."""
    new = [path for path, sha256 in now.items() if sha256 not in set(then.values())]
    gone = [path for path, sha256 in then.items() if sha256 not in set(now.values())]
    names = {Path(path).name for path in gone}
    lines = [
        f"{subject}{_shown(path)}: {'other content, by sha256' if Path(path).name in names else 'is not in the lock'}"
        for path in new
    ]
    others = {Path(path).name for path in new}
    return lines + [
        f"{subject}{_shown(path)}: locked, and not read now" for path in gone if Path(path).name not in others
    ]


def _shown(path: str) -> str:
    return show_path(Path(path)) if is_path(path) else path


def _current_facts(loaded: LoadedRecipe, progress: Progress) -> dict[str, Any]:
    """What a manifest would say of the recipe now, and the files that it extends."""
    with loaded.locating():
        base, template = open_template(loaded.recipe, progress)
        facts = pinned_facts(loaded.recipe, base, template.tokenizer)
    own = loaded.path.resolve()
    return facts | {"extends": {str(path): sha256_of(path) for path in loaded.files if path != own}}


def _with_relative_paths(facts: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Facts whose paths are seen from a folder."""

    def relative(path: str) -> str:
        return relative_path(path, folder) if is_path(path) else path

    def of(files: Mapping[str, str]) -> dict[str, str]:
        return {relative(path): sha256 for path, sha256 in files.items()}

    adapter = facts["adapter_from"]
    return {
        **facts,
        "base": facts["base"] | {"name": relative(facts["base"]["name"])},
        "adapter_from": adapter and adapter | {"folder": relative(adapter["folder"])},
        "inputs": of(facts["inputs"]),
        "data": facts["data"] | {"files": of(facts["data"]["files"])},
        "extends": of(facts["extends"]),
    }
