"""What the system refuses is told as what it is, with a remedy; it is no fault of lorakit's, nor of the recipe."""

import errno
import gc
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
from runs_of_tests import adapter_weights, run_recipe
from safetensors.torch import save_file
from test_cli import lorakit_run as lorakit_run
from test_merge_command import small_disk as small_disk
from test_training import same

from lorakit.errors import SYSTEM_ERRORS, Interrupted, LorakitError, UserError, exit_code_of, explain_error
from lorakit.run_dir import Run
from lorakit.train.trainer import SupervisedTrainer

# Never to be handed to a library as a name: some write a file of their own beside it and rename it over the device.
FULL = "/dev/full"


def write_with_pyarrow(file):
    with pa.OSFile(str(file), "wb") as opened:
        opened.write(bytes(1 << 20))


WRITERS = {
    "python": lambda file, tokenizer: file.write_bytes(bytes(1 << 20)),
    "safetensors": lambda file, tokenizer: save_file({"a": torch.zeros(1 << 20)}, file),
    "torch": lambda file, tokenizer: torch.save({"a": torch.zeros(1 << 20)}, file),
    "tokenizers": lambda file, tokenizer: tokenizer.backend_tokenizer.save(str(file)),
    "numpy": lambda file, tokenizer: np.savez(file, a=np.zeros(1 << 20)),
    "pyarrow": lambda file, tokenizer: write_with_pyarrow(file),
}


@pytest.mark.parametrize("library", WRITERS)
def test_a_full_disk_is_told_whatever_library_met_it(library, tokenizer, small_disk):
    with pytest.raises(Exception, match=r".") as caught:
        WRITERS[library](small_disk(4096) / "file", tokenizer)
    told = explain_error(caught.value)
    assert told is not None and type(told) is LorakitError, caught.value
    assert "disk" in str(told) and "full" in str(told) and "Make room" in str(told)
    del caught, told  # whose frames keep the file open, and the disk mounted
    gc.collect()


def test_a_file_that_torch_cannot_open_is_told_by_the_systems_words(tmp_path):
    with pytest.raises(RuntimeError) as caught:
        torch.save({"a": torch.zeros(1)}, tmp_path)
    assert "is a folder, not a file" in str(explain_error(caught.value))


@pytest.mark.parametrize("number", SYSTEM_ERRORS)
def test_every_error_of_the_table_says_where_why_and_what_to_do(number):
    told = explain_error(OSError(number, os.strerror(number), "/some/where"))
    assert str(told).startswith("/some/where: ") and str(told).endswith((".", "?"))
    wrapped = UserError("model.base: cannot be read.")
    wrapped.__cause__ = OSError(number, os.strerror(number))
    assert exit_code_of(wrapped) == (1 if number in (errno.ENOSPC, errno.EMFILE, errno.EIO) else exit_code_of(wrapped))


def test_what_is_no_error_of_the_system_stays_a_fault():
    assert explain_error(KeyError("layers")) is None and explain_error(RuntimeError("shapes differ")) is None
    assert explain_error(OSError("a library's own")) is None


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (MemoryError(), LorakitError, "out of memory"),
        (ImportError("libarrow.so: failed to map segment from shared object"), LorakitError, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."), LorakitError, "out of memory"),
        (RuntimeError("can't start new thread"), LorakitError, "ulimit -u"),
        (RecursionError("maximum recursion depth exceeded"), UserError, "nested too deeply"),
        (
            RuntimeError("[enforce fail] . open file failed with strerror: Input/output error"),
            LorakitError,
            "the disk or",
        ),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory"), LorakitError, "temporary directory"),
        (
            UnicodeEncodeError("utf-8", "caf\udce9", 3, 4, "surrogates not allowed"),
            UserError,
            "cannot be written as utf-8",
        ),
        (ValueError("embedded null byte"), UserError, "NUL character"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 5000), UserError, "the path is too long"),
    ],
)
def test_other_errors_that_are_not_ours(error, kind, says):
    told = explain_error(error)
    assert type(told) is kind and says in str(told) and len(str(told)) < 400


@pytest.mark.parametrize("name", ["x" * 5000 + ".yaml", "a/" * 2500 + "x.yaml"])
@pytest.mark.parametrize("key", ["extends", "adapter.from", "model.base", "data.train", "output.dir"])
def test_a_path_of_5000_characters_is_one_clear_error(recipe_file, lorakit_run, key, name):
    path = recipe_file(adapter={"rank": ..., "alpha": ...})
    flags = [] if key == "extends" else ["--set", f"{key}={json.dumps(name)}"]
    if key == "extends":
        path.write_text(f"extends: {name}\n" + path.read_text())
    code, _, err = lorakit_run("train", path, *flags)
    assert code == 2 and "fault in lorakit" not in err and "Traceback" not in err


@pytest.mark.parametrize("name", ["manifest.json", "recipe.yaml"])
def test_files_of_a_run_that_are_nested_too_deeply_are_damaged(recipe_file, lorakit_run, tmp_path, name):
    run, _ = run_recipe(recipe_file(train={"steps": 1, "epochs": None}), tmp_path / "run")
    (run.folder / name).write_text("[" * 100_000 + "]" * 100_000)
    code, _, err = lorakit_run("eval", run.folder)
    assert code == 2 and name in err and "fault in lorakit" not in err


def test_a_run_in_a_folder_whose_name_is_no_text_is_one_clear_error(recipe_file, lorakit_run, tmp_path):
    path = recipe_file(train={"steps": 1, "epochs": None})
    code, _, err = lorakit_run("train", path, "-o", tmp_path / "caf\udce9", "--quiet")
    assert code in (0, 2) and "fault in lorakit" not in err, err


def test_a_chat_template_that_is_nested_too_deeply_is_the_users(recipe_file, lorakit_run, tmp_path):
    (tmp_path / "own.jinja").write_text("{{ " + "(" * 3000 + ")" * 3000 + " }}")
    code, _, err = lorakit_run("data", recipe_file(model={"chat_template": "own.jinja"}))
    assert code == 2 and "nested too deeply" in err


def test_a_run_whose_disk_filled_up_goes_on_when_there_is_room(recipe_file, lorakit_run, tmp_path, small_disk):
    """At several moments: the first files, a checkpoint, the adapter."""
    path = recipe_file(train={"steps": 4, "epochs": None, "schedule": "constant", "save_every": 2, "keep": 1})
    straight, _ = run_recipe(path, tmp_path / "straight")
    needed = sum(file.stat().st_size for file in straight.folder.rglob("*") if file.is_file())
    failed = 0
    for number, size in enumerate((16384, needed // 4, needed // 2, needed * 3 // 4)):
        disk = small_disk(size)
        run = Run(disk / f"run{number}")
        code, _, err = lorakit_run("train", path, "-o", run.folder)
        assert code == 0 or (code == 1 and "disk" in err and "Make room" in err), err
        assert "fault in lorakit" not in err and "Traceback" not in err
        failed += code == 1
        subprocess.run(["mount", "-o", f"remount,size={needed * 8}", disk], check=True)
        if code:
            code, _, err = lorakit_run("train", path, "-o", run.folder, "--resume", "--quiet")
            assert code == 0, err
        assert same(adapter_weights(straight), adapter_weights(run))
    assert failed >= 2


def lorakit(*arguments, **options):
    command = [sys.executable, "-m", "lorakit", *map(str, arguments)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, **options)


def unread():
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize("command", ["check", pytest.param("data", marks=pytest.mark.slow)])
def test_a_reader_that_has_gone_is_no_error(recipe_file, command):
    pipe = unread()
    done = lorakit(command, recipe_file(), stdout=pipe)
    os.close(pipe)
    assert (done.returncode, "Broken pipe" in done.stderr, "Exception" in done.stderr) == (0, False, False)


def test_a_result_that_cannot_be_written_is_told(recipe_file):
    with open(FULL, "w") as full:  # noqa: PTH123
        done = lorakit("check", recipe_file(), stdout=full)
    assert done.returncode == 1
    assert (
        done.stderr.startswith("error: standard output: the disk is full (No space left on device).")
        and "Exception" not in done.stderr
    )


def test_a_closed_output_is_no_error(recipe_file):
    done = subprocess.run(["sh", "-c", f"{sys.executable} -m lorakit check {recipe_file()} >&- 2>&-"], check=False)
    assert done.returncode == 0


def test_progress_that_nobody_reads_stops_nothing(recipe_file):
    pipe = unread()
    command = [sys.executable, "-m", "lorakit", "check", str(recipe_file()), "--set", "nonsense=1"]
    done = subprocess.run(command, stderr=pipe, stdout=subprocess.PIPE, check=False)
    os.close(pipe)
    assert done.returncode == 2


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}])
def test_an_output_without_utf_8_writes_what_it_can(recipe_file, environment):
    path = recipe_file(data={"system": "Sei höflich ☺"})
    done = lorakit("check", path, stdout=subprocess.PIPE, env={**os.environ, "PYTHONUTF8": "0", **environment})
    assert done.returncode == 0 and "Sei h\\xf6flich \\u263a" in done.stdout
    done = lorakit("check", path, "--set", "größe=1", env={**os.environ, "PYTHONUTF8": "0", **environment})
    assert done.returncode == 2 and "fault in lorakit" not in done.stderr and "gr\\" in done.stderr


def test_an_override_that_is_no_text_is_one_clear_error(recipe_file, lorakit_run):
    code, _, err = lorakit_run("check", recipe_file(), "--set", "name=caf\udce9")
    assert code == 2 and "bytes that are not text" in err and "1 problem" in err


@pytest.fixture
def handlers():
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_sighup_writes_a_checkpoint_as_sigterm_does_and_nohup_keeps_it_away(
    recipe_file, tmp_path, monkeypatch, handlers
):
    path = recipe_file(train={"steps": 4, "epochs": None})
    original = SupervisedTrainer.training_step

    def hung_up(self, *arguments, **named):
        if self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)  # a closed terminal's kernel and its shell both send it
        return original(self, *arguments, **named)

    monkeypatch.setattr(SupervisedTrainer, "training_step", hung_up)
    with pytest.raises(Interrupted, match="stopped after step 2 of 4"):
        run_recipe(path, tmp_path / "run")
    assert [folder.name for folder in Run(tmp_path / "run").complete_checkpoints()] == ["step-000002"]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        _, outcome = run_recipe(path, tmp_path / "other")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert outcome.steps == 4


def test_sighup_leaves_no_draft_of_a_merge(recipe_file, tmp_path, monkeypatch, lorakit_run, handlers):
    run, _ = run_recipe(recipe_file(train={"steps": 1, "epochs": None}), tmp_path / "run")
    before = sorted(path.name for path in run.folder.iterdir())
    monkeypatch.setattr("lorakit.merge.run.coarsest_dtype", lambda *_, **__: os.kill(os.getpid(), signal.SIGHUP))
    assert lorakit_run("merge", run.folder)[0] == 130
    assert sorted(path.name for path in run.folder.iterdir()) == before
