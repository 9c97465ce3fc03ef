"""Exports are complete or absent, whatever ends them, and replace nothing but exports."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from eval_runs import make_run
from gguf_models import spm_base
from test_merge_command import small_disk as small_disk

from lorakit.atomic_io import LOCK, exclusive_lock, file_lock

ATTEMPTS = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("safety")
    run = make_run(folder, spm_base(folder / "base"))
    done = subprocess.run([sys.executable, "-m", "lorakit", "merge", run.folder, "-q"], check=False)
    assert done.returncode == 0
    return run


@pytest.fixture
def run(made, tmp_path):
    """The run, merged, in a folder that a test may change."""
    return Path(shutil.copytree(made.folder, made.folder.parent / tmp_path.name))


def refused(lorakit, *arguments, says, code=2):
    got, out, err = lorakit("export", *arguments)
    assert (got, out) == (code, "") and says in err and "Traceback" not in err, err


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(LOCK))


@pytest.mark.parametrize(
    ("target", "shares"),
    [
        pytest.param("gguf:f16", [0.3], marks=pytest.mark.slow),  # in the conversion
        # in the conversion, and in the quantization that follows
        pytest.param("gguf:q8_0", [0.3, 1.12], marks=pytest.mark.slow),
        ("huggingface:merged", [0.0, 0.3, 1.0]),
    ],
)
def test_a_disk_that_fills_up_at_any_moment_is_told_and_left_empty(run, lorakit, small_disk, target, shares):
    weights = (run / "merged" / "model.safetensors").stat().st_size
    for share in shares:
        disk = small_disk(max(8192, int(share * weights)))
        refused(lorakit, run, "--to", target, "-o", disk / "out", "-q", says="the disk is full", code=1)
        assert left_in(disk / "out") == []


def test_what_was_exported_before_the_disk_filled_up_stays(run, lorakit, small_disk):
    disk = small_disk((run / "merged" / "model.safetensors").stat().st_size)
    says = "the disk is full"
    refused(lorakit, run, "--to", "huggingface,huggingface:merged", "-o", disk / "out", "-q", says=says, code=1)
    assert left_in(disk / "out") == ["huggingface"]


# Imports once, and forks for each attempt; nothing is computed before a fork, since torch's threads do not survive it.
SCRIPT = """
import json, os, random, select, shutil, signal, sys, time
from pathlib import Path

from lorakit.cli.export import open_source
from lorakit.export.run import export
from lorakit.progress import Silent
from lorakit.recipe.export_target import parse_target

folder, attempts = Path(sys.argv[1]), int(sys.argv[2])
chance, targets = random.Random(5), [parse_target("huggingface"), parse_target("huggingface:merged")]
root = folder / "export"


def attempt(seconds):
    number = os.fork()
    if number == 0:
        code = 1
        try:
            with open_source(str(folder), None, None, Silent()) as source:
                export(source, targets, root, True, Silent())
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
    there = {}
    for target in targets:
        place = root / target.folder_name
        if place.exists():
            files = json.loads((place / "export.json").read_text())["files"]
            there[str(target)] = sorted(files) == sorted(path.name for path in place.iterdir())
    drafts = len([path for path in root.iterdir() if path.name.startswith(".lorakit-draft")]) if root.exists() else 0
    print(json.dumps({"killed": killed, "drafts": drafts, "whole": there}), flush=True)


with open_source(str(folder), None, None, Silent()) as source:
    export(source, targets, root, True, Silent())  # brings all imports
look(False)
whole, _ = attempt(None)
for _ in range(attempts):
    if chance.random() < 0.5:
        shutil.rmtree(root)
    seconds, killed = attempt(chance.uniform(whole / 3, whole))
    whole = whole if killed else seconds
    look(killed)
_, killed = attempt(None)
look(killed)
"""


@pytest.mark.slow
def test_an_export_killed_at_any_moment_is_whole_or_absent_and_the_next_one_cleans_up(run):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", SCRIPT, run, str(ATTEMPTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    first, *others, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(others) == ATTEMPTS and sum(one["killed"] for one in others) > ATTEMPTS / 4
    assert all(all(one["whole"].values()) for one in others)
    assert any(one["drafts"] for one in others), "no kill met an export at work"
    assert first["whole"] == last["whole"] == {"huggingface": True, "huggingface:merged": True} and not last["drafts"]


def test_nothing_but_an_earlier_export_is_replaced(run, lorakit, tmp_path):
    (tmp_path / "huggingface").mkdir()
    (tmp_path / "huggingface" / "thesis.txt").write_text("years")
    for flags in ([], ["--overwrite"]):
        refused(lorakit, run, "--to", "huggingface", "-o", tmp_path, *flags, says="lorakit did not write it")
    assert lorakit("export", run, "--to", "huggingface")[0] == 0
    refused(lorakit, run, "--to", "huggingface", says="already exists")
    assert lorakit("export", run, "--to", "huggingface", "--overwrite")[0] == 0
    (run / "export" / "huggingface" / "notes.txt").write_text("mine")
    refused(lorakit, run, "--to", "huggingface", "--overwrite", says="notes.txt: lorakit did not write it")
    assert (tmp_path / "huggingface" / "thesis.txt").read_text() == "years"


def test_a_place_that_is_taken_is_told_before_any_work(run, lorakit):
    assert lorakit("export", run, "--to", "huggingface:merged")[0] == 0
    refused(lorakit, run, "--to", "huggingface,huggingface:merged", says="huggingface-merged: already exists")
    assert left_in(run / "export") == ["huggingface-merged"]


@pytest.mark.parametrize("part", ["merged", "adapter", "merged/deeper", "checkpoints", "../base"])
def test_nothing_is_exported_into_what_is_exported(run, lorakit, part):
    refused(lorakit, run, "--to", "huggingface", "-o", run / part, says="which is exported. Choose another")
    assert not list(run.rglob("export.json"))


def test_the_exports_of_a_runs_merged_folder_go_into_the_runs_own(run, lorakit):
    assert lorakit("export", run / "merged", "--to", "huggingface")[0] == 0
    assert left_in(run / "export") == ["huggingface"] and not (run / "merged" / "export").exists()
    assert lorakit("merge", run, "--overwrite", "--quiet")[0] == 0


def test_two_exports_into_one_place_do_not_meet(run, lorakit, tmp_path):
    (tmp_path / "out").mkdir()
    with exclusive_lock(tmp_path / "out" / "huggingface"):
        refused(lorakit, run, "--to", "huggingface", "-o", tmp_path / "out", says="another process is writing")
    with file_lock(tmp_path / "out" / f"{LOCK}.shared", ""):
        refused(lorakit, run, "--to", "huggingface", "-o", tmp_path / "out", says="another process is exporting")
    assert left_in(tmp_path / "out") == []


@pytest.mark.parametrize(("place", "says"), [("file/below", "cannot be written"), ("x" * 300, "the path is too long")])
def test_a_place_that_cannot_be_written_is_told(run, lorakit, tmp_path, place, says):
    (tmp_path / "file").write_text("mine")
    refused(lorakit, run, "--to", "huggingface", "-o", tmp_path / place, says=says)


def test_a_disk_that_is_read_only_is_told(run, lorakit, small_disk):
    disk = small_disk(1 << 20)
    if subprocess.run(["mount", "-o", "remount,ro", disk], check=False).returncode:
        pytest.skip("remounting is not permitted here")
    refused(lorakit, run, "--to", "huggingface", "-o", disk, says="cannot be written: Read-only file system")


def test_a_wrong_llama_cpp_is_told_before_the_run_is_read(lorakit, tmp_path):
    says = "has no convert_hf_to_gguf.py. Give a checkout of llama.cpp"
    refused(lorakit, tmp_path / "nothing", "--to", "gguf:q8_0", "--llama-cpp", tmp_path, says=says)
    says = "--llama-cpp: does nothing for huggingface"
    refused(lorakit, tmp_path / "nothing", "--to", "huggingface", "--llama-cpp", tmp_path, says=says)


def test_overwriting_a_run_removes_its_exports_and_what_killed_ones_left(run, made, lorakit):
    recipe = made.folder.parent / "tiny.yaml"
    assert lorakit("export", run, "--to", "huggingface")[0] == 0
    (run / "export" / ".lorakit-draft.shared.abc").mkdir()
    (run / "export" / ".lorakit-draft.gguf-q8_0.abc").mkdir()
    code, _, err = lorakit("train", recipe, "-o", run, "--overwrite", "--set", "train.steps=1", "-q")
    assert code == 0 and not (run / "export").exists(), err


def test_overwriting_a_run_keeps_what_the_user_put_beside_its_exports(run, made, lorakit):
    recipe = made.folder.parent / "tiny.yaml"
    (run / "export" / "mine").mkdir(parents=True)
    (run / "export" / "mine" / "thesis.txt").write_text("years")
    code, _, err = lorakit("train", recipe, "-o", run, "--overwrite", "-q")
    assert code == 2 and "lorakit did not write it" in err
    assert json.loads((run / "manifest.json").read_text())["status"] == "complete"
