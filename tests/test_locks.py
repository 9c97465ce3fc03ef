"""One process at a time writes into a folder, from the check whether it may to the end; a dead one stops nobody."""

import os
import select
import subprocess
import sys
import threading

import pytest
from runs_of_tests import run_recipe
from test_cli import lorakit_run as lorakit_run

from lorakit.atomic_io import LOCK, exclusive_lock, file_lock
from lorakit.errors import UserError
from lorakit.output_dir import claim_output
from lorakit.run_dir import Run, open_run

HOLDER = """
import os, sys, time
from pathlib import Path
from lorakit.run_dir import open_run
with open_run(Path(sys.argv[1]), resume=False, overwrite=False):
    if os.fork() == 0:
        print(os.getpid(), flush=True)  # it has let go of the lock by now
        time.sleep(600)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds a run's folder, has forked a worker, and keeps another cache."""
    environment = {**os.environ, "LORAKIT_CACHE": str(tmp_path / "other-cache")}
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    worker = int(process.stdout.readline())
    yield process
    process.kill()
    process.wait()
    os.kill(worker, 9)
    process.stdin.close()
    process.stdout.close()


def test_two_processes_never_share_a_run_whatever_their_caches(holder, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    for folder in (tmp_path / "run", tmp_path / "link" / "run"):
        with (
            pytest.raises(UserError, match="another process is training into this folder"),
            open_run(folder, True, False),
        ):
            pass


def test_a_process_that_was_killed_stops_nobody_even_where_its_workers_live_on(holder, tmp_path):
    holder.kill()
    holder.wait()
    assert (tmp_path / "run" / LOCK).exists()
    with open_run(tmp_path / "run", False, False) as run:
        assert run.folder.is_dir()
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_run_that_ended_meanwhile_is_not_replaced(recipe_file, tmp_path, monkeypatch):
    """Another run begins and ends between our look and our lock: nothing but --overwrite may replace it."""
    path, folder = recipe_file(train={"steps": 1, "epochs": None}), tmp_path / "run"
    original, calls = Run.exclusive_lock, []

    def late(self):
        if not calls:
            calls.append(self)
            run_recipe(path, folder)
        return original(self)

    monkeypatch.setattr(Run, "exclusive_lock", late)
    with pytest.raises(UserError, match="holds another run's results"):
        run_recipe(path, folder)
    assert Run(folder).read_manifest()["status"] == "complete"


def test_the_lock_goes_with_a_run_that_is_moved(tmp_path):
    with open_run(tmp_path / "old", False, False):
        (tmp_path / "old").rename(tmp_path / "new")
        with pytest.raises(UserError, match="another process"), open_run(tmp_path / "new", True, False):
            pass
        with open_run(tmp_path / "old", False, False):
            pass
    with open_run(tmp_path / "new", False, False):
        pass


def test_a_run_that_is_read_or_merged_is_not_overwritten_meanwhile(recipe_file, tmp_path, lorakit_run):
    path = recipe_file(train={"steps": 1, "epochs": None})
    run, _ = run_recipe(path, tmp_path / "run")
    with run.shared(), run.shared():
        code, _, err = lorakit_run("train", path, "-o", run.folder, "--overwrite", "--quiet")
        assert code == 2 and "another process" in err and run.adapter.is_dir()
        assert lorakit_run("merge", run.folder, "--quiet")[0] == 0
    with run.exclusive_lock():
        for command in (["merge", run.folder, "--overwrite"], ["eval", run.folder]):
            code, _, err = lorakit_run(*command)
            assert code == 2 and "another process is training" in err
    assert lorakit_run("train", path, "-o", run.folder, "--overwrite", "--quiet")[0] == 0
    assert not [path.name for path in run.folder.iterdir() if path.name.startswith(LOCK)]


def test_a_result_that_appeared_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    output = tmp_path / "merged"
    refused = pytest.raises(UserError, match="another process is writing this folder")
    with claim_output(output, overwrite=False), refused, claim_output(output, overwrite=False):
        pass
    original = os.open

    def late(path, *arguments, **named):
        if LOCK in str(path) and not output.exists():
            output.mkdir()
        return original(path, *arguments, **named)

    monkeypatch.setattr(os, "open", late)
    with pytest.raises(UserError, match="did not write it"), claim_output(output, overwrite=False):
        pass


def test_many_threads_of_waiters_hold_one_lock_one_at_a_time(tmp_path):
    """Removing the file on release lets nobody hold a file that is gone while another holds the new one."""
    inside, most, done = [], [], []

    def work():
        while len(done) < 200:
            try:
                with file_lock(tmp_path / LOCK, "held"):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
                    done.append(1)
            except UserError:
                continue

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and not (tmp_path / LOCK).exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_in_a_folder_that_cannot_be_written_is_read_without_a_lock(tmp_path):
    (tmp_path / "run").mkdir(mode=0o555)
    with Run(tmp_path / "run").shared():
        assert not list((tmp_path / "run").iterdir())


def test_a_lock_beside_a_folder_goes_when_it_is_given_back(tmp_path):
    with exclusive_lock(tmp_path / "merged"):
        assert [path.name for path in tmp_path.iterdir()] == [f"{LOCK}.merged"]
    assert not list(tmp_path.iterdir())


WORKERS = """
import multiprocessing, time
from lorakit.data.worker_pool import map_in_order

def work(number):
    return number

for result in map_in_order(work, ((number,) for number in range(1000)), 2):
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process of its parent's end")
def test_workers_end_with_a_parent_that_is_killed():
    process = subprocess.Popen([sys.executable, "-c", WORKERS], stdout=subprocess.PIPE, text=True)
    workers = [os.pidfd_open(int(number)) for number in process.stdout.readline().split()]
    assert len(workers) == 2
    process.kill()
    process.wait()
    process.stdout.close()
    for worker in workers:
        assert select.select([worker], [], [], 60)[0], "a worker lives on"
        os.close(worker)


def test_evaluations_that_end_in_one_moment_have_files_of_their_own(tmp_path):
    """The name is taken before it is written, so neither of two processes replaces the other's answers."""
    from lorakit.evaluate.report import write_document

    paths, start = [], threading.Barrier(8)

    def write(number):
        start.wait()
        facts = {"taken": "2026-01-01T00:00:00+00:00", "number": number}
        paths.append((number, write_document(facts, tmp_path / "eval", lines=f"{number}\n")))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({path for _, path in paths}) == 8
    for number, path in paths:
        assert path.with_suffix(".jsonl").read_text() == f"{number}\n" and f'"number": {number}' in path.read_text()
    assert len(list((tmp_path / "eval").iterdir())) == 16
