"""Several processes of one command: started, told to stop, killed; one message, one exit code, and the run goes on."""

import os
import random
import signal
import time

import pytest
import yaml
from chat_terminal import TerminalOf
from conftest import rows_of, write_rows
from distributed_runs import train_on
from launched_commands import (
    STEPS,
    TRAIN,
    checkpoints,
    end_of,
    finish,
    lorakit_train,
    processes_of,
    running,
    wait_for,
)
from rank_processes import free_port
from runs_of_tests import adapter_weights

from lorakit.distributed.launchers import expand_task_counts, first_host, launched, refuse_accelerate_settings
from lorakit.errors import UserError
from lorakit.run_dir import Run

LINUX = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="reads /proc")  # noqa: PTH112


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny_base):
    """A recipe, and its run by two processes that nothing interrupts."""
    folder = tmp_path_factory.mktemp("straight")
    data = {
        "train": str(write_rows(folder / "train.jsonl", rows_of(22))),
        "eval": str(write_rows(folder / "eval.jsonl", rows_of(40)[30:])),
        "max_length": 128,
    }
    recipe = {"model": {"base": str(tiny_base)}, "adapter": {"rank": 4, "alpha": 8}, "data": data}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({"name": "tiny", **recipe, "train": {"batch_size": 4, **TRAIN}}), encoding="utf-8")
    return path, train_on(2, path, folder / "run")[0]


def same(one, other) -> bool:
    left, right = adapter_weights(one), adapter_weights(other)
    return left.keys() == right.keys() and all(bool((left[name] == right[name]).all()) for name in left)


@pytest.mark.slow
def test_ctrl_c_ends_the_step_on_all_devices_and_resuming_gives_the_uninterrupted_run(straight, tmp_path):
    path, run = straight
    terminal = TerminalOf("train", path, "--devices", 2, "-o", tmp_path / "run")
    terminal.wait(rf"training .* \d+/{STEPS}")
    terminal.press("\x03")
    assert terminal.end() == 130
    for message in ("stopping: this step ends", "stopped after step", "checkpoints:"):
        assert terminal.text.count(message) == 1, terminal.text
    assert "Traceback" not in terminal.text and "Elastic" not in terminal.text
    assert same(run, finish(path, tmp_path / "run"))


def killed(path, folder, moment: random.Random) -> str:
    """What a training says one of whose processes was killed, at a random moment."""
    rank, written = moment.randrange(2), moment.randrange(8)
    with running(*lorakit_train(path, folder, "--devices", 2, "-q")) as process:
        wait_for(lambda: len(processes_of(process)) == 2 and checkpoints(folder) >= written, process)
        time.sleep(moment.random() / 20)
        os.kill(processes_of(process)[rank], signal.SIGKILL)
        began = time.monotonic()
        code, out, err = end_of(process)
    assert (code, out) == (1, "") and time.monotonic() - began < 60, err
    assert err.startswith(f"error: rank {rank} was killed by SIGKILL (main memory may have run out)."), err
    assert err.count("error") == 1 and "Traceback" not in err
    return err


@pytest.mark.slow
@LINUX
def test_a_killed_process_ends_the_others_with_one_message_and_the_run_resumes(straight, tmp_path):
    path, run = straight
    err = killed(path, tmp_path / "run", random.Random(3))
    assert "Every checkpoint is complete: --resume goes on from step-0000" in err
    assert same(run, finish(path, tmp_path / "run"))


@LINUX
@pytest.mark.slow
def test_killed_at_ten_random_moments_the_run_resumes_to_the_same_adapter(straight, tmp_path):
    path, run = straight
    for moment in range(10):
        killed(path, tmp_path / f"run{moment}", random.Random(moment))
        assert same(run, finish(path, tmp_path / f"run{moment}"))


@LINUX
@pytest.mark.slow
def test_without_their_parent_processes_stop_with_a_checkpoint(recipe_file, tmp_path):
    path = recipe_file(train=TRAIN | {"steps": 100_000, "save_every": 50_000, "eval_every": 50_000})
    log = tmp_path / "run" / "log.jsonl"
    with running(*lorakit_train(path, tmp_path / "run", "--devices", 2)) as process:
        wait_for(log.exists, process)
        children = [os.pidfd_open(number) for number in processes_of(process).values()]
        process.kill()
        for child in children:
            _wait_for_end(child)
    assert checkpoints(tmp_path / "run") == 1


def _wait_for_end(process: int) -> None:
    import select

    assert select.select([process], [], [], 60)[0], "it trains on without its parent"
    os.close(process)


@pytest.mark.slow
def test_a_second_signal_ends_all_at_once(recipe_file, tmp_path):
    path = recipe_file(train=TRAIN | {"steps": 100_000, "save_every": 50_000, "eval_every": 50_000})
    with running(*lorakit_train(path, tmp_path / "run", "--devices", 2)) as process:
        wait_for((tmp_path / "run" / "log.jsonl").exists, process)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        code, out, err = end_of(process)
    assert (code, out) == (130, "") and "Traceback" not in err and err.count("error: ") == 1, err


@pytest.mark.slow
def test_what_all_processes_refuse_is_said_once(recipe_file, tmp_path):
    path = recipe_file(data={"format": "tokens"})
    with running(*lorakit_train(path, tmp_path / "run", "--devices", 2, "-q")) as process:
        code, out, err = end_of(process)
    assert (code, out) == (2, "") and err.count("error: ") == 1 and "Traceback" not in err, err


def test_what_the_recipe_or_the_number_of_devices_does_not_allow_is_refused_before_anything_starts(
    recipe_file, command, monkeypatch
):
    monkeypatch.setattr("lorakit.cli.devices._launch", lambda *arguments: pytest.fail("it was started"))
    code, _, err = command("train", recipe_file(), "--devices", 5)
    assert code == 2 and "--devices 5: a step has 4 rows (train.batch_size)" in err
    code, _, err = command("train", recipe_file(train={"epoch": 2}), "--devices", 2)
    assert code == 2 and "Did you mean train.epochs?" in err
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    code, _, err = command("train", recipe_file(), "--devices", 2)
    assert code == 2 and "torchrun started 1 on this machine" in err


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_launcher_starts_the_same_training(recipe_file, tmp_path, launcher):
    path = recipe_file()
    starts = {
        "torchrun": f"torch.distributed.run --nproc-per-node 2 --master-port {free_port()}",
        "accelerate": f"accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port {free_port()}",
    }
    start = ["-m", *starts[launcher].split()]
    python, *command = lorakit_train(path, tmp_path / "run", "-q")
    with running(python, *start, *command) as process:
        code, out, err = end_of(process)
    assert code == 0 and out.count("held-out loss") == 1, err
    assert same(train_on(2, path, tmp_path / "straight")[0], Run(tmp_path / "run"))
    with running(python, *start, *lorakit_train(path, tmp_path / "run", "-q")[1:]) as process:
        code, out, err = end_of(process)
    assert code == 1 and out == "" and err.count("error: ") == 1, err  # the folder holds a run


@pytest.mark.slow
def test_a_step_of_srun_is_joined(recipe_file, tmp_path):
    path = recipe_file()
    common = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "0"}
    common |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NTASKS": "2"}
    tasks = [common | {"SLURM_PROCID": task, "SLURM_LOCALID": task} for task in ("0", "1")]
    command = lorakit_train(path, tmp_path / "run", "-q")
    with running(*command, **tasks[0]) as first, running(*command, **tasks[1]) as second:
        (code, out, err), (other, nothing, silence) = end_of(first), end_of(second)
    assert (code, other, nothing, silence) == (0, 0, "", "") and out.count("held-out loss") == 1, err


STEP = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2", "SLURM_JOB_ID": "123", "SLURM_STEP_ID": "2"}
STEP |= {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NODELIST": "gpu[07-09],x", "SLURM_STEP_TASKS_PER_NODE": "2(x3)"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN |= {"MASTER_ADDR": "gpu01", "MASTER_PORT": "29500"}


def test_each_launcher_says_where_a_process_is():
    place = launched(TORCHRUN)
    assert (place.rank, place.size, place.local_rank, place.local_size) == (3, 4, 1, 2)
    place = launched(STEP)
    assert (place.rank, place.size, place.local_rank, place.local_size) == (5, 6, 1, 2)
    assert (place.address, place.port) == ("gpu07", 15125)
    mpi = {f"OMPI_COMM_WORLD_{name}": value for name, value in {"RANK": "1", "SIZE": "2", "LOCAL_SIZE": "1"}.items()}
    place = launched(mpi | {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"})
    assert (place.launcher, place.rank, place.size, place.local_size) == ("mpirun", 1, 2, 1)
    assert launched(TORCHRUN | STEP).launcher == "torchrun"  # torchrun inside a step


def test_a_shell_of_an_allocation_is_not_a_step():
    batch = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    assert launched(batch) is None and launched(batch | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    assert launched({}) is None and launched({"WORLD_SIZE": "1"}) is None
    assert launched({"RANK": "0", "WORLD_SIZE": "1"}).size == 1


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"RANK": "4"}, "rank 4 of 4"),
        ({"LOCAL_RANK": "2"}, "on its machine 2 of 2"),
        ({"RANK": ""}, "RANK=: the launcher's environment has no number"),
        ({"MASTER_ADDR": ""}, "Set MASTER_ADDR to the host of rank 0"),
    ],
)
def test_an_environment_that_cannot_be_is_refused(changed, message):
    with pytest.raises(UserError, match=message):
        launched(TORCHRUN | changed)
    with pytest.raises(UserError, match="MASTER_PORT is not set"):
        launched({name: value for name, value in TORCHRUN.items() if name != "MASTER_PORT"})


@pytest.mark.parametrize(
    "nodes, first",
    [("gpu[01-04,07]", "gpu01"), ("a1,b2", "a1"), ("r[3,5]c[09-11]-ib,x", "r3c09-ib"), ("node7", "node7")],
)
def test_the_first_host_of_a_step(nodes, first):
    assert first_host(nodes) == first


def test_tasks_a_node():
    assert expand_task_counts("2(x3),1") == [2, 2, 2, 1] and expand_task_counts("4") == [4]


@pytest.mark.parametrize(
    "setting, remedy",
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "model.dtype"),
        ({"ACCELERATE_USE_FSDP": "true"}, "train.sharding: fsdp"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "train.sharding: zero-2 or zero-3"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "train.micro_batch"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "--dynamo_backend"),
        ({"MASTER_PORT": "29500"}, "started one"),
    ],
)
def test_what_accelerate_launch_was_told_is_refused_with_the_recipes_key(setting, remedy):
    harmless = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
    refuse_accelerate_settings(harmless)
    with pytest.raises(UserError, match=remedy):
        refuse_accelerate_settings(harmless | setting)
