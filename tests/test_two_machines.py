"""Two machines: network namespaces with addresses of their own, joined by a virtual cable that can be cut."""

import os
import shutil
import subprocess
import threading
from contextlib import ExitStack

import pytest
from distributed_runs import train_on
from launched_commands import TRAIN, checkpoints, end_of, finish, lorakit_train, running, wait_for
from runs_of_tests import adapter_weights

from lorakit.run_dir import Run

ADDRESSES = ("10.77.0.1", "10.77.0.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def namespaces_work() -> bool:
    """Whether this process may make network namespaces: root may, outside most containers."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        return False
    name = f"lorakit-{os.getpid()}-try"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return False
    ip("netns", "delete", name)
    return True


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not namespaces_work(), reason="needs root and network namespaces")]


@pytest.fixture
def machines():
    """The names of two namespaces; the cable's end in each is called cable."""
    names = [f"lorakit-{os.getpid()}-{side}" for side in "ab"]
    with ExitStack() as stack:
        for name in names:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
        first, second = names
        ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")
        yield names


def torchrun(machine: str, number: int, command: list[str]) -> list[str]:
    python, *rest = command
    start = f"-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --local-addr {ADDRESSES[number]}".split()
    meeting = f"--rdzv-backend c10d --rdzv-endpoint {ADDRESSES[0]}:29500 --rdzv-conf is_host={int(number == 0)}".split()
    return ["ip", "netns", "exec", machine, python, *start, *meeting, *rest]


def test_two_machines_train_what_two_processes_do(machines, recipe_file, tmp_path):
    path = recipe_file()
    command = lorakit_train(path, tmp_path / "run", "-q")
    with ExitStack() as stack:
        starts = [torchrun(machine, number, command) for number, machine in enumerate(machines)]
        ends = [end_of(process) for process in [stack.enter_context(running(*start)) for start in starts]]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert "held-out loss" in ends[0][1] and not ends[1][1]
    straight, _ = train_on(2, path, tmp_path / "straight")
    one, other = adapter_weights(straight), adapter_weights(Run(tmp_path / "run"))
    assert all(bool((one[name] == other[name]).all()) for name in one)


def test_a_cut_link_ends_both_machines_with_a_message_and_the_run_resumes(machines, recipe_file, tmp_path):
    steps = {"steps": 400, "eval_every": 200, "save_every": 20}
    path = recipe_file(train=TRAIN | steps)
    command = lorakit_train(path, tmp_path / "run", "-q")
    with ExitStack() as stack:
        starts = [torchrun(machine, number, command) for number, machine in enumerate(machines)]
        first, second = (stack.enter_context(running(*start)) for start in starts)
        wait_for(lambda: checkpoints(tmp_path / "run") >= 2, first)
        ip("-n", machines[0], "link", "set", "cable", "down")
        assert "rank 1 on " in line_with(first, "error: ") and "--resume" in line_with(second, "error: ")
    assert finish(path, tmp_path / "run").is_complete()


def line_with(process: subprocess.Popen, text: str) -> str:
    """The first line of standard error that has a text: torchrun itself may wait on where the link is cut."""
    timer = threading.Timer(120, process.kill)
    timer.start()
    try:
        return next((line for line in process.stderr if text in line), "")
    finally:
        timer.cancel()
