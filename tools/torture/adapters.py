"""Adapter folders whose files are damaged: each is scored, merged or trained on as it is, or refused as a user's."""

import random
import shutil
from pathlib import Path

import yaml

from tools.torture.cases import BrokenPromiseError, Part
from tools.torture.damage import damage
from tools.torture.interrupted import case_of
from tools.torture.stage import RUN, Stage, check_clean_end, new_task, run_in, set_stage

_COMMANDS = [
    ("eval", "theirs", "--data", "eval.jsonl", "--quiet"),
    ("merge", "theirs", "--output", "merged", "--quiet"),
    ("train", "from.yaml", "--quiet"),
]


def _prepare(folder: Path) -> Stage:
    return set_stage(folder)


def _run(stage: Stage, chance: random.Random, place: Path, number: int) -> str:
    task = new_task(place, stage.base)
    recipe = yaml.safe_load((task / "recipe.yaml").read_text(encoding="utf-8"))
    (task / "from.yaml").write_text(yaml.safe_dump({**recipe, "adapter": {"from": "theirs"}}), encoding="utf-8")
    shutil.copytree(stage.trained / RUN / "adapter", task / "theirs")
    config = task / "theirs" / "adapter_config.json"
    text = config.read_text(encoding="utf-8").replace(str(stage.trained / "base"), str(task / "base"))
    config.write_text(text, encoding="utf-8")
    names = chance.choice([None, ["adapter_config.json"], ["adapter_model.safetensors"]])
    done = damage(chance, task / "theirs", names)
    command = chance.choice(_COMMANDS)
    case_of(place, command=command, damage=done)
    ended = run_in(task, command, seconds=90)
    try:
        check_clean_end(ended, (0, 1, 2) if command[0] == "train" else (0, 2))
        if command[0] == "merge" and ended.code and (task / "merged").exists():
            raise BrokenPromiseError("a merged folder although the merge was refused")
    except BrokenPromiseError as error:
        raise BrokenPromiseError(f"{command[0]}, {'; '.join(done)}: {error}") from error
    return {0: "used", 1: "failed with a message", 2: "refused"}[ended.code]


PART = Part("adapters", 150, _prepare, _run, seconds=200)
