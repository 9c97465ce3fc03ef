"""OpenMP's threads: how many, how they wait, and that the user's word stays."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from lorakit.hardware import threads
from lorakit.hardware.cgroups import CgroupLimits

VARIABLES = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
X86 = pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="libgomp's loop on x86")


@pytest.fixture
def on(monkeypatch):
    """Sets up threads on a machine of so many processors, and returns the variables."""

    def set_up(processors: int, allowed: float | None = None, machine: str = "x86_64", **given: str):
        environment = dict(given)
        monkeypatch.setattr(threads, "_processors", lambda: processors)
        monkeypatch.setattr(threads, "read_cgroup_limits", lambda: CgroupLimits(processors=allowed))
        monkeypatch.setattr(threads, "platform", SimpleNamespace(machine=lambda: machine))
        monkeypatch.setattr(threads, "os", SimpleNamespace(environ=environment))
        monkeypatch.setattr(threads, "_written", {})
        threads.set_up_threads()
        return environment

    return set_up


def test_threads_wait_shortly_and_a_container_has_as_many_as_it_may_use(on):
    assert on(64) == {"GOMP_SPINCOUNT": "1000"} and threads.describe_threads() == ""
    assert on(64, allowed=64.0) == {"GOMP_SPINCOUNT": "1000"}
    assert on(64, allowed=3.5) == {"GOMP_SPINCOUNT": "1000", "OMP_NUM_THREADS": "3"}
    assert threads.describe_threads() == "threads: 3, since the container or batch system allows 3.5 of 64 processors"
    assert on(64, allowed=0.5)["OMP_NUM_THREADS"] == "1"
    assert on(64, machine="aarch64") == {}


def test_what_the_user_set_stays(on):
    given = {"OMP_NUM_THREADS": "8", "GOMP_SPINCOUNT": "7"}
    assert on(64, allowed=4.0, **given) == given and threads.describe_threads() == ""
    threads.share_threads(2)
    assert threads.os.environ == given
    assert on(64, OMP_WAIT_POLICY="ACTIVE") == {"OMP_WAIT_POLICY": "ACTIVE"}


def test_processes_of_one_machine_share_its_processors(on):
    for allowed, each in ((None, "32"), (5.0, "2"), (1.0, "1")):
        environment = on(64, allowed)
        threads.share_threads(2)
        assert environment["OMP_NUM_THREADS"] == each


def _environment(**given: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in VARIABLES} | given


@X86
@pytest.mark.parametrize(("given", "used"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_a_command_sets_them_before_it_loads_torch(recipe_file, tmp_path, given, used):
    (tmp_path / "torch.py").write_text("import os; print(os.environ['GOMP_SPINCOUNT'], flush=True); os._exit(0)")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "lorakit", "train", str(recipe_file()), "--dry-run"]
    environment = _environment(PYTHONPATH=path, **given)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == f"{used}\n", done.stderr


@X86
def test_torch_computes_in_threads_that_read_them():
    code = "from lorakit.hardware.threads import set_up_threads; set_up_threads(); import torch"
    environment = _environment(OMP_DISPLAY_ENV="verbose")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "GOMP_SPINCOUNT = '1000'" in done.stderr
