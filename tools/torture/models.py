"""Base models whose files are damaged: config.json, the tokenizer's, weights, indexes. Each is used as it stands, or
refused as a user's; no training stands on weights that the folder does not hold."""

import json
import random
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

from tools.torture.cases import BrokenPromiseError, Part
from tools.torture.command import call_in_fork
from tools.torture.damage import damage
from tools.torture.interrupted import case_of
from tools.torture.stage import TRAIN, Stage, check_clean_end, new_task, run_in, set_stage

_COMMANDS = [
    ("check", "recipe.yaml"),
    ("plan", "recipe.yaml"),
    ("data", "recipe.yaml"),
    (*TRAIN, "--dry-run"),
    TRAIN,
    TRAIN,
    TRAIN,
]
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class _Bases:
    stage: Stage
    sharded: Path


def _prepare(folder: Path) -> _Bases:
    stage = set_stage(folder)
    call_in_fork(lambda: _shard(stage.base, folder / "sharded"))
    return _Bases(stage, folder / "sharded")


def _shard(base: Path, folder: Path) -> None:
    """The same base with its weights in several files, and an index."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    shutil.copytree(base, folder)
    (folder / "model.safetensors").unlink()
    with safe_open(base / "model.safetensors", "pt") as weights:
        names = sorted(weights.keys())
        shards: dict[str, dict[str, object]] = {}
        for at, name in enumerate(names):
            shards.setdefault(f"model-{at % 3 + 1:05d}-of-00003.safetensors", {})[name] = weights.get_tensor(name)
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    places = {name: file for file, tensors in shards.items() for name in tensors}
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": places})
    (folder / _INDEX).write_text(text, encoding="utf-8")


def _run(bases: _Bases, chance: random.Random, place: Path, number: int) -> str:
    sharded = chance.random() < 0.35
    task = new_task(place, bases.sharded if sharded else bases.stage.base)
    base = task / "base"
    whole = _tensors(base)
    names = chance.choice([None, ["config.json"], ["tokenizer.json", "tokenizer_config.json"], [_INDEX]])
    done = damage(chance, base, names)
    command = chance.choice(_COMMANDS)
    case_of(place, command=command, damage=done)
    ended = run_in(task, command, seconds=90)
    codes = (0, 1, 2) if command == TRAIN else (0, 2)
    try:
        check_clean_end(ended, codes)
        if command == TRAIN and ended.code == 0 and not whole.items() <= _tensors(base).items():
            lost = sorted(name for name in whole if _tensors(base).get(name) != whole[name])
            raise BrokenPromiseError(f"trained on a base that lacks {', '.join(lost[:3])}")
    except BrokenPromiseError as error:
        raise BrokenPromiseError(f"{command[0]}, {'; '.join(done)}: {error}") from error
    return {0: "used", 1: "failed with a message", 2: "refused"}[ended.code]


def _tensors(base: Path) -> dict[str, str]:
    """Name and shape of every tensor that the weights' files hold; nothing of a file that says none."""
    found: dict[str, str] = {}
    for path in base.glob("*.safetensors"):
        if path.is_file():
            raw = path.read_bytes()
            try:
                (size,) = struct.unpack("<Q", raw[:8])
                header = json.loads(raw[8 : 8 + size])
                found |= {name: str(facts["shape"]) for name, facts in header.items() if name != "__metadata__"}
            except (ValueError, KeyError, TypeError, struct.error, AttributeError):
                continue
    return found


PART = Part("models", 200, _prepare, _run, seconds=200)
