"""A merge that is killed leaves a whole merged model or none, and the next one cleans up after it."""

import json
import os
import subprocess
import sys

import pytest
from runs_of_tests import run_recipe

ATTEMPTS = 20

# Imports once, and forks for each attempt; nothing is computed before a fork, since torch's threads do not survive it.
SCRIPT = """
import hashlib, json, os, random, select, shutil, signal, sys, time
from pathlib import Path

from lorakit.merge.inputs import input_of_run
from lorakit.merge.run import merge
from lorakit.prepare import reopen_run
from lorakit.progress import Silent

folder, attempts = Path(sys.argv[1]), int(sys.argv[2])
chance = random.Random(5)
run, prepared = reopen_run(folder, Silent())


def attempt(seconds):
    number = os.fork()
    if number == 0:
        code = 1
        try:
            merge(input_of_run(run, prepared, Silent()), run.merged, Silent())
            code = 0
        finally:
            os._exit(code)
    began, handle = time.monotonic(), os.pidfd_open(number)
    if not select.select([handle], [], [], seconds)[0]:
        os.kill(number, signal.SIGKILL)
    os.close(handle)
    _, status = os.waitpid(number, 0)
    assert status in (0, signal.SIGKILL), status
    return time.monotonic() - began, status == signal.SIGKILL


def look(killed):
    merged = folder / "merged"
    drafts = len([path for path in folder.iterdir() if path.name.startswith(".")])
    facts = {"killed": killed, "drafts": drafts, "files": None, "proof": None}
    if merged.exists():
        facts["proof"] = json.loads((merged / "merge.json").read_text())["proof"]
        facts["files"] = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(merged.iterdir())
            if path.name != "merge.json"  # which tells the time
        }
    print(json.dumps(facts), flush=True)


merge(input_of_run(run, prepared, Silent()), run.merged, Silent())  # brings all imports
look(False)
whole, _ = attempt(None)
for _ in range(attempts):
    if chance.random() < 0.5:
        shutil.rmtree(folder / "merged", ignore_errors=True)
    seconds, killed = attempt(chance.uniform(0, whole))
    whole = whole if killed else seconds
    look(killed)
_, killed = attempt(None)
look(killed)
"""


@pytest.mark.slow
def test_a_merge_killed_at_any_moment_leaves_a_whole_model_or_none(recipe_file, tmp_path):
    run_recipe(recipe_file(), tmp_path / "run", "train.steps=2", "train.epochs=null")
    # One thread, since a fork does not take others along.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "run", str(ATTEMPTS)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    first, *others, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert first["proof"]["rows"] == 10 and "model.safetensors" in first["files"]
    assert len(others) == ATTEMPTS and sum(one["killed"] for one in others) > ATTEMPTS / 4
    for one in others:  # nothing, or the same files as of a merge that nobody stopped
        assert one["files"] in (None, first["files"])
        assert one["files"] is None or one["proof"] == first["proof"]
    assert any(one["drafts"] for one in others), "no kill met a merge at work"
    assert (last["files"], last["drafts"]) == (first["files"], 0)
