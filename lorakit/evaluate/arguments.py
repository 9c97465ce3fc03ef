"""What the arguments of `lorakit eval` are: runs, adapters, models, and what to call them."""

from collections.abc import Sequence
from pathlib import Path

from lorakit.errors import UserError
from lorakit.run_dir import MERGED, Run, missing_run

BASE = "base"


def argument_kind(given: str) -> str:
    """What an argument is: run, adapter, merged, model or base."""
    path = Path(given)
    if given == BASE and not path.exists():
        return BASE
    if path.is_file():
        if path.suffix == ".gguf":
            return "model"
        raise UserError(f"{given}: is a file. Give the folder of a run, of an adapter or of a model.")
    if not path.exists():
        if given.count("/") != 1 or path.is_absolute() or path.parent.is_dir():
            raise missing_run(path)
        return "model"
    signs = {"adapter": "adapter_config.json", "merged": MERGED, "model": "config.json", "run": "manifest.json"}
    for kind, name in signs.items():  # a run last: a manifest.json may be another program's
        if (path / name).is_file():
            return "run" if kind == "adapter" and run_folder(given) != path else kind
    raise UserError(
        f"{given}: is not a run, an adapter or a model: it has no manifest.json, adapter_config.json or config.json."
    )


def run_folder(given: str) -> Path:
    """The run that an argument is, or whose adapter/ it is; itself where there is no such run."""
    path = Path(given)
    parent = path.resolve().parent
    return parent if Run(parent).holds_results() and Run(parent).adapter == path.resolve() else path


def short_names(given: Sequence[str]) -> dict[str, str]:
    """A short name for each argument, or the whole argument where short ones are the same."""
    short = {}
    for one in given:
        path = Path(one)
        if one == BASE or not path.exists():
            short[one] = one
        else:
            parts = path.resolve().parts
            short[one] = "/".join(parts[-2:]) if parts[-1] in ("adapter", "merged", "model") else parts[-1]
    names = list(short.values())
    return {one: one if names.count(name) > 1 else name for one, name in short.items()}
